"""The templates of the pages, with their filters and their common style."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from importlib import resources
from typing import Any

from .words import ends, number, percent, span


def renderer(name: str) -> Callable[..., str]:
    """The function that renders a template of this package.

    Raises:
        ImportError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'A report needs {error.name}. Install it with pip install "efface[bench]".') from error
    from markupsafe import Markup

    here = resources.files(__package__ or __name__)

    def source(part: str) -> str:
        return (here / part).read_text("utf-8")

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=jinja2.FunctionLoader(source)
    )
    environment.filters |= {
        "number": number,
        "span": span,
        "percent": percent,
        "ends": ends,
        "breakable": _breakable,
        "json": partial(json.dumps, indent=1),
    }
    environment.globals["style"] = Markup(source("style.css"))
    return environment.get_template(name).render


def _breakable(text: str) -> Any:
    """A name with optional line breaks after underscores, slashes and dots."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/.])(?=\w)", r"\1<wbr>", str(escape(text))))
