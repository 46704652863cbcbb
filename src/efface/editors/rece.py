"""RECE: rounds of UCE, each against an embedding that still recovers the concept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from .._weights import keys_values, learning
from ..core import Concept, Concepts, as_concepts
from ..delta import Change, Delta, dense
from ..delta.factors import added, scaled
from ..families import check
from ..fields import Converted
from ..registry import name_of
from ._closed_form import (
    Texts,
    Tokens,
    anchors_of,
    changes,
    compact,
    condition,
    kept_texts,
    residual,
    step,
)
from ._settings import FamilyDefaults
from .uce import UCE

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["RECE"]


@dataclass(frozen=True)
class RECE(FamilyDefaults):
    """Edits as UCE, then finds embeddings that the edited model still reads as the concept, and edits these, in rounds.

    With T_0 the change of UCE (all layers: W = W_0 T), S = sum W_0^T W_0 over all keys and values, and c [D] each token
    of the concept, in the original text encoding:

        derive:  c' = argmin_x  sum ||W_0 T_k x - W_0 c||^2 + mu ||x||^2 = (mu I + T_k^T S T_k)^-1 T_k^T S c
        erase:   T_k+1 = T_k (I + (G - C')^T C' K^-1)                      K = C'^T C' + b P^T P + lam I

    Only the last T changes the layers, with one pair of factors each. With `uce`, the rounds start at weights W_1 that
    UCE edited. Then S is sum W_1^T W_1, T_0 = I, and the right side has sum W_1^T W_0 instead of S.

    Paper: C. Gong, K. Chen, Z. Wei, J. Chen, Y.-G. Jiang, 2024, "Reliable and Efficient Concept Erasure of
    Text-to-Image Diffusion Models", ECCV, arXiv 2407.12383. There are no equation numbers, because the formulas follow
    its public code.

    Differs: the form without layers is Efface's, and equals the code's sums over layers. The initial UCE uses the
    rounds' `preserve_scale` and `lam`, as in the authors' README; the file names of their checkpoints say 1 and 0.5.
    `fit` returns the last round. The authors choose a round by a detector, for which `on_epoch_end` exists. It does not
    preserve their 1,734 artists unless you give them. Of their penalties it has only that on ||c'||.

    The text encoder of `emoji` is bidirectional, so every position of a phrase resembles every prompt. The paper's `mu`
    and `lam` damage unrelated pictures there. The defaults for `emoji` come from tuning seeds
    (`results/editors_tuning.json`).

    Args:
        mu: > 0, penalises large c'. Far above the "mean eigenvalue" of S in `info`, the rounds have no effect. 0.1 or
            0.001 in the paper, for SD 1.4. None: 0.1, and 1 on `emoji`.
        rounds: >= 0 pairs of derive and erase; 0 is UCE. None: 3, and 1 on `emoji`.
        tokens: the tokens that the initial UCE edits, see `UCE`. The rounds edit every position.
        preserve: texts to preserve, in addition to each concept's `keep`. Include the empty text: it holds the start
            token, which all prompts share.
        preserve_scale: b > 0, per erased phrase, as in the code; 0.1 in the paper.
        lam: > 0; 0.1 in the paper. None: 0.1, and 100 on `emoji`.
        uce: the initial UCE edit, as in the authors' runs: a delta from `UCE.fit`, or its file, for the same model,
            concepts and anchors. The result holds both edits. None: fits UCE first.

    Shapes: S, T [D, D]; c, c', g [N, D], one row per position of each phrase.

    Raises:
        ValueError: an option is out of range; `uce` has another editor, mode, model or other concepts; its file is not
            a delta; otherwise as `UCE`.
        FileNotFoundError: the file of `uce` does not exist.
        TypeError: `uce` is neither a delta nor a path.

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
    """Family -> the default values; "" for all other families."""

    mu: float | None = None
    rounds: int | None = None
    tokens: Tokens | None = None
    preserve: tuple[str, ...] = ("",)
    preserve_scale: float = 0.1
    lam: float | None = None
    uce: Converted[Delta | str | Path | None, Delta | None] = Converted(None)

    def __post_init__(self) -> None:
        checks.each(self, checks.number, "mu", "lam", "preserve_scale", least=0, above=True)
        checks.each(self, checks.whole, "rounds", least=0)
        object.__setattr__(self, "preserve", UCE(tokens=self.tokens, preserve=self.preserve).preserve)  # checks both
        if self.uce is None:
            return
        given: Any = self.uce
        if not isinstance(given, (Delta, str, Path)):
            raise TypeError(f"Expected `uce` to be a delta or its file, got {str(given)[:80]!r}. Fit one with UCE.")
        uce = given if isinstance(given, Delta) else Delta.load(given)
        if uce.method != "uce" or uce.fields.get("mode") == "debias" or uce.after:
            got = f"{uce.method!r} (mode {uce.fields.get('mode')!r}){' on top of others' if uce.after else ''}"
            raise ValueError(
                f"Expected `uce` to be an erasure that UCE fitted on the base model, got a delta of {got}. Fit one "
                "with UCE, or leave `uce` out."
            )
        if self.tokens is not None:
            raise ValueError(
                f"Expected `tokens` or `uce`, got both, {self.tokens!r} and a delta. Leave `tokens` out, because `uce` "
                "fixes the tokens."
            )
        object.__setattr__(self, "uce", uce)

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
        """The paper's settings for an artist's style. Give the concept the anchor "art"."""
        return cls(mu=1e-3, rounds=1, lam=0.1)

    @classmethod
    def hard_object(cls) -> RECE:
        """The paper's settings for objects with a high residual rate under UCE (church, garbage truck)."""
        return cls(mu=1e-3, rounds=1, lam=0.1)

    @classmethod
    def easy_object(cls) -> RECE:
        """The paper's settings for other objects."""
        return cls(mu=0.1, rounds=1, lam=0.1)

    def config(self) -> dict[str, Any]:
        """The fields for records, with the hash of `uce`."""
        fields = json.loads(json.dumps(asdict(replace(self, uce=None))))
        return {"method": name_of(type(self)), **fields, "uce": self.uce and self.uce.hash}

    def front(self, pipe: DiffusionPipeline) -> UCE:
        """The initial edit, if none is given."""
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
        """Returns the delta after the last round. Only reads `pipe`. Nothing is random; `seed` goes into the record.

        Args:
            pipe: the pipeline.
            concepts: the concepts to erase.
            seed: for the record.
            on_epoch_end: called with the round (UCE is 0) and the current delta. True ends the rounds.
        """
        check(self, pipe)
        method = self.resolved(pipe)
        mu, count, lam = method.mu or 0.0, method.rounds or 0, method.lam or 0.0
        wanted, weights = as_concepts(concepts), keys_values(pipe)
        given = method._given(pipe, wanted, weights)
        cross = None
        if given:  # the rounds continue from edited weights
            info, width = dict(method.uce.info) if method.uce else {}, next(iter(weights.values())).shape[1]
            left, right = (torch.zeros(shape, dtype=torch.float64) for shape in ((width, 0), (0, width)))
            plain = {name: weight.detach().cpu().double() for name, weight in weights.items()}
            weights = {name: w + dense(given[name]).double() if name in given else w for name, w in plain.items()}
            cross = sum_of_products(list(weights.values()), list(plain.values()))
        else:
            left, right, info = method.front(pipe).transform(pipe, wanted)
        info["rounds"] = []

        def delta() -> Delta:
            made = changes(weights, left, right)
            whole = {name: added(given[name], change) if name in given else change for name, change in made.items()}
            return Delta.fitted(method, pipe, whole, wanted, seed=seed, info=info)

        if count == 0 or (on_epoch_end and on_epoch_end(0, delta())):
            return delta()
        concept, anchor, gram = method._rows(pipe, wanted)
        s = sum_of_products(list(weights.values()), list(weights.values()))
        info["mean eigenvalue"] = float(s.trace()) / len(s)
        if mu > info["mean eigenvalue"]:
            checks.warn(
                f"`mu` is {mu:g}, far above the mean eigenvalue of this model's keys and values, "
                f"{info['mean eigenvalue']:g}, so the rounds have almost no effect. Give a smaller one."
            )
        steps = rounds(s, left, right, concept, anchor, gram, mu, lam, cross)
        for k, (left, right, note) in zip(range(1, count + 1), steps, strict=False):  # noqa: B007
            info["rounds"] = [*info["rounds"], note]
            if on_epoch_end and on_epoch_end(k, delta()):
                break
        return delta()

    def _given(
        self, pipe: DiffusionPipeline, concepts: Sequence[Concept], weights: Mapping[str, Tensor]
    ) -> dict[str, Change]:
        """The changes of `uce` at its strength; none without it. Raises ValueError if it does not match this fit."""
        uce = self.uce
        if uce is None:
            return {}
        uce.check(pipe)
        if others := sorted(uce.weights.keys() - weights.keys()):
            raise ValueError(
                f"Expected `uce` to change only keys and values of cross-attention, got a change of {others[0]!r}. Fit "
                "it with UCE on this pipeline."
            )
        anchor = "" if uce.fields.get("mode") == "moderate" else None
        ours, theirs = anchors_of(concepts), anchors_of(uce.concepts, anchor)
        if ours != theirs:
            odd = next(phrase for phrase in ours | theirs if ours.get(phrase) != theirs.get(phrase))
            it, now = (f"reads {odd!r} as {x[odd]!r}" if odd in x else f"has no {odd!r}" for x in (theirs, ours))
            raise ValueError(
                f"Expected `uce` to erase the same phrases towards the same anchors, but it {it}, and this fit {now}. "
                "Give the same concepts, or fit another UCE."
            )
        return {name: scaled(change, uce.strength) for name, change in uce.weights.items()}

    def _rows(self, pipe: DiffusionPipeline, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor, Tensor]:
        """Every position of the phrases and of their anchors [N, D], and b P^T P [D, D]."""
        anchors = anchors_of(concepts)
        kept = kept_texts(self.preserve, concepts, anchors)
        texts = Texts(pipe, [*anchors, *anchors.values(), *kept])
        phrases, targets = (
            torch.cat([texts.rows(text) for text in side]) for side in (anchors.keys(), anchors.values())
        )
        return phrases, targets, self.preserve_scale * len(anchors) * texts.gram(kept)


def sum_of_products(weights: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """sum V^T W [D, D] in float64, of weights V and W. Equal V and W give S."""
    s: Any = 0
    for weight, other in zip(weights, others, strict=True):
        s = torch.mm(weight.detach().cpu().double().T, other.detach().cpu().double()) + s
    return s


def derive(s: Tensor, left: Tensor, right: Tensor, concept: Tensor, mu: float, cross: Tensor | None = None) -> Tensor:
    """The embeddings that the edited model reads as the original reads `concept`: rows c' [N, D], with T = I + left
    right.

    `cross`: sum W_1^T W_0, if T edits weights W_1 that differ from the original.
    """
    ts = s + right.T @ (left.T @ s)  # T^T S
    k = ts + (ts @ left) @ right
    k = (k + k.T) / 2
    k.diagonal().add_(mu)
    wanted = ts if cross is None else cross + right.T @ (left.T @ cross)
    return torch.cholesky_solve(wanted @ concept.T, torch.linalg.cholesky(k)).T


def rounds(
    s: Tensor,
    left: Tensor,
    right: Tensor,
    concept: Tensor,
    anchor: Tensor,
    gram: Tensor,
    mu: float,
    lam: float,
    cross: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, dict[str, float]]]:
    """Yields T - I as factors after each round, endlessly, with facts. `gram` is b P^T P."""
    while True:
        derived = derive(s, left, right, concept, mu, cross)
        more_left, more_right = step(derived, anchor, gram, 1.0, lam)
        note = {
            "norm": float(derived.norm() / concept.norm()),
            "residual": residual(more_left, more_right, derived, anchor),
            "condition": condition(derived, gram, 1.0, lam),
        }
        more_left = more_left + left @ (right @ more_left)  # T (I + u v) = T + (T u) v
        left, right = compact(torch.cat([left, more_left], 1), torch.cat([right, more_right]))
        yield left, right, note
