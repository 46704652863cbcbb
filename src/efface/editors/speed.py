"""SPEED: changes the values that read the text, in closed form, inside the null space of the texts to preserve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Generator, Tensor

from .. import checks
from .._weights import keys_values, learning
from ..core import Concepts, as_concepts
from ..delta import Change, Delta
from ..families import family
from ._closed_form import Texts, Tokens, anchors_of, changes, kept_texts, residual
from ._settings import FamilyDefaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SPEED"]


@dataclass(frozen=True)
class SPEED(FamilyDefaults):
    """Changes the values of every cross-attention layer so that a concept reads as its anchor and others stay.

    With W [O, D] the values' weight of a layer, C, A [N, D] the tokens of the concepts and of their anchors, S = C^T C
    / N, E [M, D] the tokens of the texts to preserve, and K [4, D] the start token and three centres of the other
    tokens of the empty text:

        e is kept     if its influence |W (A - C)^T C (I + S)^-1 e| is above the mean of all e      (prior filtering)
        copies        e + g v, g ~ N(0, 1), v the direction that W reads least, filtered likewise   (augmentation)
        R = mean of e e^T over both,  P = projector on the eigenvectors of R with value < `threshold`
        U = orthonormal basis of P K^T,  Q = P - U U^T
        Delta = W (A - C)^T (C / N) Q (Q S Q + a I)^-1 Q

    Delta is the smallest change in the sense of |(W + Delta) C^T - W A^T|^2 / N + a |Delta|^2 that leaves what lies in
    the retained span and the tokens K unchanged: Delta e = 0 for e in the span of the eigenvectors outside P, and Delta
    K^T = 0. Its rank is at most N, and all concepts together cost one solution per layer.

    Paper: O. Li, Y. Wang, X. Hu, H. Jiang, T. Liang, Y. Hao, G. Ma, F. Feng, 2025, "SPEED: Scalable, Precise, and
    Efficient Concept Erasure for Diffusion Models", ICLR 2026, arXiv 2503.07392. There are no equation numbers, because
    the source was a description of the authors' code.

    Differs: the code computes Delta by inverting a product with K, which is rounding noise if K lies in the retained
    span; the form with U is equal where that inverse exists. Everything is float64. The code's soft constraint on K
    (its `lam`, 0.5 for nudity) is omitted: K never changes. The centres are found from the most distant tokens, without
    random numbers. The code's lists of celebrities, characters and artists are not part of Efface: name the texts in
    `preserve`. A concept's `keep` is preserved too. `tokens="all"` is Efface's, for text encoders that are not causal.

    Limits: only texts whose influence is above the mean are protected, so others may drift. `threshold` is an absolute
    number on the scale of |e|^2 and depends on the text encoder. SDXL's pooled text is not edited. This implementation
    has not been measured on a large model.

    Args:
        tokens: the edited tokens of a text. "last": its last own token, as in the code. "tail": from there to the end
            of the padding (the code's form for nudity, which begins after the start token). "all": every position.
            None: "last" for causal text encoders, "all" for others. Preserved texts use the last token for "last",
            otherwise all positions.
        preserve: texts to preserve, in addition to each concept's `keep`.
        weights: "values", as published, or "keys_values".
        threshold: > 0, the eigenvalue of R below which a direction may change; code: 0.1. None: 0.1, or 0.01 on
            `emoji`.
        scale: a > 0, the weight of the size of the change; code: 1 (`retain_scale`). None: 1, or 0.01 on `emoji`, whose
            tokens are shorter.
        filter: whether to filter and augment the preserved texts. False preserves each of them, as in the code for
            celebrities; then one solution serves all layers.
        copies: augmented copies per text, >= 0; code: 10.

    Shapes: W [O, D]; tokens [N, D], one row per edited position of each phrase.

    Raises:
        ValueError: a field is out of range, there is no concept, or a phrase equals its anchor or a preserved text. On
            `fit`: nothing may change, because the preserved texts fill the space; a phrase is over the encoder's limit;
            or the projections are fused or quantised.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.SPEED(preserve=("", "a dog", "a horse")).fit(pipe, efface.Concept("cat", anchor="animal"))
        >>> with delta.apply(pipe):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> delta.method
        'speed'
    """

    needs: ClassVar[tuple[str, ...]] = ("text_weights",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"threshold": 0.01, "scale": 0.01},
        "": {"threshold": 0.1, "scale": 1.0},
    }

    tokens: Tokens | None = None
    preserve: tuple[str, ...] = ("",)
    weights: Literal["values", "keys_values"] = "values"
    threshold: float | None = None
    scale: float | None = None
    filter: bool = True
    copies: int = 10

    def __post_init__(self) -> None:
        checks.choice("tokens", self.tokens, (*get_args(Tokens), None))
        checks.choice("weights", self.weights, ("values", "keys_values"))
        checks.choice("filter", self.filter, (True, False))
        checks.each(self, checks.texts, "preserve")
        checks.each(self, checks.number, "scale", "threshold", least=0, above=True)
        checks.each(self, checks.whole, "copies", least=0)

    @classmethod
    def celebrities(cls, preserve: Sequence[str] = ("",)) -> SPEED:
        """The published settings for celebrities: each text of `preserve` is protected. Anchor: "person"."""
        return cls(tokens="last", preserve=tuple(preserve), threshold=1e-4, scale=0.05, filter=False)

    @classmethod
    def nudity(cls) -> SPEED:
        """The published settings for nudity, with the hard constraint on the empty text."""
        return cls(tokens="tail", preserve=("",), scale=0.7)

    @learning()
    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Delta:
        """Returns the delta that edits `concepts`. Only reads `pipe`.

        Args:
            pipe: the pipeline.
            concepts: their phrases read as their anchors afterwards.
            seed: seed of the augmented copies.
        """
        method, wanted = self.resolved(pipe), as_concepts(concepts)
        tokens = self.tokens or ("last" if family(pipe).causal else "all")
        anchors = anchors_of(wanted)
        kept = kept_texts(self.preserve, wanted, anchors)
        texts = Texts(pipe, ["", *anchors, *anchors.values(), *kept])
        pairs = [texts.aligned(phrase, (anchor,), tokens) for phrase, anchor in anchors.items()]
        concept, anchor = torch.cat([rows for rows, _ in pairs]), torch.cat([toward for _, (toward,) in pairs])
        places = [slice(texts.last(t), texts.last(t) + 1) if tokens == "last" else slice(None) for t in kept]
        retained = torch.cat([texts.rows(t)[place] for t, place in zip(kept, places, strict=True)])
        edit = _Edit(concept, anchor, invariants(texts.rows("")), method.threshold or 0.0, method.scale or 0.0)
        read = keys_values(pipe)
        if self.weights == "values":
            read = {name: w for name, w in read.items() if name.endswith("to_v.weight")}
        made: dict[str, Change] = {}
        if not self.filter:
            made = changes(read, edit.left, edit.right(retained))
        else:
            random = torch.Generator().manual_seed(seed)
            for name, w in read.items():
                chosen = edit.chosen(w.detach().cpu().double(), retained, self.copies, random)
                made |= changes({name: w}, edit.left, edit.right(chosen))
        info: dict[str, Any] = {"tokens": tokens, "edited rows": len(concept), "preserved texts": len(kept)}
        rest = sum(edit.residuals) / len(edit.residuals)
        info |= {"free dimensions": min(edit.free), "residual": rest}
        if rest > 0.5:
            checks.warn(
                f"The edit is {1 - rest:.0%} complete, because the preserved texts leave {min(edit.free)} of "
                f"{concept.shape[1]} dimensions. Preserve fewer texts, or raise `threshold`."
            )
        return Delta.fitted(method, pipe, made, wanted, seed=seed, info=info)


class _Edit:
    """The algebra of one fit: T - I = left [D, N] right [N, D], with `right` for the retained tokens of a layer."""

    def __init__(self, concept: Tensor, anchor: Tensor, fixed: Tensor, threshold: float, scale: float) -> None:
        self.concept, self.anchor, self.fixed, self.threshold, self.scale = concept, anchor, fixed, threshold, scale
        self.left, self.gram = (anchor - concept).T, concept.T @ concept / len(concept)
        eye = torch.eye(len(self.gram), dtype=self.gram.dtype)
        self.prior = torch.linalg.solve(self.gram + eye, concept.T / len(concept), left=True).T  # C (I + S)^-1 / N
        self.free: list[int] = []  # dimensions that may change, and what is left to do, per solution
        self.residuals: list[float] = []

    def chosen(self, w: Tensor, retained: Tensor, copies: int, random: Generator) -> Tensor:
        """The retained tokens [M, D] that the edit of W would change most, and their augmented copies."""

        def influential(tokens: Tensor) -> Tensor:
            size = ((tokens @ self.prior.T) @ (w @ self.left).T).norm(dim=1)
            return tokens[size >= size.mean()]

        kept = influential(retained)
        least = torch.linalg.svd(w).Vh[-1]
        size = torch.randn(len(kept) * copies, 1, generator=random, dtype=w.dtype)
        return torch.cat([kept, influential(kept.repeat(copies, 1) + size * least)]) if copies else kept

    def right(self, retained: Tensor) -> Tensor:
        """C / N Q (Q S Q + a I)^-1 Q [N, D].

        Raises:
            ValueError: no dimension may change.
        """
        values, vectors = torch.linalg.eigh(retained.T @ retained / len(retained))
        free = vectors[:, values < self.threshold]  # an orthonormal basis of P
        within = free.T @ self.fixed.T
        u, sizes, _ = torch.linalg.svd(within, full_matrices=True)
        rank = int((sizes > 1e-9 * self.fixed.norm()).sum())
        basis = free @ u[:, rank:]  # of Q
        if not basis.shape[1]:
            raise ValueError(
                f"Expected preserved texts that leave a direction free, got {len(retained)} tokens that fill all "
                f"{len(values)} dimensions at threshold {self.threshold:g}. Preserve fewer texts, or raise `threshold`."
            )
        inner = self.concept @ basis  # [N, q]
        small = inner.T @ inner / len(inner) + self.scale * torch.eye(basis.shape[1], dtype=basis.dtype)
        right = torch.cholesky_solve(inner.T / len(inner), torch.linalg.cholesky(small)).T @ basis.T
        self.free.append(basis.shape[1])
        self.residuals.append(residual(self.left, right, self.concept, self.anchor))
        return right


def invariants(empty: Tensor, centres: int = 3) -> Tensor:
    """The start token and the centres of the other tokens of the empty text [L, D], as K [1 + centres, D]."""
    start, rest = empty[:1], empty[1:]
    chosen = [0]
    while len(chosen) < min(centres, len(rest)):
        chosen.append(int(torch.cdist(rest, rest[chosen]).amin(1).argmax()))
    found = rest[chosen]
    for _ in range(50):
        near = torch.cdist(rest, found).argmin(1)
        moved = torch.stack([rest[near == k].mean(0) if (near == k).any() else found[k] for k in range(len(found))])
        if torch.equal(moved, found):
            break
        found = moved
    return torch.cat([start, found])
