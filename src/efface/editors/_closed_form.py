"""Shared by UCE and RECE: rows of texts, and the change T of the text that represents the change of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .._text import check_phrases, encode
from .._weights import keys_values
from ..core import Concept
from ..delta import Change, Factors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Tokens = Literal["last", "tail", "all"]


# ---------------------------------------------------------------- texts


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def anchors_of(concepts: Sequence[Concept], anchor: str | None = None) -> dict[str, str]:
    """Maps each phrase to its anchor. Raises ValueError if the anchor is the phrase itself, or is ambiguous."""
    if not concepts:
        raise ValueError("Expected at least one concept to erase, got none. Name one.")
    found: dict[str, str] = {}
    for concept in concepts:
        to = concept.anchor if anchor is None else anchor
        for phrase in concept.phrases:
            if _plain(phrase) == _plain(to):
                raise ValueError(f"The concept {concept.name!r} has itself as anchor, {to!r}. Name another anchor.")
            if _plain(found.setdefault(phrase, to)) != _plain(to):
                raise ValueError(
                    f"Expected one anchor for {phrase!r}, got {found[phrase]!r} and {to!r}. Give one of them."
                )
    return found


def kept_texts(preserve: Sequence[str], concepts: Sequence[Concept], erased: Mapping[str, str]) -> tuple[str, ...]:
    """All texts to preserve, once each. Raises ValueError if one is also erased."""
    gone = {_plain(phrase) for phrase in erased}
    kept = dict.fromkeys([*preserve, *(text for concept in concepts for text in concept.keep)])
    for text in kept:
        if _plain(text) in gone:
            raise ValueError(f"{text!r} is both erased and preserved. Remove it from one of the two.")
    return tuple(kept)


class Texts:
    """Texts as the pipeline encodes them, each once, in batches that fit into memory. Refuses texts that the encoder
    cannot read.

    Args:
        pipe: the pipeline.
        texts: the texts.
        read: the weights that read them. None: keys and values of cross-attention.
        batch: the number of texts that are encoded together.
    """

    def __init__(
        self, pipe: DiffusionPipeline, texts: Sequence[str], read: Mapping[str, Tensor] | None = None, batch: int = 64
    ) -> None:
        unique = list(dict.fromkeys(texts))
        check_phrases(pipe, unique)
        self._rows: dict[str, Tensor] = {}
        self._last: dict[str, int] = {}
        self._pooled: dict[str, Tensor] = {}
        for k in range(0, len(unique), batch):
            encoded = encode(pipe, unique[k : k + batch])
            self._rows |= zip(unique[k : k + batch], encoded.text.cpu(), strict=True)
            self._last |= {t: max(own.stop - 1, 0) for t, own in zip(unique[k : k + batch], encoded.own, strict=True)}
            if encoded.pooled is not None:
                self._pooled |= zip(unique[k : k + batch], encoded.pooled.cpu(), strict=True)
        made, widths = encoded.text.shape[-1], {w.shape[1] for w in (read or keys_values(pipe)).values()}
        if widths != {made}:
            raise ValueError(
                f"Expected keys and values that read the encoded text (width {made}), got width "
                f"{', '.join(map(str, sorted(widths)))} in this {type(pipe).__name__}, which projects the text first. "
                "Use a run-time eraser, such as EIUP."
            )

    def rows(self, text: str) -> Tensor:
        """All positions of a text, [L, D] in float64."""
        return self._rows[text].double()

    def pooled(self, texts: Iterable[str]) -> Tensor:
        """The pooled vectors of these texts, [N, P] in float64."""
        return torch.stack([self._pooled[text].double() for text in texts])

    def last(self, text: str) -> int:
        """The position of the last own token; of the start token for the empty text."""
        return self._last[text]

    def aligned(self, text: str, aims: Sequence[str], tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """The edited rows [N, D] of a text, and as many of each of the other texts."""
        if tokens == "all":
            return self.rows(text), [self.rows(aim) for aim in aims]
        starts = [self.last(each) for each in (text, *aims)]
        length = 1 if tokens == "last" else len(self.rows(text)) - max(starts)
        found = zip((text, *aims), starts, strict=True)
        rows, *towards = (self.rows(each)[start : start + length] for each, start in found)
        return rows, towards

    def gram(self, texts: Sequence[str], last: bool = False) -> Tensor:
        """P^T P [D, D] over the rows of all these texts, or over their last tokens."""
        width = next(iter(self._rows.values())).shape[1]
        gram = torch.zeros(width, width, dtype=torch.float64)
        for k in range(0, len(texts), 16):
            rows = [self.rows(t)[self.last(t)][None] if last else self.rows(t) for t in texts[k : k + 16]]
            gram.addmm_(torch.cat(rows).T, torch.cat(rows))
        return gram


# ---------------------------------------------------------------- algebra


def step(concept: Tensor, anchor: Tensor, gram: Tensor, erase_scale: float, lam: float) -> tuple[Tensor, Tensor]:
    """T - I = a (G - C)^T C K^-1 as factors [D, R], [R, D], R <= N and R <= D, with K = a C^T C + `gram` + lam I."""
    k = torch.addmm(gram, concept.T, concept, alpha=erase_scale)
    k.diagonal().add_(lam)
    moved = (anchor != concept).any(1)
    moved[:1] |= not moved.any()  # an edit without effect is still an edit
    rows, root = concept[moved], torch.linalg.cholesky(k)
    left = erase_scale * (anchor[moved] - rows).T
    if len(rows) > len(k):  # D rows suffice
        return torch.cholesky_solve(rows.T @ left.T, root).T, torch.eye(len(k), dtype=k.dtype)
    return left, torch.cholesky_solve(rows.T, root).T


def layered(
    weights: Mapping[str, Tensor],
    phrases: Sequence[tuple[Tensor, Sequence[Tensor]]],
    shifts: Sequence[float],
    gram: Tensor,
    erase_scale: float,
    lam: float,
) -> dict[str, Change]:
    """The change of each weight W [C, D] towards W c + sum_j s_j (||W C^T|| / ||W A_j^T||) W a_j, with the K of `step`.

    `phrases`: per phrase, its rows C [N, D] and those of every attribute, A_j [N, D].
    """
    concept = torch.cat([rows for rows, _ in phrases])
    k = torch.addmm(gram, concept.T, concept, alpha=erase_scale)
    k.diagonal().add_(lam)
    right = torch.cholesky_solve(concept.T, torch.linalg.cholesky(k)).T
    made: dict[str, Change] = {}
    for name, weight in weights.items():
        w, columns = weight.detach().cpu().double().T, []
        for rows, towards in phrases:
            size = (rows @ w).norm()
            parts = (s * size / (toward @ w).norm() * toward for s, toward in zip(shifts, towards, strict=True))
            columns.append(torch.stack(list(parts)).sum(0).T)
        made |= changes({name: weight}, erase_scale * torch.cat(columns, 1), right)
    return made


def compact(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product [D, R] [R, D] with R <= D."""
    n, width = right.shape
    return (left @ right, torch.eye(width, dtype=right.dtype)) if n > width else (left, right)


