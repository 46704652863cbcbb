"""GCG: searches, on the text encoder alone, for a text without forbidden words that means the same as the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ..delta.embeddings import Rows, frozen, substituted, tables
from ._contract import Access, Proposal, Target, Victim
from ._encoders import summaries
from ._search import TokenAttack
from ._tokens import check_prompt
from ._vocabulary import Slots, Vocabulary, forbidden

__all__ = ["GCG"]


@dataclass(frozen=True)
class GCG(TokenAttack):
    """Greedy coordinate gradient (GCG) on the text encoder, towards the target sentence; the text part of MMA.

        max_words cos( s(words), s(P) )                s: the state that represents a whole text, P: the target's prompt
        gradient at each place: the `top` words that raise the cosine most
        `candidates` texts with one of these words exchanged; the best one is the next text

    It uses gradients of the text encoder, which is public for open models. The attacked model only gets texts, so the
    attack has text access. It also tests filters of prompts.

    Paper: Y. Yang, R. Gao, X. Wang, T.-Y. Ho, N. Xu, Q. Xu, 2024, "MMA-Diffusion: MultiModal Attack on Diffusion
    Models", CVPR 2024, arXiv 2311.17516, section 3.2. The search is A. Zou, Z. Wang, N. Carlini, M. Nasr, J. Z. Kolter,
    M. Fredrikson, 2023, arXiv 2307.15043, algorithm 1.

    Differs: written from the description; no code of the authors was used. The gradient of a place is that of the word
    at this place. The official code takes that of its neighbour, because it counts the start token. A step in which no
    candidate reads back as its words keeps the text. The words are whole words that every tokenizer reads back. A
    causal encoder represents a text by the state of its end token (CLIP's pooled state before the projection), others
    by the mean state of the text's tokens; several encoders add their cosines. The start is random words, not letters.

    Args:
        tokens: words of the text, >= 1; paper: 20.
        steps: exchanges per text, >= 1; paper: 1000.
        top: words per place that an exchange may use, >= 1; paper: 256.
        candidates: texts per step, >= 1; paper: 512.
        restarts: texts to search for, >= 1; paper: 10.
        every: steps between two proposals, >= 1.
        batch: texts per call of the encoders, >= 1.
        forbidden: words that the text must not contain. None: those of the concept's name and phrases.

    Shapes: one-hot words [k, V]; states [N, D] for each text encoder.

    Raises:
        ValueError: a field is out of range; a tokenizer has no table of tokens, or a text encoder no embeddings that
            gradients reach; or the text is too long.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> import efface.testing
        >>> efface.GCG(tokens=8, steps=50).check(efface.testing.pipeline("sd1"))
        >>> efface.GCG.access
        'text'
    """

    access: ClassVar[Access] = "text"

    tokens: int = 20
    steps: int = 1000
    top: int = 256
    candidates: int = 512
    restarts: int = 10
    every: int = 100
    batch: int = 128
    forbidden: tuple[str, ...] | None = None

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        pipe, generator = victim.pipe, Generator().manual_seed(target.seed)
        self.check(pipe)
        vocabulary = Vocabulary.of(pipe, forbidden(target.concept, self.forbidden))
        slots = Slots.of(pipe, self.tokens)
        search = Coordinates(pipe, vocabulary, slots, target.prompt, self.batch)
        check_prompt(pipe, search.template, self.tokens)
        proposed: set[str] = set()
        for _ in range(self.restarts):
            entries = torch.randint(len(vocabulary), (self.tokens,), generator=generator)
            best, score = entries, search.scores([entries])[0]
            for step in range(1, self.steps + 1):
                tried = search.exchanged(entries, self.top, self.candidates, generator)
                if tried:
                    scores = search.scores(tried)
                    entries = tried[max(range(len(tried)), key=scores.__getitem__)]
                    if max(scores) > score:
                        best, score = entries, max(scores)
                written = search.written(best)
                if (step % self.every == 0 or step == self.steps) and written not in proposed:
                    proposed.add(written)
                    yield Proposal(written, about=f"after {step} steps: cosine {score:.3f}")


class Coordinates:
    """The search space: texts of k words, and how near each is to the goal.

    Args:
        pipe: the pipeline, of which only tokenizers and text encoders are used.
        vocabulary: the allowed words.
        slots: k words that stand for those of the search.
        goal: the text to be near to.
        batch: texts per call of the encoders.
    """

    def __init__(self, pipe: Any, vocabulary: Vocabulary, slots: Slots, goal: str, batch: int) -> None:
        self.pipe, self.vocabulary, self.slots, self.batch = pipe, vocabulary, slots, batch
        self.template, self.table = " ".join(slots.words), vocabulary.embeddings(tables(pipe))
        self.goal = summaries(pipe, [goal])

    def written(self, entries: Tensor) -> str:
        return self.vocabulary.written(self.template, self.slots, entries.tolist())

    def nearness(self, found: Rows) -> Tensor:
        """The mean cosine [N] over the encoders."""
        cosines = [torch.cosine_similarity(each, self.goal[name]) for name, each in found.items()]
        return torch.stack(cosines).mean(0)

    def scores(self, some: list[Tensor]) -> list[float]:
        """The nearness of texts."""
        texts, found = [self.written(entries) for entries in some], []
        for k in range(0, len(texts), self.batch):
            found += self.nearness(summaries(self.pipe, texts[k : k + self.batch])).tolist()
        return found

    def relaxed(self, shares: Tensor) -> Tensor:
        """The nearness of a text with shares [k, V] of words at each place, with gradients."""
        rows = {name: shares @ each for name, each in self.table.items()}
        with substituted(self.pipe, self.slots.ids, rows):
            return self.nearness(summaries(self.pipe, [self.template], differentiable=True))[0]

    def gradient(self, entries: Tensor) -> Tensor:
        """The gradient [k, V] of the nearness with respect to one-hot words."""
        like = next(iter(self.table.values()))
        shares = torch.nn.functional.one_hot(entries.to(like.device), len(self.vocabulary)).to(like).requires_grad_()
        with frozen(self.pipe), torch.enable_grad():
            near = self.relaxed(shares)
            if not near.requires_grad:
                raise ValueError(
                    "Expected a text encoder with gradients with respect to its input embeddings, got one without. "
                    "Use an attack that needs no gradients, such as ring_a_bell."
                )
            return torch.autograd.grad(near, shares)[0]

    def exchanged(self, entries: Tensor, top: int, candidates: int, generator: Generator) -> list[Tensor]:
        """Texts with one word exchanged for one of the `top` of its place, that read back and are allowed."""
        best = self.gradient(entries).topk(min(top, len(self.vocabulary)), dim=-1).indices.cpu()
        place = torch.arange(candidates) % len(entries)  # about equally many for each place
        choice = torch.randint(best.shape[1], (candidates,), generator=generator)
        found = []
        for k, c in dict.fromkeys(zip(place.tolist(), choice.tolist(), strict=True)):
            changed = entries.clone()
            changed[k] = best[k, c]
            words = changed.tolist()
            fits = self.vocabulary.reads_back(self.pipe, self.template, self.slots, words)
            if not torch.equal(changed, entries) and fits and self.vocabulary.allows(self.written(changed)):
                found.append(changed)
        return found
