"""What families ask of a pipeline's parts: names, classes, and how a text was read."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """How a text encoder reads a text.

    `ids` are the tokens whose states the pipeline keeps, without padding; `own` says which of them the text wrote
    itself; `dropped` is how many tokens the pipeline puts in front and takes away again behind the encoder.
    """

    ids: list[int]
    own: slice
    dropped: int = 0

    @property
    def last(self) -> int:
        """The token whose state a causal encoder made from the whole text: the end token, or the last of its own."""
        return min(int(self.own.stop), len(self.ids) - 1)


def encoder_name(tokenizer: str) -> str:
    """The pipeline's attribute for the text encoder that goes with a tokenizer."""
    return tokenizer.replace("tokenizer", "text_encoder")


def held(pipe: Any) -> dict[str, Any]:
    """What a pipeline object holds itself, its components among it; faster than its `components`."""
    return getattr(pipe, "__dict__", {})


def bare(part: Any) -> Any:
    """A component without what `torch.compile` wraps around it."""
    return getattr(part, "_orig_mod", part)


def class_names(part: Any) -> Iterator[str]:
    """The names of a component's class and of those that it is derived from."""
    return (kind.__name__ for kind in type(bare(part)).__mro__)


def is_kind(part: Any, beginning: str) -> bool:
    """Whether the name of one of a component's classes begins so."""
    return any(name.startswith(beginning) for name in class_names(part))


def video_argument(pipeline: Any) -> str:
    """The argument by which a class of pipelines draws videos, such as "num_frames"; "" if it draws pictures."""
    taken = parameters(pipeline.__call__)
    return next((name for name in ("num_frames", "video_length", "video") if name in taken), "")


@functools.cache
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function takes, by name."""
    return inspect.signature(function).parameters


def encode_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """What a pipeline's own `encode_prompt` takes."""
    return parameters(type(pipe).encode_prompt)
