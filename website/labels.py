"""Docstrings for the site: bold words before paragraphs, such as "Paper:", and examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

LABEL = re.compile(r"^(Paper|Source|Differs|Shapes|Negative prompts): ", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
"""The heading of our docstrings; griffe reads code under its plural only."""


class Labels(griffe.Extension):
    """An extension of griffe, which reads the docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = LABEL.sub(r"**\1:** ", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
