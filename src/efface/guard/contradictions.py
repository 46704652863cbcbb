"""What a policy must not say twice, or against itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import registry

if TYPE_CHECKING:
    from ..core import Concept
    from .edit import Edit
    from .policy import Erasure

DELTA = "a delta"


def check_contradictions(erase: Sequence[Erasure], deltas: Sequence[Edit]) -> None:
    """Raises ValueError if a concept has two strengths or two meanings, or is erased and also an anchor or kept."""
    if len({each.sha256 for each in deltas}) < len(deltas):
        raise ValueError("Expected different deltas, got one twice, whose change would count twice. Leave one out.")
    by_name: dict[str, Concept] = {}
    methods: dict[str, set[str]] = {}
    uses = [(repr(registry.split(each.method)[0]), concept) for each in erase for concept in each.anchored]
    for name, concept in [*uses, *((DELTA, concept) for each in deltas for concept in each.concepts)]:
        if by_name.setdefault(concept.name, concept) != concept:
            raise ValueError(f"The concept {concept.name!r} occurs with different phrases or anchors. Write it once.")
        if name in methods.setdefault(concept.name, set()):
            raise ValueError(
                f"The concept {concept.name!r} is erased twice by {name}, so it would have two strengths. Erase it "
                "once."
            )
        methods[concept.name].add(name)
    texts = {text.casefold().strip(): name for name, c in by_name.items() for text in (name, *c.phrases)}
    for concept in by_name.values():
        for use, text in [("an anchor", concept.anchor), *(("kept", keep) for keep in concept.keep)]:
            if erased := texts.get(text.casefold().strip()):
                raise ValueError(
                    f"The concept {erased!r} is erased and also {use}{' text' if use == 'kept' else ''} of "
                    f"{concept.name!r}. Erase it, or choose another text."
                )
