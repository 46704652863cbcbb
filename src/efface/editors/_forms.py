"""The schema of a folder of pictures. Loads pydantic, so it is imported only where a file is read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..schema import Form, Short, Text

Numbers = Annotated[list[float], Field(min_length=4, max_length=4)]


class ExampleLine(Form):
    """A line of metadata.jsonl: a picture, its caption, and the boxes of the concept."""

    file_name: Short
    text: Text
    boxes: Annotated[list[Numbers], Field(max_length=1_000)] | None = None
