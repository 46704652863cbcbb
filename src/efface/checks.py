"""Checks of user input, with one wording: expected value, actual value, cure.

    Expected `strength` >= 0, got -1. Give 0 or more.

Each check returns the converted value or raises ValueError; it raises TypeError if a text or a sequence of texts was
expected. `name` is the field or option as the user writes it, such as "strength" or "--guidance".
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .registry import near

SHOWN = 80  # characters of a value
SEEDS = 2**32
TUNING_SEEDS = 10_000

Choice = TypeVar("Choice")


class NotJudged(ValueError):
    """An erasure cannot be judged, for example because the base model rarely draws the concept."""


def short(text: str, most: int = SHOWN) -> str:
    """A text as messages show it, cut at `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def shown(value: object) -> str:
    """A value as messages show it: its `repr` on one line, cut at 80 characters.

    Example:
        >>> from efface import checks
        >>> checks.shown("cat"), len(checks.shown("cat" * 100))
        ("'cat'", 80)
    """
    try:
        text = " ".join(repr(value).split())
    except (RecursionError, ValueError):  # nested too deeply, or an integer with more digits than Python prints
        return f"a {type(value).__name__} too large to show"
    return short(text)


def refusal(expected: str, got: object, cure: str) -> str:
    """The text of an error: expected value, actual value, cure."""
    return f"Expected {expected}, got {shown(got)}. {cure}"


def number(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    cure: str = "",
) -> float:
    """A finite number within bounds, as float.

    Args:
        name: the name of the field.
        value: what was given.
        least, most: the bounds, which are inside the range.
        above, below: excludes `least`, or `most`, from the range.
        cure: the second sentence of the message. Default: derived from the bounds.

    Example:
        >>> from efface import checks
        >>> checks.number("strength", 2, 0)
        2.0
        >>> checks.number("momentum_beta", 1.0, 0, 1, below=True)
        Traceback (most recent call last):
        ValueError: Expected `momentum_beta` in [0, 1), got 1.0. Give less than 1.
    """
    given = _number(value)
    small = given is None or not (given > least if above else given >= least)
    large = given is None or not (given < most if below else given <= most)
    if given is not None and math.isfinite(given) and not small and not large:
        return given
    if given is None:
        cure = cure or "Give a number."
    elif not math.isfinite(given):
        cure = cure or "Give a finite number."
    bounds = _bounds(least, most, above, below) or " to be a finite number"
    raise ValueError(refusal(f"{_quoted(name)}{bounds}", value, cure or _cure(small, least, most, above, below)))


def whole(name: str, value: object, least: float = 1, most: float = math.inf, *, cure: str = "") -> int:
    """A whole number within bounds.

    Example:
        >>> from efface import checks
        >>> checks.whole("images", 0)
        Traceback (most recent call last):
        ValueError: Expected a whole number `images` >= 1, got 0. Give 1 or more.
    """
    given = value if isinstance(value, int) and not isinstance(value, bool) else None
    if given is not None and least <= given <= most:
        return given
    if given is None:
        cure = cure or "Give a whole number."
    cure = cure or _cure(given is not None and given < least, least, most, False, False)
    raise ValueError(refusal(f"a whole number {_quoted(name)}{_bounds(least, most, False, False)}", value, cure))


def share(name: str, value: object) -> float:
    """A number from 0 to 1."""
    return number(name, value, 0, 1)


def seed(name: str, value: object, count: int = 1) -> int:
    """The first of `count` consecutive seeds, all below 2**32."""
    last = SEEDS - count
    high = isinstance(value, int) and value > last
    cure = f"Give at most {last}, so that all {count} seeds stay below 2**32." if high and count > 1 else ""
    return whole(name, value, 0, last, cure=cure)


def tuning_seeds(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Seeds for choosing settings: all below 10,000. Test seeds start above."""
    if not isinstance(values, Sequence) or not len(values):
        raise ValueError(refusal(f"{_quoted(name)} to be seeds", values, "Give whole numbers, such as range(32)."))
    for value in (values[0], values[-1]) if isinstance(values, range) else values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < TUNING_SEEDS:
            cure = "Give tuning seeds, because settings must not be chosen on test seeds."
            raise ValueError(refusal(f"tuning seeds in [0, {TUNING_SEEDS - 1}] for {_quoted(name)}", value, cure))
    return tuple(values)


def window(name: str, value: object) -> tuple[float, float]:
    """A window (start, end) as fractions of the trajectory."""
    numbers = [_number(each) for each in value] if isinstance(value, (tuple, list)) else []
    start, end = numbers if len(numbers) == 2 else (None, None)
    if start is None or end is None or not 0 <= start <= end <= 1:
        cure = "Give two fractions of the trajectory, such as (0.0, 0.8): 0 is pure noise, 1 the finished picture."
        raise ValueError(refusal(f"{_quoted(name)} with 0 <= start <= end <= 1", value, cure))
    return start, end


def choice(name: str, value: object, choices: Collection[Choice]) -> Choice:
    """Checks that the value is one of the choices.

    Example:
        >>> from efface import checks
        >>> checks.choice("layout", "khoya", ("diffusers", "kohya"))
        Traceback (most recent call last):
        ValueError: Expected `layout` to be one of 'diffusers', 'kohya', got 'khoya'. Did you mean 'kohya'?
    """
    for each in choices:
        if type(each) is type(value) and each == value:
            return each
    hint = near(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else ""
    known = ", ".join(map(repr, choices))
    raise ValueError(refusal(f"{_quoted(name)} to be one of {known}", value, hint or "Give one of these."))


def each(owner: object, check: Callable[..., object], *names: str, **bounds: object) -> None:
    """Checks several fields of a frozen dataclass alike, and stores what the check returns.

    A field whose default is None may be None.

    Example:
        >>> from dataclasses import dataclass
        >>> from efface import checks
        >>> @dataclass(frozen=True)
        ... class Fit:
        ...     steps: int = 10
        ...     batch: int | None = None
        ...
        ...     def __post_init__(self):
        ...         checks.each(self, checks.whole, "steps", "batch")
        >>> Fit(batch=0)
        Traceback (most recent call last):
        ValueError: Expected a whole number `batch` >= 1, got 0. Give 1 or more.
    """
    for name in names:
        value = getattr(owner, name)
        if value is not None or getattr(type(owner), name, ...) is not None:
            object.__setattr__(owner, name, check(name, value, **bounds))


def text(name: str, value: object, *, empty: bool = False) -> str:
    """A text that is not blank, unless `empty` is True."""
    if not isinstance(value, str):
        raise TypeError(refusal(f"{_quoted(name)} to be a text", value, "Put it in quotes."))
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"Expected {_quoted(name)} to be a text in UTF-8, got {value!a:.80}. Write it again.")
    if not empty and not value.strip():
        raise ValueError(refusal(f"{_quoted(name)} to be a text that is not empty", value, "Write at least one word."))
    return value


def texts(name: str, value: object) -> tuple[str, ...]:
    """Texts as a tuple. Refuses a single text, which Python would split into letters."""
    if isinstance(value, str):
        raise TypeError(refusal(f"{_quoted(name)} to be a sequence of texts", value, f"Write ({shown(value)},)."))
    if not isinstance(value, Sequence) or not all(isinstance(each, str) for each in value):
        raise TypeError(
            refusal(f"{_quoted(name)} to be a sequence of texts", value, "Write for example ('a dog', 'a tree').")
        )
    return tuple(text(name, each, empty=True) for each in value)


def path(name: str, value: object) -> Path:
    """A path in UTF-8 without NUL, so that records and terminals can show it.

    Records and messages name paths in UTF-8.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(refusal(f"{_quoted(name)} to be a path", value, "Give a text or a pathlib.Path."))
    given = os.fspath(value)
    try:
        whole_name = bool(given) and "\0" not in given and bool(given.encode())
    except UnicodeEncodeError:
        whole_name = False
    if not whole_name:
        raise ValueError(
            f"Expected {_quoted(name)} to be a path in UTF-8, got {ascii(given)[:SHOWN]}. Give another name."
        )
    return Path(given)


def fields(owner: str, cls: Any, given: Mapping[str, object], hidden: Collection[str] = ()) -> None:
    """Raises ValueError for unknown field names of a dataclass, and for values of the wrong type in simple fields.

    Args:
        owner: the registered name of the class.
        cls: a method, detector, metric or suite.
        given: field names and values, as the command line and records give them.
        hidden: fields that users cannot set.

    Example:
        >>> from efface import checks, SLD
        >>> checks.fields("sld", SLD, {"warmupp": 1})
        Traceback (most recent call last):
        ValueError: sld has no field 'warmupp'. Did you mean 'warmup'? Its fields: concepts, strength, ...
    """
    types = {each.name: each.type for each in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    names = [name for name in types if name not in hidden]
    for name, value in given.items():
        if name not in names:
            hint = near(name, names)
            raise ValueError(
                f"{owner} has no field {shown(name)}. {hint}{' ' if hint else ''}"
                f"Its fields: {', '.join(names) or 'none'}."
            )
        kind = types[name] if isinstance(types[name], str) else getattr(types[name], "__name__", "")
        if value is None and kind.endswith(" | None"):
            continue
        kind = kind.removesuffix(" | None")
        if kind in _SIMPLE:
            _SIMPLE[kind](name, value)
        elif kind.startswith("tuple[") and not isinstance(value, (tuple, list, Mapping)):
            raise ValueError(refusal(f"{_quoted(name)} to be a list", value, "Put it in brackets."))


def warn(message: str) -> None:
    """Warns at the user's line: the first one outside of Efface and the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_OURS = ("efface", "contextlib", "torch", "diffusers")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(refusal(f"{_quoted(name)} to be true or false", value, "Give one of these."))


_SIMPLE: dict[str, Callable[[str, object], object]] = {
    "int": lambda name, value: whole(name, value, -math.inf),
    "float": number,
    "bool": _flag,
    "str": lambda name, value: text(name, value, empty=True),
    "tuple[str, ...]": texts,
}


def _quoted(name: str) -> str:
    return name if "`" in name else f"`{name}`"


def _number(value: object) -> float | None:
    """The value as float; infinite if it is too large, None if it is not a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _bounds(least: float, most: float, above: bool, below: bool) -> str:
    if least == -math.inf and most == math.inf:
        return ""
    if most == math.inf:
        return f" {'>' if above else '>='} {_plain(least)}"
    if least == -math.inf:
        return f" {'<' if below else '<='} {_plain(most)}"
    return f" in {'(' if above else '['}{_plain(least)}, {_plain(most)}{')' if below else ']'}"


def _cure(small: bool, least: float, most: float, above: bool, below: bool) -> str:
    if small:
        return f"Give more than {_plain(least)}." if above else f"Give {_plain(least)} or more."
    return f"Give less than {_plain(most)}." if below else f"Give {_plain(most)} or less."


def _plain(bound: Any) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"
