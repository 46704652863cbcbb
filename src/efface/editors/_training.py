"""The training of ESD, SDD and CCRT: shared fields, the loop, and its checkpoints.

Most of the time goes into guided trajectories up to a random step, which yield the network's inputs during drawing. One
trajectory serves `reuse` updates, at different steps.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Generator, Tensor, nn

from .. import files, progress
from .._weights import digest
from ..core import Concept, Detector, check_pictures
from ..delta import Delta
from ..delta.base import base_of, own_values
from ._denoiser import Denoiser, Points, Weights
from ._settings import Training

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

EVERY = 20  # updates between checkpoints, at least
DRAWN = 0.3  # the smallest share of pictures with a concept that a model can teach
LOOK, LOOK_IMAGES = 50, 16  # updates between judgements by the detector, pictures per judgement


# ---------------------------------------------------------------- checkpoints


class State:
    """The state of a fit for checkpoints: student, average, AdamW, random numbers, step, losses."""

    def __init__(self, net: Denoiser, run: Training, ema: float | None, seed: int, streams: Sequence[str]) -> None:
        self.student = net.student()
        self.average = None if ema is None else {n: w.detach().clone() for n, w in self.student.items()}
        lr, decay = cast("float", run.lr), run.weight_decay
        self.adam = torch.optim.AdamW(net.groups(self.student), lr=lr, weight_decay=decay)
        self.rng = {name: Generator().manual_seed(seed + k) for k, name in enumerate(streams)}
        self.losses: list[float] = []
        self.done = False

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def shipped(self) -> dict[str, Tensor]:
        return self.student if self.average is None else self.average

    def info(self) -> dict[str, Any]:
        """The facts of a fit for its delta: updates, and the mean loss of the first and the last tenth of them."""
        tenth = max(1, self.step // 10)
        first, last = (sum(part) / tenth if part else None for part in (self.losses[:tenth], self.losses[-tenth:]))
        return {"steps": self.step, "loss": [first, last]}

    def check(self) -> None:
        if not all(bool(w.isfinite().all()) for w in self.student.values()):
            raise RuntimeError(f"The weights are not finite after {self.step} updates. Lower `lr`, or clip gradients.")

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes a checkpoint atomically."""
        tensors = {f"student/{n}": w.detach() for n, w in self.student.items()}
        tensors |= {f"average/{n}": w for n, w in (self.average or {}).items()}
        for name, w in self.student.items():
            tensors |= {f"adam/{key}/{name}": value for key, value in self.adam.state.get(w, {}).items()}
        tensors |= {f"rng/{name}": rng.get_state() for name, rng in self.rng.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"fit": json.dumps(identity, sort_keys=True), "done": json.dumps(self.done)}
        files.write_tensors(path, tensors, header)

    def load(self, path: Path, identity: Mapping[str, Any]) -> None:
        from .. import schema

        away = "Move it away to start the fit again."
        said, tensors = files.read_tensors(path, away)
        header = {name: files.json_of(said.get(name, "null"), f"`{name}` in {path}", away) for name in ("fit", "done")}
        schema.check(header, schema.Checkpoint, path, away)
        cure = "Move it away, or run the command that started it."
        same = {f"student/{name}" for name in self.student} == {name for name in tensors if name.startswith("student/")}
        earlier = EARLIER | {"biases": identity.get("biases") if same else True}
        theirs = {name: value for name, value in earlier.items() if name in identity} | header["fit"]
        files.check_same(theirs, identity, f"{path} is the checkpoint of another fit", cure)
        try:
            self._take(header["done"], tensors)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged checkpoint ({error}). {away}") from error

    def _take(self, done: bool, tensors: dict[str, Tensor]) -> None:
        self.done, self.losses = done, tensors.pop("losses").tolist()
        with torch.no_grad():
            for name, w in self.student.items():
                w.copy_(tensors[f"student/{name}"])
                if self.average is not None:
                    self.average[name].copy_(tensors[f"average/{name}"])
                kept = {k: tensors[f"adam/{k}/{name}"] for k in ADAM if f"adam/{k}/{name}" in tensors}
                if kept:
                    self.adam.state[w] = {k: v if k == "step" else v.to(w.device) for k, v in kept.items()}
        for name, rng in self.rng.items():
            rng.set_state(tensors[f"rng/{name}"])


