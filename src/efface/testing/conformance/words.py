"""Promises about a method's documentation."""

from __future__ import annotations

import inspect
import re

from ...fields import field_names
from .trial import Trial


def origin(cls: type) -> str:
    """The origin of a method: its paper, or its source without a paper; "" if the docstring names neither.

    Args:
        cls: a class whose docstring has a paragraph `Paper:` with an arXiv id, or `Source:`; or with an attribute
            `source`.
    """
    doc = inspect.getdoc(cls) or ""
    paper, source = (doc.partition(f"\n{heading}: ")[2].partition("\n\n")[0] for heading in ("Paper", "Source"))
    if re.search(r"arXiv[ \n]+\d{4}\.\d{5}", paper):
        return paper
    return (source or str(getattr(cls, "source", ""))).strip()


def says_where_it_comes_from(trial: Trial) -> None:
    """Its docstring names the paper with an arXiv id, or another source."""
    trial.require(
        bool(origin(type(trial.method))),
        "The docstring names neither paper nor source. Write a paragraph that begins with `Paper:` and has an arXiv "
        "id, or one that begins with `Source:`.",
    )


HEADINGS = ("Differs: ", "Args:\n", "Shapes: ", "Raises:\n", "Example:\n    >>> ")


def undocumented(cls: type) -> list[str]:
    """The gaps in a docstring by the rules for native methods: headings, origin, and fields in `Args:`."""
    doc = inspect.getdoc(cls) or ""
    found = [heading.partition(":")[0] for heading in HEADINGS if f"\n{heading}" not in doc]
    found += [] if origin(cls) else ["Paper or Source"]
    arguments = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    described = {n for line in re.findall(r"(?m)^    (\w[\w, ]*):", arguments) for n in line.split(", ")}
    return found + [name for name in field_names(cls) if name not in described]
