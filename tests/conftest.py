"""Shared tiny pipelines. A test may hook and unhook them, but has to leave them as they were: that is checked."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import efface.api  # noqa: F401 - tests name it, whichever of them runs alone
from efface.delta import active

SHARE = 3  # of a thinned test, CI takes one case of three, and the fast run every other one of these
MANY = 4 * SHARE


@pytest.hookimpl(tryfirst=True)  # before `-m` leaves tests out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks combinations of parameters as `slow` or `long`.

    A test with `thinned` is slow for most combinations: `make test-slow` tries them all. CI takes a combination if the
    sum of its places is a multiple of three, so each value of a parameter meets a third of the values of every other
    one, and another third in the next test. The fast run takes half of those. Of a test with `thinned("long")`, CI
    takes all combinations, and the fast run a sixth. Of fewer than twelve combinations the fast run takes a third, and
    of fewer than three all.
    """
    sizes = Counter(_test(item) for item in items)
    places: dict[tuple[str, str], dict[str, int]] = {}  # of a test's parameter: each value and its place
    for item in items:
        callspec = getattr(item, "callspec", None)
        mark = item.get_closest_marker("thinned")
        test = _test(item)
        if callspec is None or mark is None or sizes[test] < SHARE:
            continue
        promise = places.setdefault(("", ""), {}).setdefault(test, len(places[("", "")]))
        for name, value in callspec.params.items():
            seen = places.setdefault((test, name), {})
            promise += seen.setdefault(repr(value), len(seen))
        if promise % SHARE:
            item.add_marker(getattr(pytest.mark, *(mark.args or ("slow",))))
        elif sizes[test] >= MANY and promise % (2 * SHARE):
            item.add_marker(pytest.mark.long)


def _test(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


METHODS = ("check_inputs", "encode_prompt", "progress_bar", "maybe_free_model_hooks", "save_pretrained")


def traces(pipe: Any) -> set[str]:
    """What an eraser could leave on a pipeline."""
    found = {name for name in METHODS if name in vars(pipe)}
    found |= {f"delta of {delta.method}" for delta in active(pipe)}
    for part in ("unet", "transformer", "vae", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules() if hasattr(pipe, part) else ():
            kept = [trace for trace in ("_diffusers_hook", "forward") if trace in vars(module)]
            if part != "text_encoder":  # where transformers has hooks of its own
                kept += [trace for trace in ("_forward_hooks", "_forward_pre_hooks") if getattr(module, trace)]
            found |= {f"{part}.{name}.{trace}" for trace in kept}
    return found


@contextlib.contextmanager
def modules_of(folder: Path) -> Iterator[None]:
    """Modules of a recipe can be imported by name; afterwards another recipe may have modules of these names."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == folder:
                del sys.modules[name]


@functools.cache
def shared(family: str) -> tuple[Any, set[str]]:
    pipe = tiny.pipeline(family)
    tiny.latents(pipe)
    # transformers puts hooks of its own on a text encoder that is asked for its hidden states
    for encoder in filter(None, (pipe.text_encoder, getattr(pipe, "text_encoder_2", None))):
        encoder(torch.tensor([[0, 1]]), output_hidden_states=True)
    return pipe, traces(pipe)


def lend(family: str) -> Iterator[Any]:
    pipe, before = shared(family)
    yield pipe
    left = traces(pipe) - before
    if left:
        shared.cache_clear()  # do not let one failure make others
    assert left == set()


@pytest.fixture
def sd1() -> Iterator[Any]:
    yield from lend("sd1")


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pipe(family: str) -> Iterator[Any]:
    """A pipeline of each family in turn."""
    yield from lend(family)


@pytest.fixture
def eraser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A parameter of the eraser tests; its adapter, if it has one, is for the test's model."""
    family = request.getfixturevalue("family") if "family" in request.fixturenames else "sd1"
    tiny.steps_for(monkeypatch, request.param)
    return tiny.fitted(request.param, tiny.untouched(family))