ADAM = ("step", "exp_avg", "exp_avg_sq")
EARLIER = {"drawn_by": "student", "search_guidance": 1.0}
"""The field values of fits with older checkpoints."""


# ---------------------------------------------------------------- the detector


def unobserved(pipe: DiffusionPipeline) -> Any:
    """A shallow copy of the pipeline for drawing, which leaves scheduler and progress bar of the user's unchanged."""
    shadow = copy.copy(pipe)
    own = {"scheduler": copy.deepcopy(pipe.scheduler), "safety_checker": None}
    vars(shadow).update({**own, "_progress_bar_config": {"disable": True}})
    return shadow


def look(
    pipe: DiffusionPipeline, net: Denoiser, detector: Detector, texts: Sequence[str]
) -> Callable[[Weights], float]:
    """The share of 16 pictures of `texts` in which the detector's worse judge sees the concept, with given weights."""
    shown = [texts[k % len(texts)] for k in range(LOOK_IMAGES)]

    def share(weights: Weights) -> float:
        shadow = unobserved(pipe)
        rng = [Generator().manual_seed(seed) for seed in range(LOOK_IMAGES)]
        change = net.change(weights)
        with Delta(change, method="training", base=base_of(own_values(pipe, change))).apply(pipe):
            images = shadow(shown, generator=rng, num_inference_steps=25, output_type="pt").images
        return float(detector(check_pictures(images)).float().mean(-1).max())

    return share


def check_drawn(
    pipe: DiffusionPipeline, concepts: Sequence[Concept], detector: Detector | Mapping[str, Detector]
) -> None:
    """Raises ValueError if the model draws a concept in less than `DRAWN` of 16 pictures of its phrases.

    Args:
        detector: of the only concept, or one per concept by name. All its judges must see the concept.
    """
    eyes = detector if isinstance(detector, Mapping) else dict.fromkeys((c.name for c in concepts), detector)
    if lost := [c.name for c in concepts if c.name not in eyes or (len(concepts) > 1 and eyes is not detector)]:
        raise ValueError(f"Expected a detector for each concept by name, got none for {lost[0]!r}. Give a mapping.")
    shadow = unobserved(pipe)
    for concept in concepts:
        prompts = [concept.phrases[k % len(concept.phrases)] for k in range(LOOK_IMAGES)]
        rng = [Generator().manual_seed(seed) for seed in range(LOOK_IMAGES)]
        with torch.no_grad():
            images = shadow(prompts, generator=rng, num_inference_steps=25, output_type="pt").images
        share = float(eyes[concept.name](check_pictures(images)).all(0).float().mean())
        if share < DRAWN:
            raise ValueError(
                f"The detector sees {concept.name!r} in {share:.0%} of {LOOK_IMAGES} pictures of its phrases, less "
                f"than {DRAWN:.0%}, so these pictures cannot teach it. Give phrases that the model draws."
            )


# ---------------------------------------------------------------- the loop


