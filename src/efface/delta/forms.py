"""The schemas of the headers of tokens and of steering. Loads pydantic, so it is imported only where a file is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..schema import DeltaHeader, Numbers, Short


class TokensHeader(DeltaHeader):
    """The header of a delta that adds words; `delta` is that of the changed weights that belong to them."""

    kind: Literal["tokens"]
    words: Annotated[list[Short], Field(min_length=1, max_length=10_000)]
    delta: DeltaHeader | None = None


class SteeringHeader(DeltaHeader):
    """The header of a delta that edits outputs of modules."""

    kind: Literal["steering"]
    form: Literal["direction", "surrogate", "adapter"]
    window: list[float] = Field([0.0, 1.0], min_length=2, max_length=2)
    times: Numbers = Field([])
    positive: bool = False
    length: bool = False
