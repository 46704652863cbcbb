"""`Concept`, and the shipped concepts."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from . import checks
from ._hazards import Hazard, hazards_of
from .fields import Converted
from .registry import near


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something that the model must not draw.

    Args:
        name: its name in files and reports.
        phrases: short texts that evoke it. They become erasure prompts. Default: `(name,)`.
        anchor: the text that methods with an anchor map the concept to. "" is the unconditional text; the swap form of
            `EIUP` then takes a shipped or default anchor.
        keep: related texts that methods with preservation leave unchanged.

    Raises:
        ValueError: `name` or a phrase is empty.
        TypeError: `name` is not a text, or `phrases` or `keep` is not a sequence of texts.

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
                f"Expected the phrases of {checks.shown(self.name)} to be texts, got an empty one. Remove it."
            )

    @property
    def hazards(self) -> tuple[Hazard, ...]:
        """The categories of published schemes to which a concept of this name is related. They claim no coverage."""
        return hazards_of(self.name)


ConceptLike = Concept | str
Concepts = ConceptLike | Sequence[ConceptLike]
ConceptsField = Converted[Concepts, tuple[Concept, ...]]


@functools.cache
def shipped_concepts() -> Mapping[str, Concept]:
    """The shipped concepts, by name."""
    return {name: found for name, (found, _) in _shipped().items()}


@functools.cache
def concept_sources() -> Mapping[str, str]:
    """The published source of a shipped concept's phrases, by name. Concepts without a published source are left
    out."""
    return {name: source for name, (_, source) in _shipped().items() if source}


@functools.cache
def shipped_anchors() -> Mapping[str, tuple[str, ...]]:
    """The shipped anchors, by the name of a concept, or of published lists: "nudity" for "nudity.safree"."""
    return _file()[1]


def _shipped() -> dict[str, tuple[Concept, str]]:
    """The shipped concepts with their sources."""
    return _file()[0]


@functools.cache
def _file() -> tuple[dict[str, tuple[Concept, str]], dict[str, tuple[str, ...]]]:
    """The shipped concepts with their sources, and the anchors. In the file, a concept without a source is a plain list
    of phrases."""
    file = resources.files("efface") / "concepts.json"
    try:
        data = json.loads(file.read_text("utf-8"))
        anchors = {name: checks.texts("anchors", texts) for name, texts in data.pop("anchors").items()}
        entries = {name: entry for group in data.values() for name, entry in group.items()}
        published = {name: entry for name, entry in entries.items() if isinstance(entry, dict)}
        phrases = entries | {name: entry["phrases"] for name, entry in published.items()}
        sources = {name: str(entry["source"]) for name, entry in published.items()}
        return {name: (Concept(name, tuple(some)), sources.get(name, "")) for name, some in phrases.items()}, anchors
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} is missing. Reinstall efface.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{file} is damaged ({error}). Reinstall efface.") from error


def concept(name: str) -> Concept:
    """The shipped concept of that name.

    Args:
        name: a name from `efface list concepts`. Upper and lower case differ. Names with a dot, such as
            "nudity.safree", are published word lists; `efface list concepts` shows their sources.

    Raises:
        ValueError: there is no such concept. The message lists near matches. Write other texts as `Concept("...")`.
        TypeError: `name` is not a text.

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
            f"all. Write any other text as Concept({checks.shown(name)}), on the command line as --phrase."
        )
    return known[name]


def as_concepts(concepts: Concepts, known: Sequence[Concept] = ()) -> tuple[Concept, ...]:
    """Concepts from names and `Concept` objects. A name must be in `known` or belong to a shipped concept."""
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
    """One tuple of concepts per prompt of the batch. None means the same concepts for every prompt."""
    if rows is None:
        return None
    if isinstance(rows, (str, Concept)) or not isinstance(rows, Sequence):
        raise TypeError(
            f"Expected `rows` to hold one list of concepts per prompt, got {checks.shown(rows)}. "
            "Write for example [['alcohol'], []] for two prompts."
        )
    return tuple(as_concepts(row, known) for row in rows)
