"""What a cosine is worth: the mean over pairs that do not belong together."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from efface.records import Score


def floor(name: str, images: Tensor, texts: Tensor, prompts: Sequence[str], protocol: str) -> Score:
    """Mean cosine of pictures [J, N, D] with the texts [N, D] of rows that have another prompt, by the highest judge.

    This is what shuffling the pairs gives on average, so no shuffle is drawn. NaN if there is one prompt only.
    """
    names = {p: k for k, p in enumerate(dict.fromkeys(prompts))}
    which = torch.tensor([names[p] for p in prompts])
    wrong = which[:, None] != which
    if not wrong.any():
        return Score(name, nan, len(prompts), nan, nan, "cosine", None, f"{protocol}; there is one prompt only")
    values = torch.stack([(each @ texts.T)[wrong].double().mean() for each in images])
    value = float(values.max())
    return Score(name, value, len(prompts), nan, nan, "cosine", None, f"{protocol}; all wrong pairs, no sampling")
