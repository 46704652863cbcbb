"""The vocabulary of the 128-pixel models: the ground truth about concepts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from efface.models.emoji.concepts import named, plain

from . import HERE

VOCABULARY: dict[str, Any] = json.loads((HERE / "vocabulary.json").read_text("utf-8"))
STYLES: tuple[str, ...] = tuple(VOCABULARY["style_shares"])
PEOPLE: tuple[str, ...] = tuple(job[g] for job in VOCABULARY["professions"].values() for g in ("male", "female"))
ICONS: tuple[str, ...] = tuple(icon for group in VOCABULARY["groups"].values() for icon in group) + PEOPLE


@cache
def _known() -> dict[str, tuple[str, ...] | str]:
    known: dict[str, tuple[str, ...] | str] = {group: tuple(icons) for group, icons in VOCABULARY["groups"].items()}
    known |= {name: tuple(entry["icons"]) for name, entry in VOCABULARY["concepts"].items() if "icons" in entry}
    known |= {style: style for style in STYLES if style != "plain"}
    jobs = VOCABULARY["professions"].items()
    known |= {job: (entry["male"], entry["female"]) for job, entry in jobs}
    people = {f"{g} {job}": (entry[g],) for job, entry in jobs for g in ("male", "female")}
    captions = {plain(caption): (icon,) for icon, caption in VOCABULARY["captions"].items()}
    single = people | captions | {plain(icon): (icon,) for icon in ICONS}
    return single | known  # a group has the name of its first icon


def truth(name: str) -> tuple[str, ...] | str:
    """The icons of a concept, or the name of a style.

    Args:
        name: a group, concept, style, profession, caption or icon. Case, dashes and a leading article do not matter.

    Raises:
        ValueError: the name is unknown. The message has near matches.

    Example:
        >>> truth("cat"), truth("a beer mug"), truth("neon sign")
        (('cat-face', 'cat'), ('beer-mug',), 'neon sign')
    """
    return named(_known(), name)
