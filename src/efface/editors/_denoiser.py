"""A pipeline's denoiser with interchangeable weights, and its inputs during drawing.

Nothing writes to the pipeline's parameters: other weights replace them during one call. So the pipeline itself is the
frozen teacher, memory holds one network, and an exception leaves no trace.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from .. import checks
from .._condition import condition
from .._weights import part
from ..delta.watch import unwatched
from ..families import family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Train = Literal["x", "x-strict", "joint", "u", "self", "full"]
Precision = Literal["auto", "float32", "bfloat16"]
Weights = Mapping[str, Tensor]  # canonical name -> tensor


# ---------------------------------------------------------------- which tensors


def trained(
    denoiser: nn.Module, train: str, outer: Sequence[str] = (), joint: Sequence[str] = (), *, biases: bool = True
) -> list[str]:
    """The names of the denoiser's parameters that a mode trains. "u" excludes names with the prefixes `outer`.

    Without `biases`, only the weights of linear layers and ungrouped convolutions train, because a LoRA can hold only
    these. `joint`: the names of the layers with joint attention, if the denoiser reads text there.

    Raises:
        ValueError: the mode is unknown or finds no parameters, or a LoRA is loaded.
    """
    checks.choice("train", train, get_args(Train))
    layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    in_lora = {f"{name}.weight" for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    names = [name for name, _ in denoiser.named_parameters() if biases or name in in_lora]
    if any(".base_layer." in name or ".lora_" in name for name in names):
        raise ValueError("A LoRA is loaded. Unload it (`pipe.unload_lora_weights()`) or fuse it before `fit`.")
    attention = [
        (f"{n}.", m.is_cross_attention) for n, m in denoiser.named_modules() if hasattr(m, "is_cross_attention")
    ]
    of_joint = tuple(f"{name}." for name in joint)
    cross, own = (
        tuple(n for n, is_cross in attention if is_cross == kind and n not in of_joint) for kind in (True, False)
    )
    text = tuple(f"{layer}add_{part}_proj." for layer in of_joint for part in "qkv")
    shared = tuple(f"{layer}to_{part}." for layer in of_joint for part in "qkv")
    rules: dict[str, Callable[[str], bool]] = {
        "x": lambda name: name.startswith((*cross, *text)),
        "x-strict": lambda name: (
            name.startswith((*cross, *text))
            and name.endswith((".to_k.weight", ".to_v.weight", ".add_k_proj.weight", ".add_v_proj.weight"))
        ),
        "joint": lambda name: name.startswith((*text, *shared)),
        "u": lambda name: not name.startswith((*cross, *text, *outer)),
        "self": lambda name: name.startswith(own),
        "full": lambda name: True,
    }
    found = [name for name in names if rules[train](name)]
    if not found:
        raise ValueError(f"`train={train!r}` finds no parameters in this {type(denoiser).__name__}. Use another mode.")
    return found


# ---------------------------------------------------------------- the denoiser


@dataclass(frozen=True)
class Points:
    """Points on trajectories, N rows: `x` [N, C, h, w], `t` [N], `prompt` [N], which are rows of the condition.

    `own` [N, C, h, w]: the conditional prediction there with the weights that drew the trajectory, if stored.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    own: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Tensor | slice) -> Points:
        return Points(self.x[rows], self.t[rows], self.prompt[rows], None if self.own is None else self.own[rows])

    @property
    def target(self) -> Tensor:
        """What the denoiser learns to predict."""
        if self.own is None:
            raise RuntimeError("The points have no target. Make them with `noised`.")
        return self.own

    def parts(self, n: int) -> list[Points]:
        """Splits the points into at most n parts of nearly equal length."""
        return [self[rows] for rows in torch.arange(len(self), device=self.x.device).chunk(n)]

    @classmethod
    def cat(cls, points: Sequence[Points]) -> Points:
        own = [p.own for p in points if p.own is not None]
        x, t, prompt = (torch.cat([getattr(p, name) for p in points]) for name in ("x", "t", "prompt"))
        return cls(x, t, prompt, torch.cat(own) if own else None)


