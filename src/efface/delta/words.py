"""Puts new words on a pipeline's tokenizers and text encoders, finds them, and removes them again."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import checks
from .._text import SITES, encoder_of, readers
from .._weights import denoiser_of
from ..core import Concept, Handle
from ..hooks.copies import wake
from .applied import handles as delta_handles
from .embeddings import Substitute, ids_of, table

WORD = re.compile(r"<[a-z0-9][a-z0-9*.,:_-]*>")
HELD = "efface_words"  # the attribute of a tokenizer with new words


def check_words(words: Any) -> tuple[str, ...]:
    """Raises unless these are different words in angle brackets, which no text contains by chance."""
    found = checks.texts("words", words)
    if not found:
        raise ValueError('Expected at least one new word, got none. Write for example ("<watermark>",).')
    for k, word in enumerate(found):
        if not WORD.fullmatch(word) or len(word) > checks.SHOWN:
            cure = 'Write lower-case letters, digits and -.,:_* in angle brackets, such as "<watermark-1>".'
            raise ValueError(checks.refusal("a new word in angle brackets", word, cure))
        if word in found[:k]:
            raise ValueError(checks.refusal("different new words", word, "Leave one out, because it occurs twice."))
    return found


class Vocabulary:
    """A tokenizer with new words, and the hooks of its text encoder.

    Nothing changes the user's tokenizer: the pipeline gets a copy. Deep copies of the pipeline copy this object too.
    Without words the copy reads texts as the original does, in every pipeline that received it (`from_pipe`).

    Args:
        original: the pipeline's tokenizer.
        encoder: its text encoder.
        name: the tokenizer's name in the pipeline.
    """

    def __init__(self, original: Any, encoder: nn.Module, name: str) -> None:
        self.original, self.encoder, self.name = original, encoder, name
        self.tokenizer, self.size = copy.deepcopy(original), len(table(encoder))
        self.on: list[Any] = []  # Tokens, or what has their `words` and `embeddings`
        self.hooks: Substitute | None = None
        self.pipes: list[weakref.ref[Any]] = []

    @property
    def words(self) -> list[str]:
        return [word for each in self.on for word in each.words]

    def put(self, pipe: Any, entry: Any) -> None:
        self.on = [*self.on, entry]
        self._write()
        if pipe not in [ref() for ref in self.pipes]:
            self.pipes.append(weakref.ref(pipe))
        if getattr(pipe, self.name) is not self.tokenizer:
            setattr(pipe, self.name, self.tokenizer)

    def take(self, pipe: Any, entry: Any) -> None:
        self.on = [each for each in self.on if each is not entry]
        self._write()
        for each in [pipe, *(ref() for ref in self.pipes)] if not self.on else ():
            if each is not None and getattr(each, self.name, None) is self.tokenizer:
                setattr(each, self.name, self.original)

    def _write(self) -> None:
        """Writes the tokenizer and the hooks. The words get the next ids after those of the original."""
        from transformers import AddedToken

        fresh, words = copy.deepcopy(self.original), self.words
        if words:
            fresh.add_tokens([AddedToken(word, normalized=True, special=False) for word in words])
            ids = ids_of(fresh, words)
            for word, each in zip(words, ids.tolist(), strict=True):
                if list(fresh(f"a {word}a", add_special_tokens=False).input_ids).count(each) != 1:
                    raise ValueError(
                        f"Expected a tokenizer that can take the new word {word!r}, got a {type(fresh).__name__} that "
                        "splits it. Use other words."
                    )
        vars(self.tokenizer).clear()
        vars(self.tokenizer).update(vars(fresh))
        if self.hooks is not None:
            self.hooks.take_off()
            self.hooks = None
        if words:
            setattr(self.tokenizer, HELD, self)
            self.tokenizer.save_pretrained = _unsaved
            rows = [each.embeddings[self.name] for each in self.on]
            self.hooks = Substitute(self.encoder, ids, rows, instead=self._harmless(fresh))

    def _harmless(self, tokenizer: Any) -> int:
        """The id of a real token, none of the special ones, which the encoder sees in place of new ids."""
        special = {*tokenizer.all_special_ids, tokenizer.unk_token_id}
        return next(k for k in range(self.size) if k not in special)


def _unsaved(*_: Any, **__: Any) -> None:
    raise ValueError(
        "A tokenizer with new words cannot be saved, because the text encoder lacks their embeddings. Remove the "
        "`Tokens` first, and save them with `Tokens.save`."
    )


def vocabularies(pipe: Any) -> dict[str, Vocabulary]:
    """The vocabularies with new words, by the tokenizer's name."""
    wake(pipe)
    found = {name: getattr(getattr(pipe, name), HELD, None) for name in readers(pipe)}
    return {name: each for name, each in found.items() if each is not None}


