"""Proposes further phrases for a concept, from the neighbours of its phrases in the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from ._text import check_phrases, encoder_of, read, readers
from .attacks._words import words
from .core import Concept, ConceptLike, as_concepts
from .erasers._anchors import meanings
from .families import tokenizer_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

POOL = 256  # words of the vocabulary that are compared as the encoder reads them
TOGETHER = 64  # texts that are encoded in one call


@dataclass(frozen=True)
class PhraseProposal:
    """A text that may evoke a concept, for a person to accept or to drop.

    Args:
        phrase: the text.
        nearest: the concept's phrase that means most nearly the same.
        cosine: how alike the two are in the text encoder; 1 is the same.
        covered: how much of its meaning the concept's phrases span together, from 0 to 1. Near 1, it adds little.

    Raises:
        AttributeError: a field is set. The object is frozen.

    Example:
        >>> from efface.phrases import PhraseProposal
        >>> PhraseProposal("brewery", "beer mug", 0.62, 0.48).phrase
        'brewery'
    """

    phrase: str
    nearest: str
    cosine: float
    covered: float


@torch.no_grad()
def propose_phrases(
    pipe: DiffusionPipeline,
    concept: ConceptLike,
    *,
    n: int = 20,
    texts: Sequence[str] | None = None,
    least: float = 0.35,
    most_covered: float = 0.95,
) -> tuple[PhraseProposal, ...]:
    """Proposes texts that the text encoder reads nearly like a concept's phrases, most alike first.

    Nothing is added to the concept. Read the list, and put into `Concept(name, phrases)` what belongs to it. The
    encoder also holds words alike that only occur in the same texts, such as opposites. It proposes words, not things
    that the model draws, and no list is complete.

    A text's meaning m is the mean state of its tokens, less that of ordinary things, with length 1. For the meanings
    P [K, D] of the concept's K phrases:

        cosine = max_k <m, P_k>,    covered = |projection of m onto the span of P|^2

    Args:
        pipe: the pipeline whose text encoder is asked.
        concept: a shipped concept's name, or a `Concept`.
        n: the largest number of proposals, >= 1.
        texts: what to choose from. None: the 256 words of the first tokenizer whose input embeddings are most like
            those of a phrase.
        least: the smallest cosine, from -1 to 1.
        most_covered: the largest `covered`, from 0 to 1. 1 also proposes what the phrases span already.

    Shapes: none; texts only.

    Raises:
        ValueError: the concept is unknown, a number is out of range, a text is empty or over the encoder's limit, or
            the tokenizer has no words of its own.
        TypeError: `concept` or `texts` has another type.

    Example:
        >>> import efface
        >>> pipe = efface.load("emoji")
        >>> found = efface.propose_phrases(pipe, "alcohol", texts=["brewery", "a red apple"])
        >>> [(each.phrase, each.nearest) for each in found]
        [('brewery', 'beer mug')]
    """
    checks.whole("n", n)
    checks.number("least", least, -1, 1)
    checks.share("most_covered", most_covered)
    wanted, *others = as_concepts(concept)
    if others:
        raise ValueError(checks.refusal("one concept", [wanted.name, others[0].name], "Ask for each on its own."))
    check_phrases(pipe, wanted.phrases)
    known = {_plain(text) for text in (*wanted.phrases, *wanted.keep)}
    if texts is None:
        candidates = _neighbours(pipe, wanted)
    else:
        candidates = checks.texts("texts", texts)
        check_phrases(pipe, candidates)
    candidates = tuple(dict.fromkeys(text for text in candidates if _plain(text) not in known))
    if not candidates:
        return ()
    own = meanings(pipe, wanted.phrases, {})
    parts = [meanings(pipe, candidates[k : k + TOGETHER], {}) for k in range(0, len(candidates), TOGETHER)]
    meant = torch.cat(parts)
    alike = meant @ own.T
    basis = torch.linalg.qr(own.T).Q  # phrases that mean nearly the same only lengthen it
    covered = (meant @ basis).square().sum(-1).clamp(0, 1)
    found = [
        PhraseProposal(text, wanted.phrases[int(row.argmax())], float(row.amax()), float(share))
        for text, row, share in zip(candidates, alike, covered, strict=True)
        if float(row.amax()) >= least and float(share) <= most_covered
    ]
    return tuple(sorted(found, key=lambda each: -each.cosine)[:n])


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _neighbours(pipe: DiffusionPipeline, concept: Concept) -> tuple[str, ...]:
    """The words of the first tokenizer whose input embeddings are most like those of a phrase."""
    name = readers(pipe)[0]
    tokenizer = tokenizer_of(pipe, name)
    every = words(tokenizer)
    ids = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in every])
    table: Tensor = encoder_of(pipe, name).get_input_embeddings().weight.detach()
    embedded = table[ids.to(table.device)].float()
    middle = embedded.mean(0)
    phrases = []
    for phrase in concept.phrases:
        seen = read(pipe, phrase, name)
        phrases.append(table[torch.tensor(seen.ids[seen.own], device=table.device)].float().mean(0))
    alike = F.normalize(embedded - middle, dim=-1) @ F.normalize(torch.stack(phrases) - middle, dim=-1).T
    best = alike.amax(-1).topk(min(POOL, len(every))).indices
    return tuple(every[k] for k in best.tolist())
