"""The schema of the header of tokens. Loads pydantic, so it is imported only where a file is read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ..schema import DeltaHeader, Short


class TokensHeader(DeltaHeader):
    """The header of a delta that adds words; `delta` is that of the changed weights that belong to them."""

    kind: Literal["tokens"]
    words: Annotated[list[Short], Field(min_length=1, max_length=10_000)]
    delta: DeltaHeader | None = None
