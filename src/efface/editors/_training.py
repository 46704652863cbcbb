"""Fine-tuning a denoiser, as ESD, SDD and CCRT need it.

The pipeline's own parameters are never written to: student and average are copies of the trained tensors, put in the
place of the pipeline's for the length of one call. So the frozen teacher is the pipeline itself, there is one network in
memory, and an exception or Ctrl-C leaves nothing behind.

Most of the time goes into trajectories, which show the network what it would see while it draws: a guided one is drawn
up to a random step. Here one trajectory gives `reuse` such points for each picture, at steps of their own.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.func import functional_call

from .._hooks import condition, part
from ..core import Concept, Concepts, Detector, as_concepts
from ..delta import Delta
from ..families import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Train = Literal["x", "x-strict", "u", "self", "full"]
Precision = Literal["auto", "float32", "bfloat16"]
Weights = Mapping[str, Tensor]  # canonical name -> tensor
HEADS = ("time_embedding.", "add_embedding.", "conv_norm_out.", "conv_out.")  # left alone by "u"
EVERY = 20  # updates between checkpoints, at least
LOOK, LOOK_IMAGES = 50, 16  # updates between looks of the detector, pictures in a look


# ---------------------------------------------------------------- which tensors


def trained(denoiser: nn.Module, train: str) -> list[str]:
    """Names of the denoiser's parameters that a mode trains.

    Raises:
        ValueError: an unknown mode, one that finds nothing here, or a LoRA in the way.
    """
    if train not in get_args(Train):
        raise ValueError(f"Expected `train` to be one of {', '.join(get_args(Train))}, but got {train!r}.")
    names = [name for name, _ in denoiser.named_parameters()]
    if any(".base_layer." in name or ".lora_" in name for name in names):
        raise ValueError("A LoRA is loaded: unload it (`pipe.unload_lora_weights()`) or fuse it before `fit`.")
    attention = [(f"{n}.", m.is_cross_attention) for n, m in denoiser.named_modules() if hasattr(m, "is_cross_attention")]
    cross, own = (tuple(n for n, is_cross in attention if is_cross == kind) for kind in (True, False))
    rules: dict[str, Callable[[str], bool]] = {
        "x": lambda name: name.startswith(cross),
        "x-strict": lambda name: name.startswith(cross) and name.endswith((".to_k.weight", ".to_v.weight")),
        "u": lambda name: not name.startswith((*cross, *HEADS)),
        "self": lambda name: name.startswith(own),
        "full": lambda name: True,
    }
    found = [name for name in names if rules[train](name)]
    if not found:
        raise ValueError(f"`train={train!r}` finds no parameters in this {type(denoiser).__name__}: use another mode.")
    return found


# ---------------------------------------------------------------- the denoiser


@dataclass(frozen=True)
class Points:
    """What the denoiser saw on trajectories, N rows: `x` [N, C, h, w], `t` [N], `prompt` [N], rows of the condition.

    `own` [N, C, h, w]: the conditional prediction there of the weights that drew the trajectory, if it was kept.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    own: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Points:
        return Points(self.x[rows], self.t[rows], self.prompt[rows], None if self.own is None else self.own[rows])

    def parts(self, n: int) -> list[Points]:
        """Cut into at most n parts of nearly equal length."""
        return [self[rows] for rows in torch.arange(len(self), device=self.x.device).chunk(n)]

    @classmethod
    def cat(cls, points: Sequence[Points]) -> Points:
        own = [p.own for p in points if p.own is not None]
        x, t, prompt = (torch.cat([getattr(p, name) for p in points]) for name in ("x", "t", "prompt"))
        return cls(x, t, prompt, torch.cat(own) if own else None)


