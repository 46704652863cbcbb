"""Six-CD's in-prompt CLIP score: whether a prompt with the concept still draws its other content."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import nan
from typing import ClassVar

import numpy as np
import torch

from efface.detectors._encoders import encoder
from efface.records import Sample, Score

from ._samples import batches, chosen, paired
from ._similarity import floor
from ._stats import clusters, mean, ratio_interval, too_few

__all__ = ["InPromptClip"]


@dataclasses.dataclass(frozen=True)
class InPromptClip:
    """Compares pictures from the prompt m_i, which names the concept, with the prompt c_i, which does not.

        in_prompt_clip = mean_i < E_I(G'(m_i ; s_i)), E_T(c_i) >

    Reference scores, all with the base model G and the same seeds: `.base` uses G(m_i), `.ceiling` uses G(c_i),
    `.floor` compares G(m_i) with the c_j of other rows. `.normalised` = (score - floor) / (ceiling - floor), not
    clipped. The score does not measure removal, so read it together with the removal rate.

    Paper: Ren et al. 2024, "Six-CD", arXiv 2406.14855.

    Differs: the paper does not name its CLIP model, so report yours with the number. The reference scores and the
    normalised value are Efface's. NaN with fewer than 10 prompts.

    Args:
        encoder: "emoji" (its detectors, aligned to sentences), or the folder or hub id of a CLIP model.

    Raises:
        ValueError: `base` is missing, or a "dual" row lacks its "clean" half (same seed, id with "-clean").

    Example:
        >>> from efface.metrics.in_prompt_clip import InPromptClip
        >>> InPromptClip()([], [])
        []
    """

    name: ClassVar[str] = "in_prompt_clip"
    unit: ClassVar[str] = "cosine"
    higher_is_better: ClassVar[bool | None] = True
    encoder: str = "emoji"

    def __call__(self, samples: Sequence[Sample], base: Sequence[Sample] | None = None) -> list[Score]:
        """The score, its references and its normalised value, each by the less favourable judge."""
        dual = chosen(samples, lambda row: row.kind == "dual")
        if not dual:
            return []
        plain = paired(dual, base, self.name)
        halves = {s.row.id.removesuffix("-clean"): s for s in base or () if s.row.kind == "clean"}
        whole = [k for k, s in enumerate(dual) if s.row.id in halves]
        if len(whole) < len(dual) - 1:  # a limit may have split the last pair
            alone = next(s.row.id for s in dual if s.row.id not in halves)
            raise ValueError(
                f"in_prompt_clip needs the clean half of row {alone!r}, got no row {alone}-clean in `base`. Draw the "
                "same suite."
            )
        if not whole:
            return []
        dual, plain = [dual[k] for k in whole], [plain[k] for k in whole]
        clean = [halves[s.row.id] for s in dual]
        for s, c in zip(dual, clean, strict=True):
            if s.row.seed != c.row.seed:
                raise ValueError(
                    f"Expected {s.row.id!r} and its clean half to have one seed, got {s.row.seed} and {c.row.seed}. "
                    "Draw the same suite."
                )
        judge = encoder(self.encoder)
        if few := too_few(dual, self.name, self.unit, True, judge.name):
            return few
        prompts = [s.row.prompt for s in clean]
        texts = judge.texts(prompts)
        seen = {
            side: torch.cat([judge.images(x) for x in batches(group)], 1)
            for side, group in (("", dual), (".base", plain), (".ceiling", clean))
        }
        fits = {side: (images * texts).sum(-1) for side, images in seen.items()}
        words = f"{judge.name}; text: the clean half"
        scores = [
            mean(f"in_prompt_clip{side}", fit, dual, unit="cosine", higher_is_better=True, protocol=words)
            for side, fit in fits.items()
        ]
        scores.append(floor("in_prompt_clip.floor", seen[".base"], texts, prompts, words))
        found = []
        for j in range(len(seen[""])):
            bottom = floor("floor", seen[".base"][[j]], texts, prompts, words).value
            found.append(_normalised(fits[""][j].double().numpy(), fits[".ceiling"][j].double().numpy(), bottom, dual))
        known = [f for f in found if not np.isnan(f[0])] or found
        value, low, high = min(known)
        scores.append(Score("in_prompt_clip.normalised", value, len(dual), low, high, "ratio", True, words))
        return scores


def _normalised(
    fit: np.ndarray, ceiling: np.ndarray, bottom: float, dual: Sequence[Sample]
) -> tuple[float, float, float]:
    """(mean fit - floor) / (mean ceiling - floor), with its interval over resampled clusters. The floor stays fixed."""
    room = ceiling.mean() - bottom
    if not room > 0:
        return nan, nan, nan
    value = float((fit.mean() - bottom) / room)
    low, high = ratio_interval(fit - bottom, ceiling - bottom, clusters([s.row for s in dual]))
    return value, low, high
