"""The second trajectory: the base model's picture, drawn from the same noise in parallel."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...families import family
from ...hooks import CrossAttention, DenoiserCall, ErasurePrompts, SelfAttention

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(eq=False)
class Trajectory:
    """The latents of the second picture, and its layer outputs in the current step.

    Args:
        latents: [B, C, h, w], before the current step.
        scheduler: a copy of the pipeline's scheduler.
        number: the number of this denoiser call, from 0 on; -1 before the first.
        layers: name to the output of each layer.
    """

    latents: Tensor
    scheduler: Any
    number: int = -1
    layers: dict[str, CrossAttention | SelfAttention] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The number of steps in the pipeline call."""
        return int(self.scheduler.num_inference_steps)

    @classmethod
    def of(cls, call: DenoiserCall) -> Trajectory:
        """The trajectory in the method's memory, or a new one that starts at the denoiser's sample.

        Raises:
            ValueError: the denoiser was called directly, without its conditional rows, or with rescaled guidance.
        """
        pipe = call.pipe
        if pipe is None or call.first not in (0, len(call.prompt)):
            raise ValueError(
                "Two trajectories need a pipeline call with guidance in the same denoiser call. Use one trajectory."
            )
        if getattr(pipe, "guidance_rescale", 0.0):
            raise ValueError("Two trajectories do not support `guidance_rescale`. Leave it 0, or use one trajectory.")
        if "trajectory" not in call.memory:
            scheduler = copy.deepcopy(pipe.scheduler)
            scale = copy.deepcopy(scheduler).scale_model_input(torch.ones_like(call.sample[:1]), call.timestep)
            sample = call.sample[call.first :]
            latents = sample.clone() if bool((scale == 1).all()) else sample / scale
            call.memory["trajectory"] = cls(latents, scheduler)
        found: Trajectory = call.memory["trajectory"]
        return found

    def step(self, call: DenoiserCall) -> None:
        """Advances the picture by one step, with the current denoiser call, and stores its layer outputs."""
        self.number += 1
        self.layers.clear()
        time = call.timestep
        sample = self.scheduler.scale_model_input(self.latents, time)
        prediction = call.plain(torch.cat([sample] * 2) if call.first else sample, self.layers.__setitem__)
        if call.first and call.pipe is not None:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + call.pipe.guidance_scale * (conditional - unconditional)
        self.latents = self.scheduler.step(prediction, time, self.latents, return_dict=False)[0]

    def cross(self, present: CrossAttention, prompts: ErasurePrompts) -> tuple[CrossAttention, Tensor]:
        """A cross-attention layer with the second picture's query, and the difference of its output there [B, Q, C].

        `present` is the layer in the erased picture, on the rows of the erasure prompts.
        """
        there = self.layers[present.name]
        if present.output is None or there.output is None:
            raise ValueError(f"Layer {present.name!r} has no output in the second trajectory. Use one trajectory.")
        query, output = prompts.on_rows(there.query), prompts.on_rows(there.output)
        return replace(present, query=query, output=output), output - present.output

    def maps(self, layer: str, prompts: ErasurePrompts) -> tuple[Tensor, Tensor]:
        """The query and key [B, Q, C] of a self-attention layer."""
        there = self.layers[layer]
        if not isinstance(there, SelfAttention) or there.key is None:
            raise ValueError(f"Layer {layer!r} did not run as self-attention. Use one trajectory.")
        return prompts.on_rows(there.query), prompts.on_rows(there.key)


def check_trajectory(pipe: DiffusionPipeline) -> None:
    """Raises ValueError if the pipeline does not support a second trajectory."""
    if not hasattr(type(pipe), "guidance_scale"):
        raise ValueError(
            f"Two trajectories need the guidance scale of the call, which {family(pipe).name} pipelines do not expose. "
            "Use one trajectory."
        )
    if "mask_image" in inspect.signature(type(pipe).__call__).parameters:
        raise ValueError(
            f"Two trajectories also draw the base model's picture, but {type(pipe).__name__} inserts the given picture "
            "only into the first one after each step. Use one trajectory."
        )
