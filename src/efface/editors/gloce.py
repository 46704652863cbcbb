"""GLoCE: blends the outputs of cross-attention into a low-rank surrogate, where a gate sees the concept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..core import Concept, Concepts, as_concepts
from ..delta import Steering
from ..delta.gates import Parts, gate_share
from ..families import family
from ._closed_form import anchors_of, kept_texts
from ._outputs import check_drawing, moments, read, surrogate, turns, wanted
from ._settings import FamilyDefaults

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["GLoCE"]

WINDOWS: dict[str, Any] = {"observed": (0.2, 0.4), "window": (0.2, 1.0)}  # published


@dataclass(frozen=True)
class GLoCE(FamilyDefaults):
    """Learns, per cross-attention layer and concept, a low-rank surrogate of the output and a gate that opens for it.

    x [D] is a token of a layer's output, after `to_out`. m_t, m_s, m_g are its means for the concept, its anchor and
    the preserved texts; V_t [R, D], V_s [S, D] are the first principal components for the concept and the anchor, and
    V_g [1, D] is the first eigenvector of cov_t + (m_t - m_g)(m_t - m_g)^T:

        x' = m_s + V_s^T V_s (I - V_t^T V_t)(x - m_t)
        r  = |V_g unit(x - m_g)|^2,   k = sigmoid(slope (r - centre))
        x <- x + strength k (x' - x)                    for the concept with the largest k

    centre is the mean of the largest r of each preserved picture, plus `threshold` times their standard deviation;
    slope = ln 99 / (0.001 threshold), so k is nearly a step. Where k = 0 the output stays unchanged. With k = 1 for all
    tokens, the edit would merge into `to_out`: the gate is the method.

    Paper: B. H. Lee, S. Lim, S. Y. Chun, 2025, "Localized Concept Erasure for Text-to-Image Diffusion Models Using
    Training-Free Gated Low-Rank Adaptation", CVPR, arXiv 2503.12356. There are no equation numbers, because the source
    was a description of the authors' code.

    Differs: only conditional rows are edited and measured; the code also edits the unconditional ones. The code counts
    denoiser calls and resets at the 51st, so other numbers of steps shift its window over pictures; here the windows
    are fractions of the steps. The code finds the preserved names among the nearest of a list; here you name them. m_g
    is the mean over the preserved texts, which the description leaves open.

    Limits: the surrogate is a constant plus a few components, so tokens with an open gate lose their details. The gate
    is measured on the preserved texts only. This implementation has not been measured on a large model.

    Args:
        preserve: texts whose outputs close the gate, in addition to each concept's `keep`; code: the nearest names.
        threshold: > 0, standard deviations above the preserved pictures' largest r; code: 2.5 (celebrities), 1.5
            (explicit). None: the family's default.
        rank: R >= 1, components of the concept; code: 16.
        surrogate_rank: S >= 1, components of the anchor; code: 2.
        pictures: pictures per text, >= 2; code: 3, or 8 (explicit).
        sampler_steps: steps of each picture; code: 50. None: the family's default.
        guidance: guidance scale of the pictures, >= 1; code: 7.5.
        observed: (start, end), the part of the steps that is measured; code: 0.2 to 0.4. None: the family's default.
        window: (start, end), the part of the steps with the edit; code: from 0.2. None: the family's default.
        batch: pictures per pipeline call.

    Shapes: x [B, Q, D], r and k [B, Q]; per layer two matrices [D, S] and [S, D], four vectors [D] and two numbers.

    Raises:
        ValueError: a field is out of range. On `fit`: a concept has neither `preserve` nor `keep`, equals its anchor or
            a preserved text; the pipeline has no cross-attention or has run-time erasers; or a text is over the
            encoder's limit.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> cat = efface.Concept("cat", anchor="a tree", keep=("a dog",))
        >>> steering = efface.GLoCE(pictures=2, sampler_steps=2).fit(pipe, cat)
        >>> with steering.apply(pipe):
        ...     image = pipe("a cat", num_inference_steps=2).images[0]
        >>> image.size
        (64, 64)
    """

    needs: ClassVar[tuple[str, ...]] = ("cross_text",)
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "emoji": {"threshold": 1.5, "sampler_steps": 10, "observed": (0.0, 1.0), "window": (0.0, 1.0)},
        "": {"threshold": 1.5, "sampler_steps": 50, **WINDOWS},
    }

    preserve: tuple[str, ...] = ()
    threshold: float | None = None
    rank: int = 16
    surrogate_rank: int = 2
    pictures: int = 3
    sampler_steps: int | None = None
    guidance: float = 7.5
    observed: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        checks.each(self, checks.texts, "preserve")
        checks.each(self, checks.window, "observed", "window")
        check_drawing(self)
        checks.each(self, checks.whole, "rank", "surrogate_rank")
        checks.each(self, checks.whole, "pictures", least=2)
        checks.each(self, checks.number, "threshold", least=0, above=True)

    @classmethod
    def celebrities(cls, preserve: Sequence[str] = ()) -> GLoCE:
        """The published settings for celebrities. `preserve`: the names of others."""
        return cls(preserve=tuple(preserve), threshold=2.5, pictures=3, sampler_steps=50, **WINDOWS)

    @classmethod
    def explicit(cls, preserve: Sequence[str] = ()) -> GLoCE:
        """The published settings for explicit content. `preserve`: texts of people, for example."""
        return cls(preserve=tuple(preserve), threshold=1.5, pictures=8, sampler_steps=50, **WINDOWS)

    def fit(self, pipe: DiffusionPipeline, concepts: Concepts, *, seed: int = 0) -> Steering:
        """Returns the steering that erases `concepts`. Only reads `pipe`.

        Args:
            pipe: the pipeline. Its deltas are part of the model.
            concepts: their phrases are drawn, their anchors, and their `keep`.
            seed: seed of the first picture of each kind.
        """
        method, found, prefix = self.resolved(pipe), as_concepts(concepts), family(pipe).denoiser
        anchors = anchors_of(found)
        kept = {concept: kept_texts(self.preserve, [concept], anchors) for concept in found}
        for concept in found:
            if not any(kept[concept]):
                raise ValueError(
                    f"Expected texts whose pictures close the gate of {checks.shown(concept.name)}, got none. Give "
                    "`preserve`, or the concept's `keep`: what resembles the concept and shall stay."
                )
        wanted(pipe, found, *filter(None, [*anchors.values(), *(text for some in kept.values() for text in some)]))
        vectors: dict[str, list[Tensor]] = {}
        opened: dict[str, list[float]] = {}
        for concept in found:
            parts, opened[concept.name] = method._learned(pipe, concept, kept[concept], seed)
            for name, each in parts.items():
                vectors.setdefault(f"{prefix}.{name}", []).append(each)
        made = {name: torch.stack(each) for name, each in vectors.items()}
        info = {"gate open, concept and preserved": opened, "preserved texts": [len(some) for some in kept.values()]}
        return Steering.fitted(method, pipe, made, found, seed=seed, info=info, form="surrogate", window=method.window)

    def _learned(
        self, pipe: DiffusionPipeline, concept: Concept, kept: Sequence[str], seed: int
    ) -> tuple[dict[str, Tensor], list[float]]:
        """The parts "module:part" of one concept, and the mean gate on its tokens and on preserved ones."""
        n, threshold = self.pictures * len(concept.phrases), self.threshold or 1.0
        groups = [turns(concept.phrases, n), [concept.anchor] * n, turns(kept, self.pictures * len(kept))]
        drawing: dict[str, Any] = {"steps": self.sampler_steps or 1, "guidance": self.guidance, "batch": self.batch}
        drawing |= {"window": self.observed}

        def shares(texts: Sequence[str], parts: Mapping[str, Parts]) -> dict[str, dict[int, list[Tensor]]]:
            """r by module and picture."""
            seen: dict[str, dict[int, list[Tensor]]] = {}

            def see(module: str, _: float, out: Tensor, which: Sequence[int]) -> None:
                part = {name: each.to(out) for name, each in parts[module].items()}
                for i, share in zip(which, gate_share(out, part), strict=True):
                    seen.setdefault(module, {}).setdefault(i, []).append(share.double().cpu())

            read(pipe, texts, see, seeds=range(seed, seed + len(texts)), **drawing)
            return seen

        some = [moments(pipe, texts, seeds=range(seed, seed + len(texts)), **drawing) for texts in groups]
        target, anchor, general = some
        ranks = self.rank, self.surrogate_rank
        found = {m: surrogate(target[m], anchor[m], general[m], *ranks) for m in target}
        own, others, opened = shares(groups[0], found), shares(groups[2], found), []
        for module, part in found.items():
            largest = torch.stack([torch.cat(each).max() for each in others[module].values()])
            part["centre"] = largest.mean() + threshold * largest.std(correction=0)
            part["slope"] = torch.tensor(math.log(99) / (0.001 * threshold), dtype=torch.float64)
            rs = [torch.cat([torch.cat(each) for each in by[module].values()]) for by in (own, others)]
            opened.append([float(torch.sigmoid(part["slope"] * (r - part["centre"])).mean()) for r in rs])
        means = [sum(each) / len(opened) for each in zip(*opened, strict=True)]
        if means[0] < 1e-3:
            checks.warn(
                f"The gate of {checks.shown(concept.name)} opens for {means[0]:.2%} of its own tokens, so little will "
                "be erased. Preserve texts that resemble the concept less, or lower `threshold`."
            )
        return {f"{module}:{name}": each for module, part in found.items() for name, each in part.items()}, means
