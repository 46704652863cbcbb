"""How well pictures match their prompts. The base model and wrong prompts give the range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch

from efface.detectors._encoders import encoder
from efface.records import Sample, Score

from ._samples import batches, chosen, paired
from ._similarity import floor
from ._stats import mean, too_few

__all__ = ["ClipScore"]


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """Mean raw cosine between a picture and its prompt. Published tables often show 100 times this value.

        clip_score       = mean_i < E_I(G'(p_i)), E_T(p_i) >
        clip_score.floor = mean over all pairs of rows with different prompts

    `clip_score.base` is the score of the base model's pictures. Values of different encoders are not comparable.

    Paper: Hessel, Holtzman, Forbes, Le Bras, Choi 2021, "CLIPScore", arXiv 2104.08718.

    Differs: not scaled by 2.5, and not clipped at 0. NaN with fewer than 10 prompts.

    Args:
        encoder: "emoji" (its detectors, aligned to sentences), or the folder or hub id of a CLIP model.
        kinds: kinds of rows to take; () = all.

    Example:
        >>> from efface.metrics.clip_score import ClipScore
        >>> ClipScore(encoder="openai/clip-vit-large-patch14")([])
        []
    """

    name: ClassVar[str] = "clip_score"
    unit: ClassVar[str] = "cosine"
    higher_is_better: ClassVar[bool | None] = True
    encoder: str = "emoji"
    kinds: tuple[str, ...] = ("benign",)

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """The score, the base model's score if `base` is given, and the floor; by the judge with the lower mean."""
        group = chosen(samples, lambda row: not self.kinds or row.kind in self.kinds)
        if not group:
            return []
        judge = encoder(self.encoder)
        if few := too_few(group, self.name, self.unit, True, judge.name):
            return few
        prompts = [s.row.prompt for s in group]
        texts = judge.texts(prompts)
        sides = {"": group} | ({".base": paired(group, base, self.name)} if base is not None else {})
        scores = []
        for side, pictures in sides.items():
            images = torch.cat([judge.images(x) for x in batches(pictures)], 1)
            fit = (images * texts).sum(-1)
            scores.append(
                mean(f"clip_score{side}", fit, group, unit="cosine", higher_is_better=True, protocol=judge.name)
            )
            if not side:
                scores.append(floor("clip_score.floor", images, texts, prompts, judge.name))
        return scores
