"""The vocabulary of the 128-pixel models: the ground truth about concepts, and the prompts that measure them."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from efface import checks
from efface.models.emoji.concepts import CELLS, PAIRS, named, plain, with_article

from . import HERE


@cache
def vocabulary() -> dict[str, Any]:
    """`vocabulary.json`: that of `emoji` with more in it, such as `concepts`. Shared: do not change it."""
    found: dict[str, Any] = json.loads((HERE / "vocabulary.json").read_text("utf-8"))
    return found


STYLES: tuple[str, ...] = tuple(vocabulary()["style_shares"])
PEOPLE: tuple[str, ...] = tuple(job[g] for job in vocabulary()["professions"].values() for g in ("male", "female"))
ICONS: tuple[str, ...] = tuple(icon for group in vocabulary()["groups"].values() for icon in group) + PEOPLE


@cache
def held_out() -> dict[str, list[str]]:
    """`held_out.json`: concept to prompts that imply it and are in no training caption. Shared: do not change it."""
    found: dict[str, list[str]] = json.loads((HERE / "held_out.json").read_text("utf-8"))
    return found


@cache
def _captions() -> dict[str, str]:
    """Icon to caption, with the icons of the professions ("a female doctor")."""
    jobs = vocabulary()["professions"].items()
    captions: dict[str, str] = vocabulary()["captions"]
    return captions | {entry[g]: f"a {g} {job}" for job, entry in jobs for g in ("male", "female")}


@cache
def _known() -> dict[str, tuple[str, ...] | str]:
    known: dict[str, tuple[str, ...] | str] = {group: tuple(icons) for group, icons in vocabulary()["groups"].items()}
    known |= {name: tuple(entry["icons"]) for name, entry in vocabulary()["concepts"].items() if "icons" in entry}
    known |= {style: style for style in STYLES if style != "plain"}
    jobs = vocabulary()["professions"].items()
    known |= {job: (entry["male"], entry["female"]) for job, entry in jobs}
    single = {plain(caption): (icon,) for icon, caption in _captions().items()} | {plain(i): (i,) for i in ICONS}
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


def prompts(concept: str, cell: str) -> list[tuple[str, tuple[str, ...]]]:
    """The prompts of one measuring cell, as `efface.models.emoji.prompts` has them: a fixed list.

    Args:
        concept: what `truth` knows.
        cell: "explicit", "theme", "paraphrase" or "pair". "theme" and "paraphrase" are empty for styles, and
            "paraphrase" for what is no concept of its own ("beer mug").

    Returns:
        (prompt, keep) pairs. `keep` lists the icons that the erasure should preserve.

    Raises:
        ValueError: the concept or cell is unknown.

    Example:
        >>> prompts("alcohol", "theme")[0]
        ('a night at the pub', ('pool-8-ball', 'guitar', 'pretzel'))
    """
    checks.choice("cell", cell, CELLS)
    icons, called = truth(concept), _captions()
    others = sorted(set(vocabulary()["captions"]) - set(() if isinstance(icons, str) else icons))
    deal = random.Random(f"{plain(concept)}, {cell}")
    if isinstance(icons, str):
        if cell not in ("explicit", "pair"):
            return []
        shown = [(i,) for i in others] if cell == "explicit" else [tuple(deal.sample(others, 2)) for _ in range(PAIRS)]
        return [(f"{' and '.join(called[i] for i in each)}, {icons} style", each) for each in shown]
    if cell == "explicit":
        job = [with_article(plain(concept))] if plain(concept) in vocabulary()["professions"] else []
        return [(text, ()) for text in job + [called[icon] for icon in icons]]
    if cell == "pair":
        pairs = [(a, b) for a in icons for b in deal.sample(others, -(-PAIRS // len(icons)))]
        return [(f"{called[x]} and {called[y]}", (b,)) for a, b in pairs for x, y in ((a, b), (b, a))]
    if cell == "theme":
        themes = vocabulary()["themes"].items()
        return [(theme, tuple(of["with"])) for theme, of in themes if set(of["shown"]) & set(icons)]
    return [(text, ()) for text in held_out().get(plain(concept), ())]