class Denoiser:
    """A pipeline's denoiser with texts at hand, callable with other weights than its own.

    Args:
        pipe: the pipeline; nothing of it is changed.
        texts: row k of the condition is texts[k - 1]; row 0 is the unconditional one.
        train: which parameters may differ.
        sampler_steps: steps of a full trajectory of the pipeline's own scheduler.
        precision: "auto" follows the weights: float32 weights are trained in float32, half precision by bfloat16
            autocast with float32 copies of the trained tensors.

    Attributes:
        base: the pipeline's own trained tensors, by canonical name.
        rows: denoiser rows computed so far, the measure of cost.
    """

    def __init__(
        self, pipe: DiffusionPipeline, texts: Sequence[str], train: str, sampler_steps: int, precision: str = "auto"
    ) -> None:
        name = family(pipe).denoiser
        self.module, self.prefix = part(pipe, name), f"{name}."
        self.names = trained(self.module, train)
        parameters = dict(self.module.named_parameters())
        if any(p.is_meta or not p.is_floating_point() or p.element_size() < 2 for p in parameters.values()):
            raise ValueError("The denoiser is quantised or offloaded: load it in memory in float32, float16 or bfloat16.")
        config = self.module.config
        if config.in_channels != config.out_channels or config.get("time_cond_proj_dim") is not None:
            raise ValueError(
                "Expected a text-to-image denoiser with guidance, but this one is for inpainting or distilled to few "
                "steps: it has no unconditional prediction to train against."
            )
        self.base = {self.prefix + n: parameters[n].detach() for n in self.names}
        self.frozen = {n: p.detach() for n, p in parameters.items() if self.prefix + n not in self.base}
        self.device, own = pipe._execution_device, next(iter(parameters.values())).dtype
        self.amp = precision == "bfloat16" or (precision == "auto" and own in (torch.float16, torch.bfloat16))
        if self.amp and self.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("This device has no bfloat16: load the pipeline in float32 and use precision='float32'.")
        if not self.amp and own in (torch.float16, torch.bfloat16):
            raise ValueError(f"The pipeline is in {own}: use precision='bfloat16', or load it in float32.")
        self.dtype = torch.float32 if self.amp else own
        self.pipe, self.condition = pipe, condition(pipe, texts)
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.scheduler.set_timesteps(sampler_steps, device=self.device)
        size = config.sample_size
        self.shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.rows = 0

    def add(self, texts: Sequence[str]) -> Tensor:
        """Further texts; the rows of the condition that they get."""
        more, first = condition(self.pipe, texts), len(self.condition.text)
        added = {n: torch.cat([v, more.added[n][1:]]) for n, v in self.condition.added.items()}
        self.condition = replace(self.condition, text=torch.cat([self.condition.text, more.text[1:]]), added=added)
        return torch.arange(first, len(self.condition.text))

    def student(self) -> dict[str, Tensor]:
        """Copies of the trained tensors, in float32 under autocast, that ask for gradients."""
        return {n: w.to(self.dtype, copy=True).requires_grad_() for n, w in self.base.items()}

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w] of the pipeline, or with other trained weights; gradients reach only those."""
        self.rows += len(x)
        inner = {} if weights is None else {n.removeprefix(self.prefix): w for n, w in weights.items()}
        if torch.is_grad_enabled():
            inner = self.frozen | {n.removeprefix(self.prefix): w for n, w in self.base.items()} | inner
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            kwargs = {**self.condition.at(prompt), "return_dict": False}
            out = functional_call(self.module, inner, (x, t), kwargs, tie_weights=False)[0]
        return out.to(self.dtype)

    @torch.no_grad()
    def trajectory(
        self, prompt: Tensor, stops: Tensor, weights: Weights | None, guidance: float, rng: Generator, *,
        keep: bool = False, noise: Tensor | None = None,
    ) -> Points:
        """Draws [B] prompts from noise and returns what the denoiser sees after `stops` [M, B] steps: M * B points.

        With `keep` the conditional predictions there come along. `noise` [1 or B, C, h, w] is drawn if not given.
        Guidance 1 computes no unconditional rows.
        """
        scheduler, last = copy.deepcopy(self.scheduler), int(stops.max())
        extra = {"generator": rng} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if noise is None:
            noise = torch.randn(len(prompt), *self.shape, generator=rng)
        x = noise.to(self.device, self.dtype).expand(len(prompt), *self.shape) * scheduler.init_noise_sigma
        prompt, both = prompt.to(self.device), torch.cat([torch.zeros_like(prompt), prompt])
        found, own = x.new_empty(*stops.shape, *self.shape), x.new_empty(*stops.shape, *self.shape)
        for k, t in enumerate(scheduler.timesteps[: last + 1]):
            seen, here = scheduler.scale_model_input(x, t), (stops == k).to(self.device)
            found[here] = seen.expand_as(found)[here]
            if k == last and not keep:
                break
            if guidance == 1:
                guided = conditional = self(seen, t, prompt, weights)
            else:
                null, conditional = self(torch.cat([seen, seen]), t, both.to(self.device), weights).chunk(2)
                guided = null + guidance * (conditional - null)
            own[here] = conditional.expand_as(own)[here]
            x = scheduler.step(guided, t, x, return_dict=False, **extra)[0]
        times = scheduler.timesteps[stops.to(self.device)]
        points = Points(found, times, prompt.expand_as(times), own if keep else None)
        return Points(*(None if v is None else v.flatten(0, 1) for v in (points.x, points.t, points.prompt, points.own)))


    def change(self, weights: Weights) -> dict[str, Tensor]:
        """The difference from the pipeline's own weights."""
        return {name: w.detach() - self.base[name].to(w.dtype) for name, w in weights.items()}


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


