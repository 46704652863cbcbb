"""What attacks that search for words, or for their embeddings, share: their checks, the loop of those by gradients,
and the texts that they propose."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .. import checks
from ._contract import Attack, Proposal
from ._tokens import check_tokens
from ._vocabulary import Slots, Vocabulary
from ._whitebox import check_white


@dataclass(frozen=True)
class TokenAttack(Attack):
    """The base of attacks that put words, or embeddings in place of words, into a prompt.

    Every whole-number field is a count. Fields named `lr`, `weight_decay` and `forbidden` mean the same in all attacks.
    """

    _least: ClassVar[Mapping[str, int]] = {}
    """The smallest value of a count, if it is not 1."""
    calls_denoiser: ClassVar[bool] = False
    """Whether it calls the denoiser with texts, latents and times of its own."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                checks.whole(each.name, value, self._least.get(each.name, 1))
            elif each.name in ("lr", "weight_decay"):
                checks.number(each.name, value, 0, above=each.name == "lr")
            elif each.name == "forbidden":
                checks.each(self, checks.texts, "forbidden")

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        if self.calls_denoiser:
            check_white(pipe)
        check_tokens(pipe)


def texts(
    pipe: Any, vocabulary: Vocabulary, template: str, slots: Slots, found: Iterable[tuple[Sequence[int], str]]
) -> Iterator[Proposal]:
    """Proposes each new text that reads back as the words found; `found` says what to say about them."""
    proposed = {""}
    for entries, about in found:
        written = vocabulary.written(template, slots, entries)
        if written not in proposed and vocabulary.reads_back(pipe, template, slots, entries):
            proposed.add(written)
            yield Proposal(written, about=about)
