"""Facts on a pipeline's parts for families: names, classes, and tokenised texts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Reading(NamedTuple):
    """A text as a text encoder reads it.

    `ids` are the tokens whose states the pipeline uses, without padding. `own` marks the text's own tokens among them.
    `dropped` is the number of leading tokens that the pipeline adds before the encoder and removes after it.
    `padded_before` says that padding precedes the tokens.
    """

    ids: list[int]
    own: slice
    dropped: int = 0
    padded_before: bool = False

    @property
    def last(self) -> int:
        """The token whose state covers the whole text in a causal encoder: the end token, or the last own token."""
        return min(int(self.own.stop), len(self.ids) - 1)


def _same(out: Any) -> Any:
    return out


class Adapted(NamedTuple):
    """A denoiser call as one for which texts and latents are tensors, unconditional rows first.

    Args:
        forward: takes `arguments` and returns such an output.
        arguments: of the call, by name.
        restored: returns the output as the denoiser would.
        turned: puts the rows of a tensor inside the denoiser into this order, and back; None if they are.
    """

    forward: Callable[..., Any]
    arguments: dict[str, Any]
    restored: Callable[[Any], Any] = _same
    turned: Callable[[Tensor], Tensor] | None = None


def encoder_name(tokenizer: str) -> str:
    """The pipeline's attribute for the text encoder of a tokenizer."""
    return tokenizer.replace("tokenizer", "text_encoder")


def between(ids: list[int], empty: list[int]) -> slice:
    """A text's own tokens among `ids`, which a template surrounds as in `empty`, the ids of an empty text."""
    most = min(len(ids), len(empty))
    start = next((k for k in range(most) if ids[k] != empty[k]), most)
    end = next((k for k in range(most - start) if ids[-1 - k] != empty[-1 - k]), most - start)
    return slice(start, len(ids) - end)


def held(pipe: Any) -> dict[str, Any]:
    """The attributes of a pipeline object, including its components; faster than `components`."""
    return getattr(pipe, "__dict__", {})


def bare(part: Any) -> Any:
    """A component without the wrapper of `torch.compile`."""
    return getattr(part, "_orig_mod", part)


def class_names(part: Any) -> Iterator[str]:
    """The names of a component's class and its base classes."""
    return (kind.__name__ for kind in type(bare(part)).__mro__)


def is_kind(part: Any, beginning: str) -> bool:
    """Whether the name of a component's class, or of a base class, has this prefix."""
    return any(name.startswith(beginning) for name in class_names(part))


def tokenizer_of(pipe: Any, name: str) -> Any:
    """The pipeline's tokenizer, which may be part of a processor of texts and pictures."""
    found = getattr(pipe, name)
    return found.tokenizer if is_kind(found, "ProcessorMixin") else found


def video_argument(pipeline: Any) -> str:
    """The argument of a pipeline class for videos, such as "num_frames"; "" if it draws pictures."""
    taken = parameters(pipeline.__call__)
    return next((name for name in ("num_frames", "video_length", "video") if name in taken), "")


@functools.cache
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of a function, by name."""
    return inspect.signature(function).parameters


def encode_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's original `encode_prompt`."""
    return parameters(type(pipe).encode_prompt)
