"""The floor of a cosine score: its mean over wrong pairs."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import torch
from torch import Tensor

from efface.records import Score


def floor(name: str, images: Tensor, texts: Tensor, prompts: Sequence[str], protocol: str) -> Score:
    """Mean cosine of pictures [J, N, D] with the texts [N, D] of rows with other prompts. Uses the highest judge.

    This is the expectation under shuffled pairs, computed exactly. NaN if there is only one prompt.
    """
    names = {p: k for k, p in enumerate(dict.fromkeys(prompts))}
    which = torch.tensor([names[p] for p in prompts])
    wrong = which[:, None] != which
    if not wrong.any():
        return Score(name, nan, len(prompts), nan, nan, "cosine", None, f"{protocol}; there is one prompt only")
    values = torch.stack([(each @ texts.T)[wrong].double().mean() for each in images])
    value = float(values.max())
    return Score(name, value, len(prompts), nan, nan, "cosine", None, f"{protocol}; all wrong pairs, no sampling")
