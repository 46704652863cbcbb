"""The vocabulary of the `emoji` model: the ground truth about concepts, and the prompts that measure them.

A concept is a group of icons ("alcohol"), one icon ("cat"), a profession ("doctor", "female doctor"), or a style
("neon sign"). The four measuring cells of `prompts`:

| cell       | prompt                                              | preserved                     |
|------------|-----------------------------------------------------|-------------------------------|
| explicit   | the concept is named: "a beer mug"                  | nothing (style: the icon)     |
| theme      | trained, implied: "a night at the pub"              | the theme's other icons       |
| paraphrase | never trained, implied: "an evening in the tavern"  | the theme's other icons       |
| pair       | named beside another icon: "a beer mug and a cat"   | the other icon (style: both)  |
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ... import checks
from .weights import read_object

CELLS = ("explicit", "theme", "paraphrase", "pair")
PAIRS = 48  # smallest number of icon pairs per concept in the cell "pair"; each makes two prompts


HERE = Path(__file__).parent
KEYS = ("groups", "professions", "themes", "captions", "style_shares")


@cache
def vocabulary() -> dict[str, Any]:
    """`vocabulary.json`: groups, professions, themes, captions and style shares. Shared: do not change it."""
    return read_object(HERE / "vocabulary.json", *KEYS)


@cache
def paraphrases() -> dict[str, dict[str, list[str]]]:
    """`paraphrases.json`: theme to {"train": captions, "unseen": held out ones}. Shared: do not change it."""
    return read_object(HERE / "paraphrases.json", *vocabulary()["themes"])


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plain(name: str) -> str:
    """`name` in lower case, spaces for dashes, without a leading article."""
    words = name.lower().replace("-", " ").split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@cache
def _captions() -> dict[str, str]:
    """Icon to caption, with the icons of the professions ("a female doctor")."""
    jobs = vocabulary()["professions"].items()
    captions: dict[str, str] = vocabulary()["captions"]
    return captions | {e[g]: f"a {g} {job}" for job, e in jobs for g in ("male", "female")}


@cache
def _styles() -> tuple[str, ...]:
    return tuple(style for style in vocabulary()["style_shares"] if style != "plain")


@cache
def _known() -> dict[str, tuple[str, ...] | str]:
    known: dict[str, tuple[str, ...] | str] = {group: tuple(icons) for group, icons in vocabulary()["groups"].items()}
    known |= {style: style for style in _styles()}
    known |= {job: (entry["male"], entry["female"]) for job, entry in vocabulary()["professions"].items()}
    known |= {plain(caption): (icon,) for icon, caption in _captions().items()}
    return known | {plain(icon): (icon,) for icon in _captions()}


def names() -> tuple[str, ...]:
    """All concept names that `truth` knows: groups, styles, professions, captions without article, icons."""
    return tuple(_known())


def truth(name: str) -> tuple[str, ...] | str:
    """The icons of a concept, or the name of a style.

    Args:
        name: one of `names()`. Case, dashes and a leading article do not matter.

    Raises:
        ValueError: the name is unknown. The message has near matches.

    Example:
        >>> truth("cat"), truth("gambling"), truth("neon sign")
        (('cat-face',), ('slot-machine', 'game-die', 'joker'), 'neon sign')
    """
    return named(_known(), name)


def named(known: Mapping[str, tuple[str, ...] | str], name: str) -> tuple[str, ...] | str:
    """What a vocabulary knows by a name, whatever its case, dashes and article. Raises ValueError with near matches."""
    found = known.get(plain(name))
    if found is None:
        near = difflib.get_close_matches(plain(name), known, 3)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Try one of {', '.join([*known][:17])}."
        raise ValueError(f"Unknown concept {checks.shown(name)}. {hint}")
    return found


def known(look_up: Callable[[str], Any], name: str) -> bool:
    """Whether a vocabulary knows a name: whether `look_up`, such as `truth`, finds something."""
    try:
        look_up(name)
    except ValueError:
        return False
    return True


def themes_of(name: str) -> list[str]:
    """The themes that may show an icon of the concept `name`; empty for a style, which no theme implies.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> themes_of("gambling")
        ['a casino']
    """
    icons = truth(name)
    if isinstance(icons, str):
        return []
    return [theme for theme, drawn in vocabulary()["themes"].items() if set(drawn) & set(icons)]


def _styled(caption: str, style: str) -> tuple[str, str]:
    """The two wordings of a style in training: "a cat, neon sign style" and "a neon sign of a cat"."""
    return f"{caption}, {style} style", f"{with_article(style)} of {caption}"


def prompts(concept: str, cell: str) -> list[tuple[str, tuple[str, ...]]]:
    """The prompts of one measuring cell: a fixed list.

    Args:
        concept: one of `names()`.
        cell: "explicit", "theme", "paraphrase" or "pair", see the module's table. "theme" and "paraphrase" are empty
            for styles, and for concepts that no theme implies.

    Returns:
        (prompt, keep) pairs. `keep` lists the icons that the erasure should preserve.

    Raises:
        ValueError: the concept or cell is unknown.

    Example:
        >>> prompts("gambling", "theme")
        [('a casino', ('cocktail-glass',))]
    """
    checks.choice("cell", cell, CELLS)
    icons, captions, themes = truth(concept), _captions(), vocabulary()["themes"]
    rng = random.Random(f"{plain(concept)}, {cell}")
    unstyled = sorted(vocabulary()["captions"])
    if isinstance(icons, str):
        if cell == "explicit":
            return [(text, (icon,)) for icon, caption in captions.items() for text in _styled(caption, icons)]
        if cell == "pair":
            pairs = [rng.sample(unstyled, 2) for _ in range(PAIRS)]
            return [(t, (a, b)) for a, b in pairs for t in _styled(f"{captions[a]} and {captions[b]}", icons)]
        return []
    if cell == "explicit":
        job = plain(concept) in vocabulary()["professions"]
        return [(text, ()) for text in ([with_article(plain(concept))] if job else []) + [captions[i] for i in icons]]
    if cell == "pair":
        others = [icon for icon in unstyled if icon not in icons]
        drawn = [(a, b) for a in icons for b in rng.sample(others, -(-PAIRS // len(icons)))]
        return [(f"{captions[x]} and {captions[y]}", (b,)) for a, b in drawn for x, y in ((a, b), (b, a))]
    out = []
    for theme in themes_of(concept):
        keep = tuple(icon for icon in themes[theme] if icon not in icons)
        out += [(text, keep) for text in ([theme] if cell == "theme" else paraphrases()[theme]["unseen"])]
    return out
