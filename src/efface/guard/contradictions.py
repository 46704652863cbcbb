"""What a policy must not say twice, or against itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core import Concept
    from .edit import Edit

DELTA = "a delta"


def check_contradictions(erased: Sequence[tuple[str, Concept]], deltas: Sequence[Edit]) -> None:
    """Raises ValueError if a concept has two strengths or two meanings, or is erased and also an anchor or kept.

    Args:
        erased: the concepts of run-time methods, each with the quoted name of its method.
        deltas: the weight edits.
    """
    if len({each.sha256 for each in deltas}) < len(deltas):
        raise ValueError("Expected different deltas, got one twice, whose change would count twice. Leave one out.")
    by_name: dict[str, Concept] = {}
    methods: dict[str, set[str]] = {}
    for name, concept in [*erased, *((DELTA, concept) for each in deltas for concept in each.concepts)]:
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
            if other := texts.get(text.casefold().strip()):
                raise ValueError(
                    f"The concept {other!r} is erased and also {use}{' text' if use == 'kept' else ''} of "
                    f"{concept.name!r}. Erase it, or choose another text."
                )
