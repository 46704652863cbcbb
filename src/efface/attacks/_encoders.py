"""The states of a pipeline's text encoders, as the pipeline calls them, and what represents a whole text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .._condition import call_settings
from .._text import encode_cut, encoder_of, read, readers
from ..families import family

Change = Callable[[str, Tensor, Any], Any]
"""Receives the tokenizer's name, `input_ids` [N, L] and the encoder's output; returns another output, or None."""


@contextlib.contextmanager
def on_encoders(pipe: Any, change: Change) -> Iterator[None]:
    """Inside the block, `change` sees every call of a text encoder."""
    hooks = []
    for name in readers(pipe):

        def call(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> Any:
            return change(name, args[0] if args else kwargs["input_ids"], out)

        hooks.append(encoder_of(pipe, name).register_forward_hook(call, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def outputs(pipe: Any, texts: Sequence[str], *, differentiable: bool = False) -> dict[str, tuple[Tensor, Any]]:
    """`input_ids` and output of every text encoder for texts, as in a pipeline call without erasers."""
    found: dict[str, tuple[Tensor, Any]] = {}
    with on_encoders(pipe, lambda name, ids, out: found.update({name: (ids, out)})):
        encode_cut(pipe, texts, call_settings(pipe), differentiable)
    return found


def summaries(pipe: Any, texts: Sequence[str], *, differentiable: bool = False) -> dict[str, Tensor]:
    """One vector per text and encoder: [N, D], by the tokenizer's name.

    A causal encoder's end token has seen the whole text, so its last state represents it (CLIP's pooled state before
    the projection). For other encoders it is the mean of the states of the text's own tokens.
    """
    facts, found = family(pipe), {}
    for name, (ids, out) in outputs(pipe, texts, differentiable=differentiable).items():
        vectors, both = [], name in facts.bidirectional
        for row, states, text in zip(ids.tolist(), _states(out), texts, strict=True):
            seen = read(pipe, text, name, **call_settings(pipe))
            own = seen.ids[seen.own.start : seen.own.stop if both else seen.last + 1]
            first = _last_place(row, own)
            vectors.append(states[first : first + len(own)].mean(0) if both else states[first + len(own) - 1])
        found[name] = torch.stack(vectors).float()
    return found


def _last_place(row: list[int], own: list[int]) -> int:
    """Where a text's tokens last begin among those that its encoder read: templates and padding surround them."""
    for first in range(len(row) - len(own), -1, -1):
        if row[first : first + len(own)] == own:
            return first
    raise ValueError(
        f"Expected the tokens {checks.shown(own)} of a text among those that its encoder reads, got others. Write a "
        "shorter text, or one that the pipeline does not clean."
    )


def _states(out: Any) -> Tensor:
    """The states [N, L, D] of an encoder's last layer. Language models return them among those of all layers."""
    states: Tensor = out.hidden_states[-1] if not hasattr(out, "last_hidden_state") else out.last_hidden_state
    return states
