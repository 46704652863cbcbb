"""RECE: rounds of UCE, each against the embedding that would still bring the concept back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._weights import keys_values, learning
from ..core import Concept, Concepts, as_concepts
from ..delta import Delta
from ..families import check, filled
from ._closed_form import Texts, anchors_of, changes, check_positive, compact, condition, kept_texts, residual, step
from .uce import UCE, Tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["RECE"]


@dataclass(frozen=True)
class RECE:
    """Edits as UCE does, then finds what the edited model still reads as the concept, and edits that too, in rounds.

    With T_0 the change of UCE (all layers: W = W_0 T), S = sum W_0^T W_0 over all keys and values, and c [D] each token
    of the concept, in the original text encoding:

        derive:  c' = argmin_x  sum ||W_0 T_k x - W_0 c||^2 + mu ||x||^2 = (mu I + T_k^T S T_k)^-1 T_k^T S c
        erase:   T_k+1 = T_k (I + (G - C')^T C' K^-1)                      K = C'^T C' + b P^T P + lam I

    Only the last T touches the layers, as one pair of factors each.

    Paper: C. Gong, K. Chen, Z. Wei, J. Chen, Y.-G. Jiang, 2024, "Reliable and Efficient Concept Erasure of
    Text-to-Image Diffusion Models", ECCV, arXiv 2407.12383. Equation numbers cannot be given: the paper's text could
    not be read, the formulas follow its public code.

    Differs: the form without layers is ours, and equal to the code's sums over layers. UCE in front of the rounds has
    `preserve_scale` and `lam` of the rounds, as the authors' README says, where the file names of their checkpoints say
    1 and 0.5. The last round is returned; the authors choose a round by a detector, which `on_epoch_end` allows. Their
    1,734 artists are not preserved unless you give them. Of their penalties only that on ||c'|| is here.

    On `emoji`, whose text encoder reads both ways, every position of every phrase holds something of every prompt: the
    paper's `mu` and `lam` there ruin unrelated pictures too. Its own values come from tuning seeds
    (`results/editors_tuning.json`).

    Args:
        mu: > 0, holds c' small; far above the "mean eigenvalue" of S in `info`, the rounds do nothing. 0.1 or 0.001 in
            the paper, for SD 1.4; None: 0.1, and 1 on `emoji`.
        rounds: >= 0 pairs of derive and erase; 0 is UCE. None: 3, and 1 on `emoji`.
        tokens: which tokens UCE edits in front, see `UCE`; the rounds edit every position.
        preserve: texts that must read as before, beside each concept's `keep`. The empty text holds the start token,
            which all prompts share: do not leave it out.
        preserve_scale: b > 0, once for each erased phrase, as in the code; 0.1 in the paper.
        lam: > 0; 0.1 in the paper. None: 0.1, and 100 on `emoji`.

    Shapes: S, T [D, D]; c, c', g [N, D], one row for each position of each phrase.

    Raises:
        ValueError: an option out of range; otherwise as `UCE`.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> delta = efface.RECE(rounds=1).fit(pipe, "weapon")
        >>> len(delta.info["rounds"])
        1
    """

    needs: ClassVar[tuple[str, ...]] = ("text_weights",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"mu": 1.0, "rounds": 1, "lam": 100.0},
        "": {"mu": 0.1, "rounds": 3, "lam": 0.1},
    }
    """Family -> the values that None stands for; "" for families not named."""

    mu: float | None = None
    rounds: int | None = None
    tokens: Tokens | None = None
    preserve: tuple[str, ...] = ("",)
    preserve_scale: float = 0.1
    lam: float | None = None

    def __post_init__(self) -> None:
        for name in ("mu", "lam"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_positive("preserve_scale", self.preserve_scale)
        if self.rounds is not None and (type(self.rounds) is not int or self.rounds < 0):
            raise ValueError(f"Expected `rounds` to be a whole number >= 0, but got {self.rounds!r}.")
        object.__setattr__(self, "preserve", UCE(tokens=self.tokens, preserve=self.preserve).preserve)  # checks both

    @classmethod
    def nudity(cls) -> RECE:
        """The paper's settings for nudity."""
        return cls(mu=0.1, rounds=3, lam=0.1)

    @classmethod
    def unsafe(cls) -> RECE:
        """The paper's settings for a list of unsafe words."""
        return cls(mu=0.1, rounds=2, lam=0.1)

    @classmethod
    def style(cls) -> RECE:
        """The paper's settings for an artist's style; give the concept the anchor "art"."""
        return cls(mu=1e-3, rounds=1, lam=0.1)

    @classmethod
    def hard_object(cls) -> RECE:
        """The paper's settings for objects that UCE leaves in many pictures (church, garbage truck)."""
        return cls(mu=1e-3, rounds=1, lam=0.1)

    @classmethod
    def easy_object(cls) -> RECE:
        """The paper's settings for other objects."""
        return cls(mu=0.1, rounds=1, lam=0.1)

    def resolved(self, pipe: DiffusionPipeline) -> RECE:
        """The same with the family's values where a field is None."""
        found: RECE = filled(self, pipe)
        return found

    def uce(self, pipe: DiffusionPipeline) -> UCE:
        """The edit in front of the rounds."""
        lam = self.resolved(pipe).lam
        return UCE(tokens=self.tokens, preserve=self.preserve, preserve_scale=self.preserve_scale, lam=lam or 0.0)

    @learning()
    def fit(
        self,
        pipe: DiffusionPipeline,
        concepts: Concepts,
        *,
        seed: int = 0,
        on_epoch_end: Callable[[int, Delta], bool | None] | None = None,
    ) -> Delta:
        """The delta after the last round. `pipe` is only read; nothing is random, `seed` goes into the record.

        Args:
            pipe: the pipeline.
            concepts: what to erase.
            seed: for the record.
            on_epoch_end: called with the round (UCE is 0) and the delta so far; True ends the rounds there.
        """
        check(self, pipe)
        method = self.resolved(pipe)
        mu, count, lam = method.mu or 0.0, method.rounds or 0, method.lam or 0.0
        wanted, weights = as_concepts(concepts), keys_values(pipe)
        left, right, info = method.uce(pipe).transform(pipe, wanted)
        info["rounds"] = []

        def delta() -> Delta:
            return Delta.fitted(method, pipe, changes(weights, left, right), wanted, seed=seed, info=info)

        if count == 0 or (on_epoch_end and on_epoch_end(0, delta())):
            return delta()
        concept, anchor, gram = method._rows(pipe, wanted)
        s = sum_of_squares(list(weights.values()))
        info["mean eigenvalue"] = float(s.trace()) / len(s)
        if mu > info["mean eigenvalue"]:
            checks.warn(
                f"`mu` is {mu:g}, but the mean eigenvalue of this model's keys and values is "
                f"{info['mean eigenvalue']:g}, so the rounds do next to nothing. Give a smaller one."
            )
        steps = rounds(s, left, right, concept, anchor, gram, mu, lam)
        for k, (left, right, note) in zip(range(1, count + 1), steps, strict=False):  # noqa: B007
            info["rounds"] = [*info["rounds"], note]
            if on_epoch_end and on_epoch_end(k, delta()):
                break
        return delta()

    def _rows(self, pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor, Tensor]:
        """Every position of the phrases and of their anchors [N, D], and b P^T P [D, D]."""
        anchors = anchors_of(concepts)
        kept = kept_texts(self.preserve, concepts, anchors)
        texts = Texts(pipe, [*anchors, *anchors.values(), *kept])
        phrases, targets = (
            torch.cat([texts.rows(text) for text in side]) for side in (anchors.keys(), anchors.values())
        )
        return phrases, targets, self.preserve_scale * len(anchors) * texts.gram(kept)


def sum_of_squares(weights: Sequence[Tensor]) -> Tensor:
    """S = sum W^T W [D, D] in float64."""
    s: Any = 0
    for weight in weights:
        w = weight.detach().cpu().double()
        s = torch.mm(w.T, w) + s
    return s


def derive(s: Tensor, left: Tensor, right: Tensor, concept: Tensor, mu: float) -> Tensor:
    """What the edited model reads as the original reads `concept`: rows c' [N, D], with T = I + left right."""
    ts = s + right.T @ (left.T @ s)  # T^T S
    k = ts + (ts @ left) @ right
    k = (k + k.T) / 2
    k.diagonal().add_(mu)
    return torch.cholesky_solve(ts @ concept.T, torch.linalg.cholesky(k)).T


def rounds(
    s: Tensor, left: Tensor, right: Tensor, concept: Tensor, anchor: Tensor, gram: Tensor, mu: float, lam: float
) -> Iterator[tuple[Tensor, Tensor, dict[str, float]]]:
    """T - I as factors after each round, without end, and what is worth knowing; `gram` is b P^T P."""
    while True:
        derived = derive(s, left, right, concept, mu)
        more_left, more_right = step(derived, anchor, gram, 1.0, lam)
        note = {
            "norm": float(derived.norm() / concept.norm()),
            "residual": residual(more_left, more_right, derived, anchor),
            "condition": condition(derived, gram, 1.0, lam),
        }
        more_left = more_left + left @ (right @ more_left)  # T (I + u v) = T + (T u) v
        left, right = compact(torch.cat([left, more_left], 1), torch.cat([right, more_right]))
        yield left, right, note
