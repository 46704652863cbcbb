"""Words of a tokenizer's vocabulary, and random texts made of them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from random import Random
from typing import Any

from .. import checks
from .._text import own_tokens, readers
from ..families import tokenizer_of

_KNOWN: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def words(tokenizer: Any) -> tuple[str, ...]:
    """The lower-case words of at least three letters that are one token, sorted.

    Raises:
        ValueError: the tokenizer has no table of its tokens, or no such words.
    """
    if tokenizer not in _KNOWN:
        vocabulary = table(tokenizer)
        marks = ("</w>", "▁", "Ġ")  # CLIP ends a word, SentencePiece and byte-level BPE begin it with a mark
        marked = any(token.endswith(marks[0]) or token.startswith(marks[1:]) for token in vocabulary)
        found = set()
        for token in vocabulary:
            bare = token.removesuffix(marks[0]).removeprefix(marks[1]).removeprefix(marks[2])
            if (bare != token or not marked) and len(bare) > 2 and bare.isascii() and bare.isalpha() and bare.islower():
                found.add(bare)
        single = sorted(word for word in found if len(tokenizer(word, add_special_tokens=False).input_ids) == 1)
        if not single:
            raise ValueError(
                f"Expected a tokenizer with words of its own, got {type(tokenizer).__name__} without any. Use an "
                "attack that needs no words."
            )
        _KNOWN[tokenizer] = tuple(single)
    return _KNOWN[tokenizer]


def table(tokenizer: Any) -> dict[str, int]:
    """Token -> id.

    Raises:
        ValueError: the tokenizer has no such table.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise ValueError(
            f"Expected a tokenizer with a table of its tokens (`get_vocab`), got {checks.shown(tokenizer)}. Attacks "
            "that search for tokens cannot run on this pipeline; use one that writes whole texts."
        )
    return dict(tokenizer.get_vocab())


def random_text(pipe: Any, like: str, rng: Random, without: Sequence[str] = ()) -> str:
    """Random words with as many tokens as the text `like`, without words of the texts `without`."""
    name = readers(pipe)[0]
    count = max(1, len(own_tokens(pipe, like, name)))
    avoided = frozenset(word for text in without for word in text.lower().split())
    tokenizer = tokenizer_of(pipe, name)
    allowed = _allowed(words(tokenizer), avoided)
    if not allowed:
        raise ValueError(
            f"Expected a tokenizer with words besides those of the concept, got {type(tokenizer).__name__} "
            "without any, so there are no random texts. Leave the control out."
        )
    return " ".join(rng.sample(allowed, count) if count <= len(allowed) else rng.choices(allowed, k=count))


@functools.lru_cache(maxsize=8)
def _allowed(known: tuple[str, ...], avoided: frozenset[str]) -> tuple[str, ...]:
    return tuple(word for word in known if word not in avoided)
