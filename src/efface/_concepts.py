"""`Concept`, and the concepts that come with Efface."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from . import checks
from .fields import Converted
from .registry import near


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something that must not be drawn.

    Args:
        name: what to call it in files and reports.
        phrases: short texts that evoke it; `(name,)` if left empty. They become erasure prompts.
        anchor: text to map the concept onto, for methods that need one; "" is the unconditional text.
        keep: neighbours that must survive, for methods that can preserve.

    Raises:
        ValueError: an empty name or phrase.
        TypeError: a name that is no text, or `phrases` or `keep` that are no sequence of texts.

    Example:
        >>> from efface import Concept
        >>> Concept("neon sign").phrases
        ('neon sign',)
    """

    name: str
    phrases: tuple[str, ...] = ()
    anchor: str = ""
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks.text("name", self.name)
        checks.text("anchor", self.anchor, empty=True)
        phrases, keep = (checks.texts(field, getattr(self, field)) for field in ("phrases", "keep"))
        object.__setattr__(self, "phrases", phrases or (self.name,))
        object.__setattr__(self, "keep", keep)
        if not all(p.strip() for p in self.phrases):
            raise ValueError(
                f"Expected the phrases of {checks.shown(self.name)} to be texts, got an empty one. Remove it: an empty "
                "text erases nothing."
            )


ConceptLike = Concept | str
Concepts = ConceptLike | Sequence[ConceptLike]
ConceptsField = Converted[Concepts, tuple[Concept, ...]]


@functools.cache
def shipped_concepts() -> Mapping[str, Concept]:
    """The concepts that come with Efface, by name."""
    return {name: found for name, (found, _) in _shipped().items()}


@functools.cache
def concept_sources() -> Mapping[str, str]:
    """Where the phrases of a shipped concept were published, by name; concepts with phrases of ours are left out."""
    return {name: source for name, (_, source) in _shipped().items() if source}


def _shipped() -> dict[str, tuple[Concept, str]]:
    """The shipped concepts with their sources. Ours have a list of phrases; published ones name their source."""
    file = resources.files("efface") / "concepts.json"
    try:
        data = json.loads(file.read_text("utf-8"))
        entries = {name: entry for group in data.values() for name, entry in group.items()}
        published = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
        phrases = entries | {name: entry["phrases"] for name, entry in published.items()}
        sources = {name: str(entry["source"]) for name, entry in published.items()}
        return {name: (Concept(name, tuple(some)), sources.get(name, "")) for name, some in phrases.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Reinstall efface.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Reinstall efface.") from error


def concept(name: str) -> Concept:
    """The shipped concept of that name.

    Args:
        name: one of those that `efface list concepts` shows; upper and lower case differ. Names with a dot, such as
            "nudity.safree", are published word lists; the list shows their sources.

    Raises:
        ValueError: no such concept; the message lists near matches. A free text is written `Concept("...")`.
        TypeError: the name is no text.

    Example:
        >>> import efface
        >>> efface.concept("alcohol").phrases[:2]
        ('beer mug', 'wine glass')
        >>> efface.concept("unsafe.uce").phrases
        ('violence', 'nudity', 'harm')
    """
    known = shipped_concepts()
    if not isinstance(name, str):
        raise TypeError(
            f"Expected the name of a shipped concept, got {checks.shown(name)}. Give a text, such as 'alcohol'."
        )
    if not name.strip():
        raise ValueError(
            "Expected the name of a shipped concept, got an empty text. Choose one from `efface list concepts`."
        )
    if name not in known:
        hint = near(name, known)
        raise ValueError(
            f"{checks.shown(name)} is not a shipped concept. {hint}{' ' if hint else ''}`efface list concepts` shows "
            f"all. Write a text of your own as Concept({checks.shown(name)}), on the command line as --phrase."
        )
    return known[name]


def as_concepts(concepts: Concepts, known: Sequence[Concept] = ()) -> tuple[Concept, ...]:
    """Concepts from names and `Concept` objects; a bare name must be one of `known` or a shipped one."""
    if isinstance(concepts, (Concept, str)):
        concepts = (concepts,)
    names = {c.name: c for c in known}
    if not isinstance(concepts, Sequence) or not all(isinstance(c, (Concept, str)) for c in concepts):
        raise TypeError(
            f"Expected a Concept, a shipped name, or a sequence of these, got {checks.shown(concepts)}. "
            "Write for example ['alcohol', Concept('neon sign')]."
        )
    return tuple(c if isinstance(c, Concept) else names[c] if c in names else concept(c) for c in concepts)


Rows = Sequence[Concepts] | None
RowsField = Converted[Rows, tuple[tuple[Concept, ...], ...] | None]


def as_rows(rows: Rows, known: Sequence[Concept]) -> tuple[tuple[Concept, ...], ...] | None:
    """One tuple of concepts per prompt of the batch, or None for "the same everywhere"."""
    if rows is None:
        return None
    if isinstance(rows, (str, Concept)) or not isinstance(rows, Sequence):
        raise TypeError(
            f"Expected `rows` to hold one list of concepts per prompt, got {checks.shown(rows)}. "
            "Write for example [['alcohol'], []] for two prompts."
        )
    return tuple(as_concepts(row, known) for row in rows)
