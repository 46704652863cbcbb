"""A page for each shipped concept, from `concepts.json`, `hazards.json`, the embedded suite and the cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources

from efface import _hazards
from efface.core import Concept, concept_sources, shipped_anchors, shipped_concepts
from efface.models import emoji
from experiments.docs import card, table
from experiments.worlds import CONCEPTS, TUNED

from . import cards

RELATIONS = {
    "exact": "the same",
    "narrower": "a part of the category",
    "broader": "wider than the category",
    "related": "related to it",
    "stand_in": "a harmless stand-in for it",
}
GROUPS = {
    "unsafe": "Unsafe content",
    "emoji groups": "Groups of things that the embedded model draws",
    "emoji things": "Things that the embedded model draws",
    "styles": "Styles",
    "marks": "Marks",
    "published": "Published word lists",
}
ON_TUNING_SEEDS = ("alcohol", "weapon")
"""The concepts whose phrases were chosen by drawing, see docs/results.md."""


def groups() -> Mapping[str, tuple[str, ...]]:
    """The groups of `concepts.json`, with their concepts."""
    data = json.loads((resources.files("efface") / "concepts.json").read_text("utf-8"))
    return {group: tuple(entries) for group, entries in data.items() if group != "anchors"}


def file_of(name: str) -> str:
    return f"concepts/{re.sub('[^a-z0-9.]+', '-', name.casefold())}.md"


def index() -> str:
    known, parts = shipped_concepts(), []
    for group, names in groups().items():
        rows = [
            [f"[{name}]({file_of(name).removeprefix('concepts/')})", str(len(known[name].phrases)), _state(name)]
            for name in names
        ]
        parts.append(f"## {GROUPS.get(group, group.capitalize())}\n\n{table(['concept', 'phrases', 'figures'], rows)}")
    return "\n\n".join(
        [
            "# Shipped concepts",
            'Each has a page with its phrases, what was measured, and what was not. `efface.concept("alcohol")` gives '
            "one in Python, `--concept alcohol` on the command line. Any other text works too: "
            '`efface.Concept("neon sign")`, or `--phrase`.',
            "A concept is only as wide as its phrases. Read them before you rely on it.",
            *parts,
        ]
    )


def _state(name: str) -> str:
    return "on `emoji`" if any(cards.of_concept(name)) else "none"


def page(name: str) -> str:
    concept = shipped_concepts()[name]
    return "\n\n".join(
        [
            f"# {name}",
            f"```python\nefface.concept({json.dumps(name)})\n```",
            "## Phrases",
            "\n".join(f"- {phrase}" for phrase in concept.phrases),
            *_origin(concept),
            "## Anchor, and what to retain",
            _anchor(concept),
            "## Hazard labels",
            *_labels(concept),
            "## What was measured",
            *(list(cards.of_concept(name)) or [_nothing(name)]),
            "## What was tuned",
            _tuned(name),
        ]
    )


def _origin(concept: Concept) -> list[str]:
    if concept.name in concept_sources():
        return [f"Source: {concept_sources()[concept.name]}."]
    if concept.name in ON_TUNING_SEEDS:
        origin = "They were chosen by drawing on tuning seeds (below 10,000), so they are not blind."
    else:
        origin = "No card says how they were chosen, so do not take them for blind."
    return [f"{origin} {_overlap(concept)}".strip()]


def _overlap(concept: Concept) -> str:
    """How many phrases are prompts of the suite word for word."""
    if not (prompts := _prompts(concept.name)):
        return ""
    same = [phrase for phrase in concept.phrases if any(_bare(phrase) == _bare(prompt) for prompt in prompts)]
    return (
        f"Of {len(concept.phrases)}, {len(same)} {'is a prompt' if len(same) == 1 else 'are prompts'} of the embedded "
        "suite word for word, except for articles. Rates on prompts that name the concept say little about other words "
        "for it."
    )


def _prompts(name: str) -> list[str]:
    """The prompts of the embedded suite that name a concept."""
    try:
        return [text for text, _ in emoji.prompts(name, "explicit")]
    except (KeyError, ValueError):
        return []


def _bare(text: str) -> str:
    return " ".join(word for word in text.casefold().split() if word not in ("a", "an", "the"))


def _anchor(concept: Concept) -> str:
    anchor = (
        f"The anchor is {concept.anchor!r}."
        if concept.anchor
        else "Editors map it to the unconditional text. `--anchor` names another text."
    )
    if shipped := shipped_anchors().get(concept.name.partition(".")[0]):
        anchor += f" EIUP's form `swap` draws {', '.join(map(repr, shipped))} in its place."
    keep = (
        f"Methods with preservation retain {', '.join(concept.keep)}."
        if concept.keep
        else "No text to retain ships with it. Name the neighbours that matter to you with `--keep`."
    )
    return f"{anchor} {keep}"


def _labels(concept: Concept) -> list[str]:
    if not concept.hazards:
        return ["It has none."]
    rows = [
        [
            f"{_hazards.schemes()[each.scheme]['title']} ({each.version})",
            f"`{each.id}` {_hazards.schemes()[each.scheme]['categories'][each.id]}",
            RELATIONS[each.relation],
        ]
        for each in concept.hazards
    ]
    return [
        table(["scheme", "category", "the concept is"], rows),
        "A label is a cross-reference. It never says that the category is covered.",
    ]


def _nothing(name: str) -> str:
    if name in CONCEPTS:
        return (
            "Not measured: no card has figures for this concept yet. The embedded model draws it, so `efface bench "
            f'emoji --concept "{name}"` measures it.'
        )
    if _prompts(name):
        return (
            "Not measured: no card has figures for this concept. The embedded model draws things of this kind, but no "
            "experiment has them."
        )
    return (
        "Not measured: no embedded model draws this concept, and nothing was run on a model that does. Measure it on "
        "yours with `efface audit`, with a detector of yours."
    )


def tuned() -> set[str]:
    """The concepts on which settings were chosen: in the experiments of today, and in the cards of earlier ones."""
    cells = [
        cell for each in ("eiup_sweep", "editors_tuning", "editors_tuning_trained") for cell in card(each)["cells"]
    ]
    return {*TUNED, *(concept for concept, _ in cells), *(c for c, _ in card("pareto").get("tuning_cells", ()))}


def _tuned(name: str) -> str:
    if name in tuned():
        return "Settings of methods were chosen on this concept, on tuning seeds."
    if name in CONCEPTS:
        return "No setting was chosen on this concept: the experiments have no tuning block for it."
    return "No experiment has this concept, so no setting was chosen on it."
