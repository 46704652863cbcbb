"""Look-alikes: the target prompt in characters that a person reads the same, and a list of words does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import checks
from .._text import readers, unknown
from ..families import tokenizer_of
from ._contract import Access, Attack, Proposal, Target

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["Lookalike"]

SHAPES = {
    "cyrillic": dict(zip("aceopxyik", "асеорхуік", strict=True)),
    "accents": dict(zip("aeiouncsz", "áéíóúñçšž", strict=True)),
    "digits": dict(zip("aeiost", "431057", strict=True)),
    "full width": {chr(c): chr(c + 0xFEE0) for c in range(ord("a"), ord("z") + 1)},
}


@dataclass(frozen=True)
class Lookalike(Attack):
    """Writes the words of the target prompt in look-alike characters, with separated letters, or misspelt.

        prompt with each letter c replaced by s(c), s = Cyrillic, accents, digits or full width

    Then with letters apart ("b e e r"), with a hyphen, doubled and swapped letters. Subword tokenizers often still lead
    such texts to the concept, while the tokens of the erased phrases do not occur.

    Source: what people try against lists of words (homoglyphs, leetspeak, misspelling).

    Differs: words of one or two letters stay; texts with characters that a tokenizer does not know are left out.

    Args:
        kinds: which ones: "cyrillic", "accents", "digits", "full width", "apart", "hyphen", "doubled", "swapped".

    Shapes: none; texts only.

    Raises:
        ValueError: a kind is unknown; or the tokenizer knows none of the characters.

    Example:
        >>> Lookalike(("apart",)).kinds
        ('apart',)
    """

    access: ClassVar[Access] = "text"

    kinds: tuple[str, ...] = (*SHAPES, "apart", "hyphen", "doubled", "swapped")

    def __post_init__(self) -> None:
        known = (*SHAPES, "apart", "hyphen", "doubled", "swapped")
        object.__setattr__(self, "kinds", tuple(checks.choice("kinds", each, known) for each in self.kinds))

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        pipe, proposed = victim.pipe, False
        for kind in self.kinds:
            words = target.prompt.split()
            text = " ".join(_written(word, kind) if len(word) > 2 else word for word in words)
            if text != target.prompt and not any(unknown(tokenizer_of(pipe, name), text) for name in readers(pipe)):
                proposed = True
                yield Proposal(text, about=kind)
        if self.kinds and not proposed:
            raise ValueError(
                f"Expected a tokenizer that knows look-alikes of {checks.shown(target.prompt)}, got one that knows "
                "none. Use an attack in plain words, such as paraphrase."
            )


def _written(word: str, kind: str) -> str:
    if kind in SHAPES:
        return "".join(SHAPES[kind].get(letter, letter) for letter in word)
    middle = len(word) // 2
    return {
        "apart": " ".join(word),
        "hyphen": f"{word[:middle]}-{word[middle:]}",
        "doubled": f"{word[:middle]}{word[middle - 1]}{word[middle:]}",
        "swapped": f"{word[: middle - 1]}{word[middle]}{word[middle - 1]}{word[middle + 1 :]}",
    }[kind]