def check_new(pipe: Any, words: Sequence[str], embeddings: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless every encoder of the pipeline has rows of its width, and no tokenizer knows a word."""
    here = readers(pipe)
    if missing := [name for name in here if name not in embeddings]:
        kind = type(encoder_of(pipe, missing[0])).__name__
        raise ValueError(
            f"Expected embeddings for every text encoder, got none for the {kind} of {missing[0]!r}. Fit the "
            "words on this pipeline, or load it without this encoder if it works so."
        )
    if more := [name for name in embeddings if name not in here]:
        raise ValueError(
            f"The words have embeddings for {more[0]!r}, but this {type(pipe).__name__} has no such text encoder. Use "
            "a pipeline like that of the fit."
        )
    if len({id(encoder_of(pipe, name)) for name in here}) < len(here):
        raise ValueError(
            f"Expected a text encoder for each of {', '.join(here)}, got one for several, where new words would clash. "
            "Load each encoder separately."
        )
    applied = vocabularies(pipe)
    for name in here:
        encoder, tokenizer = encoder_of(pipe, name), getattr(pipe, name)
        if hasattr(encoder, "_orig_mod") or getattr(encoder, "_compiled_call_impl", None):
            raise ValueError(
                f"Expected a text encoder that is not compiled, got a compiled one for {name!r}. Apply the words "
                "without `torch.compile` of the text encoder."
            )
        width = table(encoder).shape[1]
        if embeddings[name].shape[1] != width:
            raise ValueError(
                f"Expected embeddings of width {width} for {name!r}, got {embeddings[name].shape[1]}. Use words that "
                "were fitted on this model."
            )
        _check_unknown(tokenizer, words, applied.get(name))
        other = [hook for hook in encoder._forward_pre_hooks.values() if _of(hook) is not None]
        if other and name not in applied:
            raise ValueError(
                f"The text encoder of {name!r} is shared with another pipeline that has new words. Remove them there, "
                "or make this pipeline with `from_pipe` after the words are applied."
            )


def _of(hook: Any) -> Substitute | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, Substitute) and owner.instead is not None else None


def _check_unknown(tokenizer: Any, words: Sequence[str], held: Vocabulary | None) -> None:
    known = tokenizer.get_vocab()
    for word in words:
        if held is not None and word in held.words:
            raise ValueError(
                f"The word {word!r} is already on this pipeline, from other `Tokens`. Remove them first, or fit these "
                "with other words."
            )
        if word in known or f"{word}</w>" in known:
            raise ValueError(
                f"Expected new words, got {word!r}, which the tokenizer already knows. Fit with another word."
            )


def put(pipe: Any, entry: Any) -> None:
    """Makes the words of `entry` readable. If this fails, nothing stays."""
    check_new(pipe, entry.words, entry.embeddings)
    applied, done = vocabularies(pipe), []
    try:
        for name in readers(pipe):
            held = applied.get(name) or Vocabulary(getattr(pipe, name), encoder_of(pipe, name), name)
            done.append(held)
            held.put(pipe, entry)
    except BaseException:
        for held in done:
            held.take(pipe, entry)
        raise


def take(pipe: Any, held: Sequence[Vocabulary], entry: Any) -> None:
    """Removes the words of `entry`.

    Raises:
        ValueError: an applied eraser reads one of the words.
    """
    if pipe is not None:
        _check_unread(pipe, entry.words)
    for each in held:
        each.take(pipe, entry)


def _check_unread(pipe: Any, words: Sequence[str]) -> None:
    site = SITES.get(denoiser_of(pipe))
    for applied in site.applied if site else ():
        method = applied.method
        concepts = [*method.concepts, *(c for row in getattr(method, "rows", None) or () for c in row)]
        if read := _read(concepts, words):
            raise ValueError(
                f"{type(method).__name__} on this pipeline reads the word {read[0]!r}. Remove this eraser first."
            )


def _read(concepts: Iterable[Concept], words: Sequence[str]) -> list[str]:
    """The words that texts of concepts contain."""
    texts = [text.lower() for c in concepts for text in (*c.phrases, c.anchor, *c.keep)]
    return [word for word in words if any(word in text for text in texts)]


def named(pipe: Any, concepts: Iterable[Concept]) -> dict[str, dict[str, str]]:
    """For the facts of an artefact: the applied words that texts of its concepts contain, and the hash of their
    `Tokens`; {} if they contain none."""
    on = [each.eraser for each in handles(pipe)]
    found = {word: each.hash for each in on for word in _read(concepts, each.words)}
    return {"words": found} if found else {}


def handles(pipe: Any) -> list[Handle]:
    """One handle for each `Tokens` on the pipeline, in the order of application."""
    found = vocabularies(pipe)
    entries = {id(each): each for held in found.values() for each in held.on if hasattr(each, "config")}
    return [handle(pipe, each) for each in entries.values()]


def handle(pipe: Any, entry: Any) -> Handle:
    """The handle of tokens that are on the pipeline."""
    ref, held = weakref.ref(pipe), list(vocabularies(pipe).values())

    def remove() -> None:
        here = ref()
        take(here, held, entry)
        if entry.delta is not None and here is not None:
            for each in delta_handles(here):
                if each.eraser.hash == entry.delta.hash:
                    each.remove()

    return Handle(entry, _unchanging, remove)


def _unchanging(_: Any) -> None:
    raise ValueError("Tokens have nothing to set. Remove them, and apply others.")