# ---------------------------------------------------------------- how a fit is run


@dataclass(frozen=True)
class Training:
    """The fields that ESD, SDD and CCRT share; None takes the value that suits the pipeline's family.

    Args:
        train: which weights: "x" all of cross-attention, "x-strict" its keys and values only, "u" all but
            cross-attention, time embedding and output layers, "self" self-attention, "full" everything.
        steps: updates; 0 learns nothing.
        lr: of AdamW, constant.
        batch: points in an update.
        reuse: updates that one trajectory serves.
        accumulate: parts in which an update's batch is computed; the same update with less memory.
        sampler_steps: steps of a full trajectory.
        guidance: of the trajectories; 1 is none.
        weight_decay: of AdamW, towards zero.
        clip: largest norm of a gradient; 0 does not clip.
        precision: "float32", "bfloat16" (autocast, trained tensors in float32), or "auto" by the pipeline's own.
    """

    off: ClassVar[Mapping[str, Any] | None] = {"steps": 0}
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Family -> the values that None stands for; "" for families not named."""

    train: Train = "x"
    steps: int | None = None
    lr: float | None = None
    batch: int | None = None
    reuse: int | None = None
    accumulate: int = 1
    sampler_steps: int | None = None
    guidance: float = 3.0
    weight_decay: float = 0.0
    clip: float = 0.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        for name, choices in (("train", get_args(Train)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, but got {getattr(self, name)!r}.")
        for name, least in (("steps", 0), ("batch", 1), ("reuse", 1), ("accumulate", 1), ("sampler_steps", 1)):
            value = getattr(self, name)
            if (value is None and name != "accumulate") or (type(value) is int and value >= least):
                continue
            raise ValueError(f"Expected `{name}` to be an integer >= {least}, but got {value!r}.")
        for name in ("guidance", "weight_decay", "clip"):
            check_number(name, getattr(self, name))
        if self.lr is not None and not check_number("lr", self.lr) > 0:
            raise ValueError(f"Expected `lr` to be above 0, but got {self.lr!r}.")
        if self.guidance < 1:
            raise ValueError(f"Expected `guidance` to be at least 1 (no guidance), but got {self.guidance!r}.")

    def resolved(self, pipe: DiffusionPipeline) -> Self:
        """The same with the family's values where a field is None."""
        values = self.defaults.get(family(pipe).name, self.defaults.get("", {}))
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) is None})


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """ValueError unless a finite number within the bounds."""
    if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
        bounds = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"Expected `{name}` to be a number {bounds}, but got {value!r}.")
    return float(value)


def phrases(concepts: Concepts) -> tuple[tuple[Concept, ...], list[str]]:
    """The concepts, and the texts that evoke them, each once."""
    found = as_concepts(concepts)
    if not found:
        raise ValueError("Expected at least one concept to erase, but got none.")
    return found, list(dict.fromkeys(phrase for concept in found for phrase in concept.phrases))


# ---------------------------------------------------------------- checkpoints


