"""Tiny random pipelines of all families, complete with tokenizers, text models, denoiser, VAE and scheduler.

With default random weights, attention would be uniform and all texts alike. So the token embeddings and the query, key
and value projections are scaled until the words of a prompt change the picture. Each family is one file of this
package, found automatically.

A family's file has:

- `BUILDERS`: name -> a function that builds a pipeline.
- `EACH`: the names of the pipelines on which every method is tested.
- `PIPELINES` and `options`, if its pipelines need further arguments in a call: their classes, and a function that adds
  the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch

from ...registry import near

FILES: list[ModuleType] = [
    import_module(f"{__name__}.{found.name}")
    for found in sorted(iter_modules(__path__), key=lambda each: each.name)
    if found.name != "parts"
]
BUILDERS: dict[str, Callable[[], Any]] = {name: make for file in FILES for name, make in file.BUILDERS.items()}
FAMILIES: tuple[str, ...] = tuple(name for file in FILES for name in file.EACH)


def pipeline(family: str = "sd1") -> Any:
    """Builds a tiny pipeline. The weights are random, with a fixed seed.

    Args:
        family: one of `FAMILIES`, or a variant of one, such as "sd35".

    Returns:
        A diffusers pipeline. Its tokenizers know the words "a", "at", "the", "of", "and", "night", "pub", "cat",
        "dog", "beer", "wine", "glass", "red", "big" and "moon".

    Raises:
        ValueError: the family is unknown.

    Example:
        >>> import efface.testing
        >>> type(efface.testing.pipeline("sd1")).__name__
        'StableDiffusionPipeline'
    """
    if family not in BUILDERS:
        hint = near(str(family), BUILDERS)
        raise ValueError(
            f"There is no tiny pipeline {family!r}. {hint}{' ' if hint else ''}Use one of {', '.join(BUILDERS)}."
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_options(pipe: Any, options: dict[str, Any], prompts: int) -> dict[str, Any]:
    """The arguments of a call with `prompts` prompts, including those that the family's pipelines need."""
    for file in FILES:
        if isinstance(pipe, getattr(file, "PIPELINES", ())):
            options = file.options(pipe, options, prompts)
    return options