def run(
    net: Denoiser,
    settings: Training,
    draw: Callable[[Weights, int, Generator], Points],
    loss: Callable[[Weights, Points, Mapping[str, Generator]], Tensor],
    *,
    seed: int,
    name: str,
    identity: Mapping[str, Any],
    ema: float | None = None,
    streams: Sequence[str] = ("points",),
    checkpoint: str | Path | None = None,
    look: Callable[[Weights], float] | None = None,
    below: float = 0.0,
) -> State:
    """Fits the student.

    Args:
        net: the denoiser.
        settings: resolved settings.
        draw: returns `reuse * batch` points for the updates from this step on, drawn with the shipped weights.
        loss: the student's mean loss on some points.
        seed: seed of the random numbers.
        name: the name on the progress bar.
        identity: facts that a checkpoint must match.
        ema: the decay of the running average. None: no average; the student is shipped.
        streams: names of the random streams. The first draws points; the loss may use the others.
        checkpoint: a safetensors file. If it exists, the fit continues from it.
        look: returns the share of pictures with the concept, every 50 updates. The fit ends once it is at most `below`.

    Raises:
        ValueError: the checkpoint belongs to another fit.
        RuntimeError: the loss is not finite. The last checkpoint stays.
    """
    state = State(net, settings, ema, seed, streams)
    path = None if checkpoint is None else Path(checkpoint)
    identity = {**identity, "seed": seed, "base": digest(net.base)} if path else {}
    if path and path.exists():
        state.load(path, identity)
    saved = looked = state.step
    with _evaluating(net.module), _progress(name, settings.steps or 0, state) as show:
        while state.step < (settings.steps or 0) and not state.done:
            points = draw(state.shipped, state.step, state.rng[streams[0]])
            for batch in points.parts(len(points) // (settings.batch or 1)):
                if state.step < (settings.steps or 0):
                    _update(state, settings, batch, loss, ema, path)
                    show(len(batch))
            if look and state.step // LOOK > looked // LOOK:
                state.done, looked = look(state.shipped) <= below, state.step
            if path and (state.step - saved >= EVERY or state.step >= (settings.steps or 0) or state.done):
                state.check()
                state.save(path, identity)
                saved = state.step
    state.check()
    return state


def _update(state: State, settings: Training, batch: Points, loss: Any, ema: float | None, path: Path | None) -> None:
    state.adam.zero_grad()
    total = 0.0
    for points in batch.parts(settings.accumulate):
        value = loss(state.student, points, state.rng) * (len(points) / len(batch))
        if not value.requires_grad:
            raise RuntimeError(
                "The loss does not depend on the trained weights, because gradients are off within it. Remove "
                "`torch.no_grad()` and `.detach()` from the loss."
            )
        value.backward()
        total += float(value.detach())
    if not math.isfinite(total):
        kept = f"the last checkpoint is in {path}" if path and path.exists() else "there is no checkpoint yet"
        raise RuntimeError(
            f"The loss is {total} in update {state.step + 1} at lr {settings.lr:g}; {kept}. Lower `lr` or set `clip`."
        )
    if settings.clip:
        nn.utils.clip_grad_norm_(state.student.values(), settings.clip)
    state.adam.step()
    with torch.no_grad():
        for name, average in (state.average or {}).items():
            average.lerp_(state.student[name], 1 - (ema or 0.0))
    state.losses.append(total)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Disables dropout, and restores the mode of every submodule."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def _metered() -> Iterator[Any]:
    """The listener to progress. Without one, a bar if stderr is a terminal, and otherwise None."""
    with contextlib.ExitStack() as ends:
        meter = progress.current()
        if meter is None and sys.stderr.isatty():
            meter = progress.Meter(ends.enter_context(progress.bar()))
        yield meter


@contextlib.contextmanager
def telling(name: str) -> Iterator[Callable[[int, int], None]]:
    """Reports how many parts of a task are done, of how many."""
    with _metered() as meter:

        def tell(done: int, total: int) -> None:
            if meter is not None:
                meter(name, done, total, "")

        yield tell


@contextlib.contextmanager
def _progress(name: str, total: int, state: State) -> Iterator[Callable[[int], None]]:
    """Reports the updates with loss and images per second. Without a listener, shows a bar if stderr is a terminal."""
    began, images = time.perf_counter(), 0
    with _metered() as meter:

        def show(n: int) -> None:
            nonlocal images
            images += n
            rate, loss = images / (time.perf_counter() - began), sum(state.losses[-20:]) / len(state.losses[-20:])
            if meter is not None:
                meter(name, state.step, total, f"loss {loss:.4g}, {rate:.1f} images/s")

        yield show