def digest(weights: Weights) -> str:
    """sha256 over sorted names, shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


class State:
    """All that a fit goes on from: student, average, AdamW, random numbers, step, losses."""

    def __init__(self, net: Denoiser, run: Training, ema: float | None, seed: int, streams: Sequence[str]) -> None:
        self.student = net.student()
        self.average = None if ema is None else {n: w.detach().clone() for n, w in self.student.items()}
        self.adam = torch.optim.AdamW(self.student.values(), lr=run.lr, weight_decay=run.weight_decay)
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
        """What a delta says of its fit: updates, and the mean loss of the first and the last tenth of them."""
        tenth = max(1, self.step // 10)
        first, last = (sum(part) / tenth if part else None for part in (self.losses[:tenth], self.losses[-tenth:]))
        return {"steps": self.step, "loss": [first, last]}

    def check(self) -> None:
        if not all(bool(w.isfinite().all()) for w in self.student.values()):
            raise RuntimeError(f"The weights are not finite after {self.step} updates. Lower `lr`, or clip gradients.")

    def save(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Writes beside `path` and moves it there, so that a broken write leaves the last checkpoint as it was."""
        tensors = {f"student/{n}": w.detach() for n, w in self.student.items()}
        tensors |= {f"average/{n}": w for n, w in (self.average or {}).items()}
        for name, w in self.student.items():
            tensors |= {f"adam/{key}/{name}": value for key, value in self.adam.state.get(w, {}).items()}
        tensors |= {f"rng/{name}": rng.get_state() for name, rng in self.rng.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        header = {"fit": json.dumps(identity, sort_keys=True), "done": json.dumps(self.done)}
        save_file({n: w.contiguous() for n, w in tensors.items()}, partial, header)
        partial.replace(path)

    def load(self, path: Path, identity: Mapping[str, Any]) -> None:
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a checkpoint of a fit ({error}): move it away.") from error
        theirs, ours = json.loads(header.get("fit", "{}")), json.loads(json.dumps(identity))
        if theirs != ours:
            other = [key for key in ours if theirs.get(key) != ours[key]]
            raise ValueError(
                f"{path} is the checkpoint of another fit (different: {', '.join(other)}): name another file, or run "
                "the command that began it."
            )
        self.done, self.losses = json.loads(header["done"]), tensors.pop("losses").tolist()
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


# ---------------------------------------------------------------- the detector


def look(pipe: DiffusionPipeline, net: Denoiser, detector: Detector, texts: Sequence[str]) -> Callable[[Weights], float]:
    """The share of 16 pictures of `texts` in which the detector's worse judge sees the concept, for given weights."""
    shown = [texts[k % len(texts)] for k in range(LOOK_IMAGES)]

    def share(weights: Weights) -> float:
        shadow = copy.copy(pipe)  # so that scheduler and progress bar of the user's pipeline stay as they are
        own = {"scheduler": copy.deepcopy(pipe.scheduler), "safety_checker": None, "_progress_bar_config": {"disable": True}}
        vars(shadow).update(own)
        rng = [Generator().manual_seed(seed) for seed in range(LOOK_IMAGES)]
        with Delta(net.change(weights), method="training").apply(pipe):
            images = shadow(shown, generator=rng, num_inference_steps=25, output_type="pt").images
        return float(detector(images.float().cpu()).float().mean(-1).max())

    return share


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
        settings: with no None left.
        draw: `reuse * batch` points for the updates from this step on, drawn with the shipped weights.
        loss: of the student on some points; a mean, so that parts of a batch add up.
        seed: of the random numbers.
        name: what the progress bar shows.
        identity: what a checkpoint must agree in to be gone on from.
        ema: the share that the average keeps in an update; None keeps no average, and the student is shipped.
        streams: names of the random streams; the first draws points, the loss may use the others.
        checkpoint: a safetensors file; if it is there, the fit goes on from it.
        look: the share of pictures with the concept; asked every 50 updates. The fit ends once it is at most `below`.

    Raises:
        ValueError: the checkpoint is another fit's.
        RuntimeError: the loss is not finite; the last checkpoint stays as it is.
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
        if value.requires_grad:
            value.backward()
        total += float(value.detach())
    if not math.isfinite(total):
        kept = f"the last checkpoint is kept in {path}" if path and path.exists() else "there is no checkpoint yet"
        raise RuntimeError(
            f"The loss is {total} in update {state.step + 1} at lr {settings.lr}; {kept}. Lower `lr`, or clip gradients."
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
    """Without dropout; the mode of every submodule comes back."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


@contextlib.contextmanager
def _progress(name: str, total: int, state: State) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with loss and images per second, if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    began, images = time.perf_counter(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=total, completed=state.step)

        def show(n: int) -> None:
            nonlocal images
            images += n
            rate, loss = images / (time.perf_counter() - began), sum(state.losses[-20:]) / len(state.losses[-20:])
            bar.update(task, completed=state.step, description=f"{name}  loss {loss:.4g}  {rate:.1f} images/s")

        yield show
