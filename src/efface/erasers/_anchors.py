"""The anchors of EIUP's swap form: which texts a phrase may read instead, and which of them it reads."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks
from .._text import encode
from ..core import Concept, shipped_anchors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DEFAULT = ("a red apple", "a stack of books", "a wrapped gift")
"""Anchors of concepts without a shipped one."""
BOUND = 0.65  # of a cosine: above, an anchor means the concept
PHRASES = 256  # of a row
THINGS = ("a dog", "a tree", "a car", "a cup", "a house", "a star", "a book", "a hat")  # whose mean text is no meaning
ARTICLES = ("a", "an", "the")

Sets = Sequence[tuple[Concept, ...]]
"""The concepts that are erased together, in each row."""
Candidates = list[dict[Concept, tuple[str, ...]]]
"""Of each set, the texts that may be the anchor of a concept."""


def check_size(concepts: Sequence[Concept]) -> None:
    """Raises ValueError if one row has more phrases than the forms that take them in turn can hold."""
    phrases = sum(len(concept.phrases) for concept in concepts)
    if phrases > PHRASES:
        raise ValueError(
            f"Expected at most {PHRASES} phrases in a row of EIUP, got {phrases}, of {len(concepts)} concepts. Give "
            "broader concepts with fewer phrases, remove some from the weights (`efface.UCE`), or choose "
            '`normalization="separate"`, which packs phrases.'
        )


def candidates(sets: Sets, given: Sequence[str]) -> Candidates:
    """The texts that may be the anchor of each concept, set by set.

    Raises:
        ValueError: an anchor of the user's is erased in the same set.
    """
    return [{concept: _candidates(concept, concepts, given) for concept in concepts} for concepts in sets]


def all_of(found: Candidates) -> tuple[str, ...]:
    """All candidates, each once."""
    return tuple(dict.fromkeys(itertools.chain(*(texts for some in found for texts in some.values()))))


def _plain(text: str) -> str:
    words = text.casefold().split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ARTICLES else words)


def _candidates(concept: Concept, concepts: Sequence[Concept], given: Sequence[str]) -> tuple[str, ...]:
    erased = {_plain(text): each for each in concepts for text in (each.name, *each.phrases)}
    own = (concept.anchor,) if concept.anchor else tuple(given)
    for texts in (own, *(() if own else (shipped_anchors().get(concept.name.partition(".")[0], ()), DEFAULT))):
        if free := tuple(text for text in texts if _plain(text) not in erased):
            return free
    anchor = own[0] if own else DEFAULT[0]
    other = erased[_plain(anchor)]
    if other == concept:
        problem = f"which is the concept {checks.shown(concept.name)} itself"
    elif other.anchor and any(_plain(other.anchor) == _plain(text) for text in (concept.name, *concept.phrases)):
        problem = f"which {checks.shown(other.name)} erases, whose anchor is {checks.shown(concept.name)} in turn"
    else:
        problem = f"which the concept {checks.shown(other.name)} erases"
    raise ValueError(
        f"Expected an anchor of {checks.shown(concept.name)} that may be drawn, got {checks.shown(anchor)}, {problem}. "
        "Choose another `anchor`."
    )


@torch.no_grad()
def meanings(pipe: DiffusionPipeline, texts: Sequence[str], settings: Mapping[str, Any]) -> Tensor:
    """The mean state of each text's tokens, less that of ordinary things, with length 1: [N, D]."""
    made = encode(pipe, [*THINGS, *texts], constant=True, **settings)
    means = torch.stack([states[own].double().mean(0) for states, own in zip(made.text, made.own, strict=True)])
    return F.normalize(means[len(THINGS) :] - means[: len(THINGS)].mean(0), dim=-1)


def warn(pipe: DiffusionPipeline, sets: Sets, given: Sequence[str]) -> None:
    """Warns of concepts all of whose anchors mean what is erased with them."""
    found = candidates(sets, given)
    for concepts, some in zip(sets, found, strict=True):
        alike = _alike(pipe, concepts, some, {})
        for concept, texts in some.items():
            nearest = min((float(alike[text].amax()), text) for text in texts)
            if nearest[0] > BOUND:
                checks.warn(
                    f"The anchor {checks.shown(nearest[1])} of {checks.shown(concept.name)} means nearly what is "
                    f"erased (cosine {nearest[0]:.2f}, above {BOUND}), so the concept may be drawn. Choose another "
                    "`anchor`."
                )


def chosen(
    pipe: DiffusionPipeline, sets: Sets, given: Sequence[str], settings: Mapping[str, Any]
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The number of each phrase's anchor among `all_of`: its nearest candidate that means no phrase of the set.

    The keys are the numbers of a set's phrases among all of the method's, as in `ErasurePrompts.which`.
    """
    found = candidates(sets, given)
    numbers = {text: k for k, text in enumerate(all_of(found))}
    of = [concept for concept in dict.fromkeys(itertools.chain(*sets)) for _ in concept.phrases]
    made = {}
    for concepts, some in zip(sets, found, strict=True):
        alike = _alike(pipe, concepts, some, settings) if any(len(texts) > 1 for texts in some.values()) else {}
        which, anchors, row = [], [], 0
        for concept in dict.fromkeys(concepts):
            texts = some[concept]
            if len(texts) > 1:
                others = [text for text in texts if float(alike[text].amax()) <= BOUND]
                texts = tuple(others) or (min(texts, key=lambda text: float(alike[text].amax())),)
            for k in range(len(concept.phrases)):
                at = row + k
                nearest = texts[0] if len(texts) == 1 else max(texts, key=lambda text: float(alike[text][at]))
                anchors.append(numbers[nearest])
            row += len(concept.phrases)
            which += [k for k, each in enumerate(of) if each == concept]
        made[tuple(which)] = tuple(anchors)
    return made


def _alike(
    pipe: DiffusionPipeline, concepts: Sequence[Concept], some: Mapping[Concept, Sequence[str]], settings: Any
) -> dict[str, Tensor]:
    """The cosines of each candidate with all phrases of a set."""
    phrases = [phrase for concept in dict.fromkeys(concepts) for phrase in concept.phrases]
    texts = list(dict.fromkeys(itertools.chain(*some.values())))
    if not phrases:
        return {}
    found = meanings(pipe, [*phrases, *texts], settings)
    return dict(zip(texts, (found[: len(phrases)] @ found[len(phrases) :].T).T, strict=True))
