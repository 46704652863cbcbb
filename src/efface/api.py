"""The main functions for users: `erase`, `stack`, `active`, and the shipped concepts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checks, registry
from .core import (
    Concept,
    Concepts,
    Eraser,
    Handle,
    Handles,
    check_eraser,
    concept,
    shipped_concepts,
)
from .pipelines import cut_off as cut_off
from .pipelines import draw as draw
from .pipelines import load as load
from .pipelines import model_hash as model_hash

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .delta import Delta, Directions, Steering, Tokens

__all__ = [
    "active",
    "build",
    "concept",
    "concepts",
    "conditional_rows",
    "editor",
    "erase",
    "load_delta",
    "stack",
]


def concepts() -> dict[str, Concept]:
    """The shipped concepts by name, as a copy.

    Example:
        >>> import efface
        >>> "nudity" in efface.concepts()
        True
    """
    return dict(shipped_concepts())


def build(method: str, concepts: Concepts, /, **fields: Any) -> Any:
    """Builds the eraser `method`, or a preset of it ("sld.strong"), for `concepts`.

    Raises:
        ValueError: the method, preset or field is unknown (the message has near matches), or a field is out of range.
        TypeError: `method` is not a text.
    """
    name, preset = registry.split(method)
    cls = _checked(name, "erasers", fields)
    return (_preset(cls, name, preset) if preset else cls)(concepts, **fields)


def editor(method: str, /, **fields: Any) -> Any:
    """Builds the editor `method`, or a preset of it ("esd.paper"). Its `fit` returns a delta.

    Raises:
        ValueError: the method, preset or field is unknown (the message has near matches), a field is out of range, or a
            field that the preset needs is missing.
        TypeError: `method` is not a text.

    Example:
        >>> from efface import api
        >>> api.editor("esd.paper", steps=2).steps, api.editor("esd.paper").steps
        (2, 1000)
    """
    name, preset = registry.split(method)
    cls = _checked(name, "editors", fields)
    if not preset:
        return cls(**fields)
    make = _preset(cls, name, preset)
    takes = {n: p for n, p in inspect.signature(make).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    if missing := [n for n, p in takes.items() if p.default is p.empty and n not in fields]:
        needed = " and ".join(f"`{n}`" for n in missing)
        raise ValueError(
            f"Expected {needed} with the preset {method}, got none. Give it by --set, or by name in Python."
        )
    made = make(**{n: fields[n] for n in takes if n in fields})
    rest = {n: value for n, value in fields.items() if n not in takes}
    return dataclasses.replace(made, **rest) if rest else made


def _preset(cls: type, name: str, preset: str) -> Callable[..., Any]:
    known = registry.presets(cls)
    if preset not in known:
        hint, there = registry.near(preset, known), ", ".join(known) or "none"
        raise ValueError(
            f"{name} has no preset {checks.shown(preset)}. {hint}{' ' if hint else ''}Its presets: {there}."
        )
    return known[preset]


def _checked(method: str, room: str, fields: dict[str, Any]) -> type:
    cls = registry.resolve(method, room)
    if "concepts" in fields:
        raise ValueError(
            f"The concepts of {method} cannot be set as a field. Use --concept or --phrase, or the argument for "
            "concepts in Python."
        )
    checks.fields(method, cls, fields, hidden=("concepts",))
    return cls


def load_delta(path: str | Path) -> Delta | Directions | Steering | Tokens:
    """Loads a file that `efface fit`, or `save` of one of the four classes, wrote. See `Delta.load`."""
    from .delta import KINDS, file

    found: Delta | Directions | Steering | Tokens = file.load(path, KINDS)
    return found


def erase(pipe: DiffusionPipeline, concepts: Concepts, method: str = "eiup", **fields: Any) -> Handle:
    """Applies a run-time method to a pipeline, which then draws without the concepts.

    Args:
        pipe: a diffusers text-to-image pipeline.
        concepts: names of shipped concepts, `Concept` objects, or a sequence of them.
        method: an eraser's name from `efface list methods`. Write a preset after a dot: "sld.strong".
        fields: the method's own fields, such as `strength`.

    Returns:
        A handle: a context manager with `remove()` and settable `strength` and `rows`.

    Raises:
        ValueError: a concept, the method or a field is unknown, or a field is out of range.
        TypeError: the family of the pipeline is unknown, or `method` is not a text.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.erase(pipe, "alcohol", method="eiup"):
        ...     images = pipe("a night at the pub", num_inference_steps=2).images
        >>> len(images)
        1
    """
    eraser: Eraser = build(method, concepts, **fields)
    return eraser.apply(pipe)


def active(pipe: DiffusionPipeline) -> Handles:
    """The erasers on a pipeline: new words, run-time erasers in their order, then deltas. Prints as a table.

    Args:
        pipe: a diffusers text-to-image pipeline. A deep copy of a pipeline has separate copies of its erasers.

    Returns:
        The handles as one. `active(pipe).remove()` removes all; `active(pipe)[0].strength = 1.0` changes one.

    Raises:
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.EIUP("alcohol").apply(pipe):
        ...     print(efface.active(pipe))
        EIUP  strength 2.25  alcohol
    """
    from . import delta
    from .delta import words
    from .hooks.sites import handles

    run_time = handles(pipe)  # refuses what is no pipeline
    return Handles([*words.handles(pipe), *run_time, *delta.handles(pipe)])


@contextlib.contextmanager
def conditional_rows(pipe: DiffusionPipeline, rows: Sequence[bool]) -> Iterator[None]:
    """Declares which rows are conditional when code, such as an attack, calls the denoiser without the pipeline.

    Erasers need this declaration. In a pipeline call they learn it from `encode_prompt`; a wrong guess would leave
    pictures without erasure.

    Args:
        pipe: the pipeline whose denoiser is called.
        rows: one value per row of the denoiser call: True if it is conditional, False if it is unconditional. As in
            diffusers, unconditional rows come first.

    Raises:
        ValueError: there are no rows, or an unconditional row follows a conditional one.
        RuntimeError: a denoiser call has another number of rows.

    Example:
        >>> import efface, torch
        >>> pipe = efface.load("emoji")
        >>> text, empty = pipe.encode_prompt("a night at the pub", "cpu", 1, True)
        >>> latents = torch.randn(2, 8, 8, 8)
        >>> with efface.EIUP("alcohol").apply(pipe), efface.conditional_rows(pipe, [False, True]), torch.no_grad():
        ...     prediction = pipe.unet(latents, 500, torch.cat([empty, text])).sample
        >>> prediction.shape
        torch.Size([2, 8, 8, 8])
    """
    from .hooks.sites import rows_given

    given = [bool(row) for row in rows]
    if not given or given != sorted(given):
        raise ValueError(
            "Expected `rows` to be truth values, False for unconditional rows and then True for conditional ones, got "
            f"{given}. Put the unconditional rows first, as diffusers does."
        )
    with rows_given(pipe, given):
        yield


def stack(pipe: DiffusionPipeline, *erasers: Eraser) -> Handles:
    """Applies several erasers in order. If one fails, none stays applied.

    Args:
        pipe: a diffusers text-to-image pipeline.
        erasers: erasers such as `efface.EIUP("alcohol")`, or deltas.

    Returns:
        Their handles as one context manager with `remove()`. Each handle can also be removed separately.

    Raises:
        ValueError: an eraser does not fit the pipeline. The earlier ones are removed again.
        TypeError: an argument is not an eraser, or the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> with efface.stack(pipe, efface.EIUP("alcohol"), efface.EIUP("weapon")) as handles:
        ...     len(handles)
        2
    """
    for eraser in erasers:
        check_eraser(eraser)
    handles: list[Handle] = []
    try:
        for eraser in erasers:
            handles.append(eraser.apply(pipe))
    except BaseException:
        Handles(handles).remove()
        raise
    return Handles(handles)
