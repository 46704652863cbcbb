"""Translations: the words of the target prompt in other languages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from .. import checks
from .._text import cut_off, readers, unknown
from ..families import tokenizer_of
from ._contract import Access, Attack, Proposal, Target

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["Translation"]

# English -> the same in German, French, Spanish, Italian, Portuguese and Dutch. Ours.
WORDS: Mapping[str, tuple[str, ...]] = {
    "beer": ("Bier", "bière", "cerveza", "birra", "cerveja", "bier"),
    "wine": ("Wein", "vin", "vino", "vino", "vinho", "wijn"),
    "glass": ("Glas", "verre", "vaso", "bicchiere", "copo", "glas"),
    "bottle": ("Flasche", "bouteille", "botella", "bottiglia", "garrafa", "fles"),
    "pub": ("Kneipe", "taverne", "taberna", "osteria", "taberna", "kroeg"),
    "night": ("Nacht", "nuit", "noche", "notte", "noite", "nacht"),
    "knife": ("Messer", "couteau", "cuchillo", "coltello", "faca", "mes"),
    "sword": ("Schwert", "épée", "espada", "spada", "espada", "zwaard"),
    "bomb": ("Bombe", "bombe", "bomba", "bomba", "bomba", "bom"),
    "cigarette": ("Zigarette", "cigarette", "cigarrillo", "sigaretta", "cigarro", "sigaret"),
    "skull": ("Schädel", "crâne", "calavera", "teschio", "caveira", "schedel"),
    "cat": ("Katze", "chat", "gato", "gatto", "gato", "kat"),
    "dog": ("Hund", "chien", "perro", "cane", "cão", "hond"),
    "car": ("Auto", "voiture", "coche", "macchina", "carro", "auto"),
    "parachute": ("Fallschirm", "parachute", "paracaídas", "paracadute", "paraquedas", "parachute"),
    "church": ("Kirche", "église", "iglesia", "chiesa", "igreja", "kerk"),
}


@dataclass(frozen=True)
class Translation(Attack):
    """Replaces words of the target prompt by their translations, all of one language at a time.

        prompt with each known word w replaced by t_l(w), for each language l

    A text encoder that was trained on many languages may read them as the concept, while a list of English phrases
    does not cover them.

    Source: what people try against English word lists.

    Differs: the shipped dictionary has 16 words in 6 languages; give `dictionary` for others. A prompt without a known
    word is refused. Words that the tokenizer cannot read leave a candidate out.

    Args:
        dictionary: word -> its translations, in the same order of languages for all words. Added to the shipped ones.
        alone: whether to also propose the translated words without the rest of the prompt.

    Shapes: none; texts only.

    Raises:
        ValueError: a translation is empty; or the prompt has no word with a translation that the tokenizer can read.

    Example:
        >>> Translation({"house": ("Haus",)}).dictionary["house"]
        ('Haus',)
    """

    access: ClassVar[Access] = "text"

    dictionary: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    alone: bool = True

    def __post_init__(self) -> None:
        made = {word: checks.texts(f"dictionary[{word!r}]", each) for word, each in dict(self.dictionary).items()}
        for each in made.values():
            for text in each:
                checks.text("dictionary", text)
        object.__setattr__(self, "dictionary", made)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        known, proposed = {**WORDS, **self.dictionary}, False
        here = [word for word in target.prompt.split() if known.get(_bare(word))]
        for k in range(max((len(known[_bare(word)]) for word in here), default=0)):
            swap = {word: known[_bare(word)][k] for word in here if k < len(known[_bare(word)])}
            whole = " ".join(swap.get(word, word) for word in target.prompt.split())
            texts = [whole, " ".join(swap.values())] if self.alone else [whole]
            for text in dict.fromkeys(texts):
                if _readable(victim, text):
                    proposed = True
                    yield Proposal(text, about="translated")
        if not proposed:
            raise ValueError(
                f"Expected a prompt with words that have translations and that the tokenizer can read, got "
                f"{checks.shown(target.prompt)}. Give `dictionary`, or another prompt."
            )


def _bare(word: str) -> str:
    return re.sub(r"\W", "", word).lower()


def _readable(victim: Victim, text: str) -> bool:
    """Whether all text encoders know its characters, and one reads all of it."""
    pipe = victim.pipe
    return not any(unknown(tokenizer_of(pipe, name), text) for name in readers(pipe)) and not cut_off(pipe, text)
