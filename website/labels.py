"""Docstrings for the site: bold words before paragraphs, such as "Paper:", and examples as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

LABEL = re.compile(r"^(Paper|Source|Differs|Limits|Shapes|Negative prompts): ", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
"""The heading of our docstrings; griffe reads code under its plural only."""


QUOTED = re.compile(r"^( +[\w, ]+: )>", re.MULTILINE)
"""A bound such as ">= 0" at the start of a description, which Markdown takes for a quotation."""


class Labels(griffe.Extension):
    """An extension of griffe, which reads the docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = QUOTED.sub(r"\1\\>", LABEL.sub(r"**\1:** ", obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub("Examples:", text)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Shows what a converted field takes: `Converted[taken, held] = Converted(default)`."""
        value, kind = attr.value, attr.annotation
        if isinstance(value, griffe.ExprCall) and str(value.function) == "Converted" and value.arguments:
            attr.value = value.arguments[0]
        if isinstance(kind, griffe.ExprSubscript) and str(kind.left) == "Converted":
            attr.annotation = kind.slice.elements[0] if isinstance(kind.slice, griffe.ExprTuple) else kind.slice