class _Within(nn.Module):
    """A block of a module, called while the whole module has other weights."""

    block: Callable[..., Any]

    def __init__(self, module: nn.Module, block: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        object.__setattr__(self, "block", block)  # not registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class Denoiser:
    """A pipeline's denoiser with encoded texts, callable with other weights.

    Args:
        pipe: the pipeline, which stays unchanged.
        texts: row k of the condition is texts[k - 1]. Row 0 is the unconditional text.
        train: which parameters may differ.
        biases: whether biases and the scales of norms may also differ.
        sampler_steps: steps of a full trajectory of the pipeline's scheduler.
        precision: "auto" follows the weights: float32 weights train in float32. Half-precision weights train with
            bfloat16 autocast and float32 copies of the trained tensors.

    Attributes:
        base: the pipeline's tensors that a fit trains, by canonical name.
        rows: number of denoiser rows computed so far, as a measure of cost.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        texts: Sequence[str],
        train: str,
        sampler_steps: int,
        precision: str = "auto",
        biases: bool = True,
    ) -> None:
        facts = family(pipe)
        self.module, self.prefix = cast("Any", part(pipe, facts.denoiser)), f"{facts.denoiser}."
        parameters, joint = dict(self.module.named_parameters()), tuple(facts.joint_layers(self.module))
        if any(p.is_meta or not p.is_floating_point() or p.element_size() < 2 for p in parameters.values()):
            raise ValueError(
                "The denoiser is quantised or offloaded. Load it into memory in float32, float16 or bfloat16."
            )
        if any(w.is_inference() for w in (*parameters.values(), *self.module.buffers())):
            raise ValueError(
                "The denoiser was loaded under `torch.inference_mode()`, and such weights cannot be trained. Load the "
                "pipeline outside of it."
            )
        config, few = self.module.config, facts.distilled(self.module) or facts.few_steps(pipe)
        channels = (None, config.in_channels, *([2 * config.in_channels] if facts.variances else []))
        if few or config.out_channels not in channels:
            raise ValueError(
                "Expected a text-to-image denoiser with an unconditional prediction, got one for inpainting or "
                "distilled to few steps. Use a base model with guidance."
            )
        self.names = trained(self.module, train, facts.outer_layers, joint, biases=biases)
        self.base = {self.prefix + n: parameters[n].detach() for n in self.names}
        self.frozen = {n: p.detach() for n, p in parameters.items() if self.prefix + n not in self.base}
        self.device, own = pipe._execution_device, next(iter(parameters.values())).dtype
        self.amp = precision == "bfloat16" or (precision == "auto" and own in (torch.float16, torch.bfloat16))
        if self.amp and self.device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError("This device has no bfloat16. Load the pipeline in float32 and use precision='float32'.")
        if own == torch.float16 and self.device.type == "cpu":
            raise ValueError(
                "The pipeline is in float16, which does not train on a CPU. Load it in float32 or bfloat16."
            )
        if not self.amp and own in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"The pipeline is in {own}, which does not train in this precision. Use precision='bfloat16', or load "
                "it in float32."
            )
        self.dtype = torch.float32 if self.amp else own
        self.pipe, self.condition = pipe, condition(pipe, texts)
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.set_steps(sampler_steps)
        self.shape = facts.latent_shape(pipe)
        self.rows = 0

    def set_steps(self, steps: int) -> None:
        """Sets the number of steps of a full trajectory."""
        self.condition.facts.set_steps(self.pipe, self.scheduler, steps, self.device)

    def add(self, texts: Sequence[str]) -> Tensor:
        """Adds texts, and returns their rows of the condition."""
        more, first = condition(self.pipe, texts), len(self.condition.text)
        added = {n: torch.cat([v, more.added[n][1:]]) for n, v in self.condition.added.items()}
        self.condition = replace(self.condition, text=torch.cat([self.condition.text, more.text[1:]]), added=added)
        return torch.arange(first, len(self.condition.text))

    def student(self) -> dict[str, Tensor]:
        """Copies of the trained tensors that require gradients, in float32 under autocast."""
        return {n: w.to(self.dtype, copy=True).requires_grad_() for n, w in self.base.items()}

    def groups(self, student: Weights) -> list[dict[str, Any]]:
        """The parameter groups of the optimiser: one, with the settings of the fit."""
        return [{"params": list(student.values())}]

    def __call__(self, x: Tensor, t: Tensor, prompt: Tensor, weights: Weights | None = None) -> Tensor:
        """The prediction [N, C, h, w] of the pipeline, or with other trained weights, which alone receive gradients."""
        self.rows += len(x)
        inner = {} if weights is None else {n.removeprefix(self.prefix): w for n, w in weights.items()}
        if torch.is_grad_enabled():
            inner = self.frozen | {n.removeprefix(self.prefix): w for n, w in self.base.items()} | inner
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp), self._recomputing(inner), unwatched():
            args, kwargs = self.condition.facts.training_call(x, t, self.condition.at(prompt))
            out = functional_call(self.module, inner, args, {**kwargs, "return_dict": False}, tie_weights=False)[0]
        return self.condition.facts.training_output(out, x).to(self.dtype)

    @contextmanager
    def _recomputing(self, weights: Weights) -> Iterator[None]:
        """Keeps these weights in place when gradient checkpointing, if enabled, recomputes a block.

        The recomputation happens in `backward`, after the pipeline's weights are restored.
        """
        on = [m for m in self.module.modules() if getattr(m, "gradient_checkpointing", False)]
        if not on or not torch.is_grad_enabled():
            yield
            return
        own = {m: m._gradient_checkpointing_func for m in on}

        def again(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
            def compute(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                within = _Within(self.module, block)
                inner = {f"module.{name}": w for name, w in weights.items()}

                def run(*inputs: Any, **named: Any) -> Any:
                    return functional_call(within, inner, inputs, named, tie_weights=False)

                return checkpoint(run, *args, **kwargs)

            return compute

        try:
            for m in on:
                m._gradient_checkpointing_func = again(own[m])
            yield
        finally:
            for m in on:
                m._gradient_checkpointing_func = own[m]

    @torch.no_grad()
    def trajectory(
        self,
        prompt: Tensor,
        stops: Tensor,
        weights: Weights | None,
        guidance: float,
        rng: Generator,
        *,
        keep: bool = False,
        noise: Tensor | None = None,
    ) -> Points:
        """Draws [B] prompts from noise, and returns the denoiser's inputs after `stops` [M, B] steps: M * B points.

        `keep` adds the conditional predictions there. `noise` [1 or B, C, h, w] is random by default. Guidance 1
        computes no unconditional rows.
        """
        scheduler, last = copy.deepcopy(self.scheduler), int(stops.max())
        extra = {"generator": rng} if "generator" in inspect.signature(scheduler.step).parameters else {}
        if noise is None:
            noise = torch.randn(len(prompt), *self.shape, generator=rng)
        x = noise.to(self.device, self.dtype).expand(len(prompt), *self.shape)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # flow matching starts at noise of size 1
        prompt, both = prompt.to(self.device), torch.cat([torch.zeros_like(prompt), prompt])
        found, own = x.new_empty(*stops.shape, *self.shape), x.new_empty(*stops.shape, *self.shape)
        for k, t in enumerate(scheduler.timesteps[: last + 1]):
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            here = (stops == k).to(self.device)
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
        x, t, prompt = (v.flatten(0, 1) for v in (points.x, points.t, points.prompt))
        return Points(x, t, prompt, None if points.own is None else points.own.flatten(0, 1))

    def noised(self, x: Tensor, t: Tensor, noise: Tensor, rows: Tensor) -> Points:
        """Points at the times t, with the denoiser's target in `own`.

        Raises:
            ValueError: the scheduler is not a diffusion of the noise, or predicts something unknown.
        """
        config = self.scheduler.config
        kind, alphas = config.get("prediction_type", "epsilon"), getattr(self.scheduler, "alphas_cumprod", None)
        if alphas is None or kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(
                f"Expected a scheduler with `alphas_cumprod` that predicts noise, velocity or sample, got "
                f"{type(self.scheduler).__name__} ({kind}). Set `pipe.scheduler` to one, such as DDIMScheduler."
            )
        kept = alphas.to(torch.float64)[t.cpu()].reshape(-1, *(1 for _ in x.shape[1:]))
        signal, sigma = (v.to(x) for v in (kept.sqrt(), (1 - kept).sqrt()))
        targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * x, "sample": x}
        return Points(signal * x + sigma * noise, t, rows, targets[kind])

    def change(self, weights: Weights) -> dict[str, Tensor]:
        """The difference from the pipeline's weights."""
        return {name: w.detach() - self.base[name].to(w.dtype) for name, w in weights.items()}


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()
