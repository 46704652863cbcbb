"""The state of a pipeline that affects its pictures."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from .._text import SITES
from .._weights import adapters, denoiser_of
from ..core import config
from .delta import active
from .words import handles as words_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def schedule(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The scheduler's class and settings as JSON types. Numbers that JSON cannot hold are texts, such as "-inf"."""
    settings = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    finite = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in settings.items()
    }
    as_json: dict[str, Any] = json.loads(json.dumps({"class": type(pipe.scheduler).__name__, **finite}, default=str))
    return as_json


def present(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The facts that affect a pipeline's pictures besides its weights, as JSON types: scheduler, deltas, erasers and
    LoRAs."""
    site = SITES.get(denoiser_of(pipe))
    found = {
        "scheduler": schedule(pipe),
        "deltas": [[delta.hash, delta.strength] for delta in active(pipe)],
        "erasers": [config(applied.method) for applied in site.applied] if site else [],
        "adapters": adapters(pipe),
    }
    if words := words_of(pipe):
        found["tokens"] = [each.eraser.hash for each in words]
    as_json: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return as_json
