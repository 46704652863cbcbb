"""The tokens that a search may use, and the texts made of them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from .._text import read, readers
from ..core import Concept
from ..families import tokenizer_of
from ._words import table

_KNOWN: weakref.WeakKeyDictionary[Any, dict[str, int]] = weakref.WeakKeyDictionary()


def whole_words(tokenizer: Any) -> dict[str, int]:
    """Text -> id for every printable token that a tokenizer reads back: it is the only token of its own text.

    This leaves out start, end, padding and unknown tokens, pieces of words and of characters, and added words.

    Raises:
        ValueError: the tokenizer has no table of its tokens.
    """
    if tokenizer not in _KNOWN:
        special = {*tokenizer.all_special_ids, tokenizer.unk_token_id, *_added(tokenizer)}
        named = ((_bare(token), k) for token, k in table(tokenizer).items() if k not in special)
        fine = sorted((k, text) for text, k in named if text.isprintable() and len(text.split()) == 1)
        again = tokenizer([text for _, text in fine], add_special_tokens=False).input_ids if fine else []
        _KNOWN[tokenizer] = {text: k for (k, text), back in zip(fine, again, strict=True) if list(back) == [k]}
    return _KNOWN[tokenizer]


def _added(tokenizer: Any) -> Iterable[int]:
    found: Iterable[int] = tokenizer.get_added_vocab().values() if hasattr(tokenizer, "get_added_vocab") else ()
    return found


def _bare(token: str) -> str:
    """A token without the mark by which CLIP ends a word, or SentencePiece and byte-level BPE begin one."""
    return token.removesuffix("</w>").removeprefix("▁").removeprefix("Ġ")


def common(pipe: Any) -> dict[str, tuple[int, ...]]:
    """The words that are one token of every tokenizer of the pipeline, and their ids."""
    first, *others = (whole_words(tokenizer_of(pipe, name)) for name in readers(pipe))
    return {text: (k, *(o[text] for o in others)) for text, k in first.items() if all(text in o for o in others)}


def forbidden(concept: Concept, given: Sequence[str] | None) -> tuple[str, ...]:
    """The words that a search must not write: `given`, or every word of the concept's name and phrases."""
    texts = (concept.name, *concept.phrases) if given is None else given
    return tuple(dict.fromkeys(word for text in texts for word in text.casefold().split()))


def contains(text: str, words: Sequence[str]) -> bool:
    """Whether a text contains a forbidden word, as a part of a word if it has at least three letters."""
    low = text.casefold()
    return any(word in low if len(word) > 2 else word in low.split() for word in words)


@dataclass(frozen=True, eq=False)
class Slots:
    """Words of a prompt that stand for soft tokens.

    Args:
        words: k different words, each one token of every tokenizer.
        ids: their ids [k], by the tokenizer's name.
    """

    words: tuple[str, ...]
    ids: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, pipe: Any, count: int, without: Sequence[str] = ()) -> Slots:
        """The rarest words that no text of `without` contains: those with the last ids of the first tokenizer.

        Raises:
            ValueError: there are fewer words than `count`.
        """
        known, names = common(pipe), readers(pipe)
        taken = {word for text in without for word in text.lower().split()}
        rare = sorted((word for word in known if word not in taken), key=lambda word: -known[word][0])[:count]
        if len(rare) < count:
            raise ValueError(
                f"Expected {count} words that the tokenizers share and the prompt does not use, got {len(rare)}. Use "
                "fewer tokens."
            )
        return cls(tuple(rare), {n: torch.tensor([known[w][k] for w in rare]) for k, n in enumerate(names)})


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What a search may write: V words that are one token of every tokenizer, without forbidden ones.

    Args:
        texts: the words.
        ids: their ids [V], by the tokenizer's name.
        avoided: forbidden words.
    """

    texts: tuple[str, ...]
    ids: Mapping[str, Tensor]
    avoided: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, pipe: Any, avoided: Sequence[str] = ()) -> Vocabulary:
        """All allowed words of a pipeline.

        Raises:
            ValueError: a tokenizer has no table of its tokens, or no word is allowed.
        """
        found = {text: ids for text, ids in common(pipe).items() if not contains(text, avoided)}
        if not found:
            raise ValueError(
                f"Expected tokens that a search may use, got none besides {checks.shown(list(avoided))}. Forbid fewer "
                "words, or use an attack that writes whole texts."
            )
        ids = {name: torch.tensor([each[k] for each in found.values()]) for k, name in enumerate(readers(pipe))}
        return cls(tuple(found), ids, tuple(avoided))

    def embeddings(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The input embeddings [V, D] of the words, by the tokenizer's name."""
        return {name: each[self.ids[name].to(each.device)].float() for name, each in tables.items()}

    def written(self, template: str, slots: Slots, entries: Sequence[int]) -> str:
        """The template with words of the vocabulary in its slots."""
        words = dict(zip(slots.words, (self.texts[k] for k in entries), strict=True))
        return " ".join(words.get(word, word) for word in template.split())

    def reads_back(self, pipe: Any, template: str, slots: Slots, entries: Sequence[int]) -> bool:
        """Whether every tokenizer reads the written text as the tokens that the search chose."""
        text = self.written(template, slots, entries)
        for name in readers(pipe):
            chosen = dict(zip(slots.ids[name].tolist(), self.ids[name][list(entries)].tolist(), strict=True))
            before, after = (read(pipe, each, name) for each in (template, text))
            if [chosen.get(k, k) for k in before.ids[before.own]] != after.ids[after.own]:
                return False
        return True

    def allows(self, text: str, prompt: str = "") -> bool:
        """Whether a text has no forbidden word besides those of the prompt, which the search did not choose."""
        mine = [word for word in text.split() if word not in prompt.split()]
        return not contains(" ".join(mine), self.avoided)
