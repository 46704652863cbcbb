"""The direction of a concept in the text encoders: the mean difference of texts with it and without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._condition import call_settings
from .._text import encode_cut, fits
from ..core import Concept
from ..families import family
from ._encoders import on_encoders, outputs

Pairs = Sequence[tuple[str, str]]
Shift = dict[str, tuple[Tensor, dict[str, Tensor]]]
"""By the tokenizer's name: the prompt's `input_ids` [L], and a direction for every output of its encoder."""

SCENES = ("a picture", "a drawing on a white background", "a close view", "a person at home")


def default_pairs(concept: Concept) -> tuple[tuple[str, str], ...]:
    """Every phrase of the concept in every scene, with the scene alone."""
    return tuple((f"{scene} with {phrase}", scene) for phrase in concept.phrases for scene in SCENES)


def pair(value: Any) -> tuple[str, str]:
    """A text with the concept and one without it."""
    given = checks.texts("pairs", value)
    if len(given) != 2:
        cure = 'Write for example ("a man with a hat", "a man").'
        raise ValueError(checks.refusal("`pairs` of two texts, with and without the concept", value, cure))
    return given[0], given[1]


def check_length(pipe: Any) -> None:
    """Raises ValueError if the length of encoded texts varies, so that they have no common place in the encoder."""
    if not family(pipe).padded_to_limit:
        raise ValueError(
            f"Expected encoded texts of one length, got a pipeline of {family(pipe).name}, which pads to the longest "
            "text. Use an attack that does not compare encoded texts, such as gcg."
        )


def check_fit(pipe: Any, texts: Sequence[str]) -> None:
    """Raises ValueError if an encoder would cut one of the texts."""
    for text in texts:
        if not fits(pipe, text):
            raise ValueError(
                f"Expected `pairs` that fit the text encoder, but {checks.shown(text)} does not. Give shorter texts."
            )


# ---------------------------------------------------------------- what the denoiser reads


@torch.no_grad()
def encoded(pipe: Any, texts: Sequence[str]) -> Tensor:
    """The encoded texts with their pooled states, as vectors [N, F]. Erasers do not act."""
    text, pooled, _ = encode_cut(pipe, texts, call_settings(pipe), differentiable=False)
    parts = [text.float().flatten(1)] + ([] if pooled is None else [pooled.float()])
    return torch.cat(parts, 1)


def goals(pipe: Any, prompt: str, pairs: Pairs, eta: float) -> Tensor:
    """y = tau(P) + eta c, as a vector [F]."""
    made = encoded(pipe, [prompt, *(text for each in pairs for text in each)])
    return made[0] + eta * (made[1::2] - made[2::2]).mean(0)


# ---------------------------------------------------------------- inside the encoders


def directions(pipe: Any, prompt: str, pairs: Pairs) -> Shift:
    """The direction of every output of every encoder."""
    found: Shift = {}
    for name, (ids, out) in outputs(pipe, [prompt, *(text for each in pairs for text in each)]).items():
        parts = {key: (each[1::2] - each[2::2]).float().mean(0) for key, each in _tensors(out)}
        found[name] = ids[0], parts
    return found


@contextlib.contextmanager
def shifted(pipe: Any, shift: Shift, by: float) -> Iterator[Any]:
    """Inside the block, the encoders' outputs for the prompt are moved along the direction.

    Raises:
        ValueError: after the block, an encoder did not read the prompt.
    """
    waiting = set(shift)

    def change(name: str, ids: Tensor, out: Any) -> Any:
        prompt, parts = shift[name]
        if ids.shape[-1] != len(prompt):
            return None
        rows = (ids == prompt.to(ids.device)).all(-1)
        if rows.any():
            waiting.discard(name)
        moved = {}
        for key, each in _tensors(out):
            there = rows.reshape(-1, *[1] * (each.ndim - 1))
            moved[key] = torch.where(there, each + by * parts[key].to(each), each)
        return type(out)(**_together(out, moved))

    with on_encoders(pipe, change):
        yield pipe
    if waiting:
        raise ValueError(
            f"Expected a call of the pipeline with the attack's prompt, but its {min(waiting)} read other texts, so "
            "nothing was moved. Call it with that prompt, and with the arguments that it was encoded with."
        )


def _tensors(out: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an encoder's output, by name; those of a tuple have numbers."""
    for key, value in out.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, tuple):
            yield from ((f"{key}.{k}", each) for k, each in enumerate(value) if isinstance(each, Tensor))


def _together(out: Any, moved: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of an encoder's output with other tensors."""
    return {
        key: tuple(moved.get(f"{key}.{k}", each) for k, each in enumerate(value))
        if isinstance(value, tuple)
        else moved.get(key, value)
        for key, value in out.items()
    }