def residual(left: Tensor, right: Tensor, concept: Tensor, anchor: Tensor) -> float:
    """||T c - g|| / ||c - g||: 0 if the edit is complete, 1 if it has no effect."""
    moved = concept + (concept @ right.T) @ left.T
    return float((moved - anchor).norm() / (concept - anchor).norm().clamp_min(torch.finfo(torch.float64).tiny))


def condition(concept: Tensor, gram: Tensor, erase_scale: float, lam: float) -> float:
    """An upper bound of the condition number of K, by power iteration (its smallest eigenvalue is at least lam)."""
    x = torch.ones(len(gram), dtype=gram.dtype)
    for _ in range(30):
        x = erase_scale * (concept.T @ (concept @ x)) + gram @ x
        largest, x = float(x.norm()), x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    return 1 + largest / lam


def changes(weights: Mapping[str, Tensor], left: Tensor, right: Tensor) -> dict[str, Change]:
    """W (T - I) for every W [C, D], in float32: the exact factors, or one tensor if that is smaller."""
    n, width = right.shape
    whole: Tensor | None = None
    found: dict[str, Change] = {}
    for name, weight in weights.items():
        w = weight.detach().cpu()
        if n * (len(w) + width) <= w.numel():
            found[name] = Factors((w.double() @ left).float(), right.float())
            continue
        whole = left @ right if whole is None else whole
        precise = torch.promote_types(w.dtype, torch.float32)
        found[name] = (w.to(precise) @ whole.to(precise)).float()
    return found
