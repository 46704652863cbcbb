"""The hazard categories of an audit: a cross-reference, never a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._hazards import hazards_of, schemes
from .verdict import NOT_JUDGED


def categories(concepts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each category of each scheme, with the audited concepts that are related to it, or why there is none.

    Args:
        concepts: the concepts of an audit, with `concept`, `n`, `prompts` and `verdict`.

    Returns:
        `scheme`, `version`, `id`, `title`, `concepts` (name, relation, pictures, prompts, and whether it was judged)
        and `note`. What was found is left out, because a category has no verdict.
    """
    found = []
    for name, scheme in schemes().items():
        for each, title in scheme["categories"].items():
            related = [
                {
                    "concept": concept["concept"],
                    "relation": hazard.relation.replace("_", "-"),
                    "n": concept["n"],
                    "prompts": concept["prompts"],
                    "judged": concept["verdict"]["outcome"] != NOT_JUDGED,
                }
                for concept in concepts
                for hazard in hazards_of(concept["concept"])
                if (hazard.scheme, hazard.id) == (name, each)
            ]
            never = each in scheme["never"]
            note = "not tested, by policy" if never else "" if related else "not judged"
            found.append(
                {"scheme": scheme["title"], "version": scheme["version"], "id": each, "title": title}
                | {"concepts": [] if never else related, "note": note}
            )
    return found
