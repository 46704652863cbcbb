"""Efface as a technique of eval-unlearn, which draws the pictures that its metrics judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image

import efface
from efface import api, checks
from efface.pictures import to_pil
from efface.pipelines import draw


@dataclass(frozen=True)
class Config:
    """The technique's options in a file of eval-unlearn.

    Args:
        erase_concept: a shipped concept, such as "alcohol", or your own phrase. Several: with commas.
        model_id: what `efface.load` takes: "emoji", a folder, or with `allow_hub` a hub id.
        method: an eraser, or a preset such as "sld.strong"; "" with a delta alone. Default: "eiup", or "" if there is a
            `delta`.
        fields: the method's fields, such as {"strength": 1.0}.
        delta: a file that `efface fit` wrote.
        num_inference_steps: steps of each picture.
        guidance_scale: the scale of predictions with and without the prompt. None: the pipeline's default.
        batch_size: pictures of one call. A picture depends only on its prompt and seed.
        device, dtype: as `efface.load` takes them.
        allow_hub: whether `model_id` may be downloaded.
    """

    erase_concept: str
    model_id: str
    method: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    delta: str = ""
    num_inference_steps: int = 50
    guidance_scale: float | None = 7.5
    batch_size: int = 1
    device: str | None = None
    dtype: str | None = None
    allow_hub: bool = False


class EffaceTechnique:
    """Draws with a method or a delta of Efface.

    Args:
        options: the fields of `Config`.

    Raises:
        ValueError: an option is unknown, or missing, or nothing would be erased.
    """

    def __init__(self, **options: Any) -> None:
        known = [each.name for each in fields(Config)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"Expected options among {', '.join(known)}, got {', '.join(unknown)}. Correct the technique's config."
            )
        if missing := [name for name in ("erase_concept", "model_id") if not options.get(name)]:
            raise ValueError(
                f"Expected {' and '.join(missing)} in the technique's config, got none. Give for example "
                '{"erase_concept": "alcohol", "model_id": "emoji"}.'
            )
        self.config = Config(**options)
        checks.whole("batch_size", self.config.batch_size)
        method = self.config.method
        if method is None:
            method = "" if self.config.delta else "eiup"
        if not method and not self.config.delta:
            raise ValueError("Expected a `method` or a `delta`, got neither. Name a method, such as eiup.")
        shipped = efface.concepts()
        words = [word.strip() for word in self.config.erase_concept.split(",") if word.strip()]
        concepts = [shipped.get(word) or efface.Concept(word) for word in words]
        erasers = [api.load_delta(self.config.delta)] if self.config.delta else []
        if method:
            erasers.append(api.build(method, concepts, **self.config.fields))
        self.pipe = efface.load(
            self.config.model_id, self.config.dtype, self.config.device, allow_hub=self.config.allow_hub
        )
        self.handles = efface.stack(self.pipe, *erasers)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **call: Any) -> list[Image.Image]:
        """One picture per prompt, with the seeds `seed`, `seed + 1`, ...

        Args:
            prompts: the prompts.
            seed: the first seed. None: a random one.
            call: further arguments of the pipeline, which override the config's.
        """
        if not prompts:
            return []
        config = self.config
        first = int(torch.randint(2**31, ())) if seed is None else checks.seed("seed", seed, len(prompts))
        steps = call.pop("num_inference_steps", config.num_inference_steps)
        guidance = call.pop("guidance_scale", config.guidance_scale)
        seeds = [first + k for k in range(len(prompts))]
        pictures = draw(self.pipe, prompts, seeds, config.batch_size, guidance, num_inference_steps=steps, **call)
        return to_pil(pictures)
