"""The fields of a request, and what each one decides."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .. import checks
from .errors import Refused

if TYPE_CHECKING:
    from ..guard import Policy

Role = Literal["batch", "row", "http"]

FIELDS: dict[str, Role] = {
    "prompt": "row",
    "negative_prompt": "row",  # whether there is one is part of the batching key
    "n": "row",
    "seed": "row",
    "also_erase": "row",
    "output_format": "row",
    "output_compression": "row",
    "model": "batch",
    "size": "batch",
    "quality": "batch",
    "steps": "batch",
    "guidance_scale": "batch",
    "background": "http",
    "moderation": "http",
    "partial_images": "row",
    "response_format": "http",
    "safety_identifier": "http",
    "stream": "http",
    "style": "http",
    "user": "http",
}
"""Each field is part of the batching key, belongs to its rows, or ends in the HTTP layer."""

PROMPT = 32_000
STEPS = {"low": 10, "medium": 25, "high": 50, "standard": 25, "hd": 50, "auto": 25}
MOST_STEPS, MOST_SCALE, MOST_ROWS, MOST_PARTIAL = 100, 20.0, 10, 3
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)

Text = Annotated[str, StringConstraints(max_length=PROMPT)]
Short = Annotated[str, StringConstraints(max_length=500)]


class ImageRequest(BaseModel):
    """The body of `POST /v1/images/generations`. Unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    prompt: Annotated[Text, StringConstraints(min_length=1)]
    model: Short | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ROWS)] | None = None
    size: Short | None = None
    quality: Literal["low", "medium", "high", "auto", "standard", "hd"] | None = None
    negative_prompt: Text | None = None
    seed: Annotated[int, Field(ge=0, lt=checks.SEEDS)] | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    guidance_scale: Annotated[float, Field(gt=1, le=MOST_SCALE)] | None = None
    also_erase: Annotated[list[Short], Field(max_length=8)] = []
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=MOST_PARTIAL)] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: Short | None = None
    safety_identifier: Short | None = None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _printable(cls, value: str | None) -> str | None:
        if value is not None and _CONTROL.search(value):
            raise ValueError("a text without control characters")
        return value

    @field_validator("partial_images")
    @classmethod
    def _streamed(cls, value: int | None, others: ValidationInfo) -> int | None:
        if value and not (others.data.get("stream") and others.data.get("n") in (None, 1)):
            raise ValueError("0 without `stream`, and for more than one picture")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.prompt.strip():
            raise ValueError("a prompt with at least one word")
        if self.seed is not None and self.seed + (self.n or 1) > checks.SEEDS:
            raise ValueError("a seed whose following seeds stay below 2**32")
        if self.steps is not None and self.quality not in (None, "auto"):
            raise ValueError("`steps` or `quality`, not both")
        return self

    @property
    def rows(self) -> int:
        return self.n or 1

    @property
    def all_steps(self) -> int:
        return self.steps or STEPS[self.quality or "auto"]


def parsed(body: Any) -> ImageRequest:
    """The request. Raises Refused with the field at fault."""
    try:
        return ImageRequest.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    where = ".".join(map(str, found["loc"])) or None
    if found["type"] == "extra_forbidden":
        known = ", ".join(sorted(FIELDS))
        raise Refused(400, f"Unknown field {checks.shown(where)}. Known fields: {known}.", "unknown_field", where)
    expected = found["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    got = "nothing" if found["type"] == "missing" else checks.shown(found["input"]) if where else "another body"
    name = f"`{where}`" if where else "the body"
    raise Refused(400, f"Expected {name} to be {expected}, got {got}. Correct the request.", "invalid_value", where)


def size_of(request: ImageRequest, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Width and height. Raises Refused unless the server offers them. The first size is "auto"."""
    if request.size in (None, "auto"):
        return sizes[0]
    found = _SIZE.fullmatch(request.size or "")
    if found is None or (int(found[1]), int(found[2])) not in sizes:
        known = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise Refused(
            400, f"Expected `size` to be auto or one of {known}, got {checks.shown(request.size)}. Choose one.",
            "invalid_value", "size",
        )  # fmt: skip
    return int(found[1]), int(found[2])


def batch_facts(request: ImageRequest, model: str, size: tuple[int, int], policy: Policy) -> dict[str, Any]:
    """What rows of one pipeline call have in common.

    Args:
        request: the request.
        model: the name of the model with its dtype.
        size: width and height.
        policy: the policy with the further erasures of the request.
    """
    return {
        "model": model,
        "size": list(size),
        "steps": request.all_steps,
        "guidance_scale": request.guidance_scale,
        "negative_prompt": request.negative_prompt is not None,
        "methods": sorted({each.method for each in policy.erase}),
        "deltas": [list(each) for each in policy.weights],
    }


def key_of(facts: dict[str, Any]) -> str:
    """The batching key."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def partial_steps(pictures: int, steps: int) -> list[int]:
    """After how many of the steps each partial picture is shown: evenly, and never after the last one.

    Example:
        >>> from efface.serve.fields import partial_steps
        >>> partial_steps(3, 8), partial_steps(3, 2)
        ([2, 4, 6], [1])
    """
    return sorted({steps * k // (pictures + 1) for k in range(1, pictures + 1)} - {0})


def cost_of(request: ImageRequest, size: tuple[int, int]) -> float:
    """Rows x steps x megapixels x 2, because guidance doubles the rows."""
    return request.rows * request.all_steps * size[0] * size[1] * 2 / 1e6
