"""Ring-A-Bell: moves the encoded prompt along the concept's direction, and searches for a text that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from .. import checks
from ..fields import computed
from ._contract import Access, Attack, Proposal, Target, Victim
from ._directions import Pairs, check_fit, check_length, default_pairs, directions, encoded, goals, pair, shifted
from ._search import texts
from ._tokens import check_prompt
from ._vocabulary import Slots, Vocabulary, forbidden

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["RingABell"]

Mode = Literal["genetic", "continuous"]
Entries = tuple[int, ...]


@dataclass(frozen=True)
class RingABell(Attack):
    """Ring-A-Bell: a text whose encoding equals that of the prompt plus a multiple of the concept's direction.

        c = mean_i ( tau(P_i with the concept) - tau(P_i without) )        y = tau(P) + eta c
        genetic:     min_words || tau(words) - y ||^2                       continuous: the denoiser reads y

    It uses the text encoder only, which is public for open models. The genetic search finds a text, and has text
    access. `mode="continuous"` skips the search. It is stronger, but needs access to the embeddings.

    Paper: Y.-L. Tsai, C.-Y. Hsu, C. Xie, C.-H. Lin, J.-Y. Chen, B. Li, P.-Y. Chen, C.-M. Yu, C.-Y. Huang, 2024,
    "Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?", ICLR 2024, arXiv 2310.10012, section
    3. The continuous form is used by C. Gong, K. Chen, Z. Wei, J. Chen, Y.-G. Jiang, 2024, arXiv 2407.12383.

    Differs: parents survive unchanged (elitism); in the official code mutation also changes them. Words are whole words
    that every tokenizer reads back, without the concept's words. Pairs come from the concept's phrases, and none is
    dropped by looking at pictures. All encoders that the denoiser reads count, with their pooled state. The continuous
    form adds eta c to the outputs of the encoders for the prompt only, so a method that encodes changed prompts
    (SAFREE) reads those without it.

    Args:
        mode: "genetic" or "continuous".
        eta: strength of the direction; paper: 3 (nudity; up to 5.5 for violence); continuous: 0.9 for styles.
        tokens: K, words of the text, >= 1; paper: 16.
        population: texts per generation, >= 2; paper: 200.
        keep: parents among them, the best ones, >= 1; paper: 100.
        generations: >= 1; paper: 3000.
        crossover: probability that two parents exchange their ends, in [0, 1]; paper: 0.5.
        mutation: probability that a child gets a random word, in [0, 1]; paper: 0.25.
        every: generations between two proposals, >= 1.
        batch: texts per call of the encoders, >= 1.
        pairs: texts with and without the concept; empty: made of the concept's phrases.
        forbidden: words that the text must not contain. None: those of the concept's name and phrases.

    Shapes: texts [N, L, D], and pooled texts [N, P].

    Raises:
        ValueError: a field is out of range; a tokenizer has no table of tokens; or a text is too long.
        TypeError: the family of the pipeline is unknown.

    Example:
        >>> import efface
        >>> import efface.testing
        >>> efface.RingABell(tokens=8, generations=100).check(efface.testing.pipeline("sd1"))
        >>> efface.RingABell().access, efface.RingABell(mode="continuous").access
        ('text', 'embeddings')
    """

    access: ClassVar[Access] = computed(lambda self: "embeddings" if self.mode == "continuous" else "text")

    mode: Mode = "genetic"
    eta: float = 3.0
    tokens: int = 16
    population: int = 200
    keep: int = 100
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    every: int = 250
    batch: int = 128
    pairs: tuple[tuple[str, str], ...] = ()
    forbidden: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checks.choice("mode", self.mode, get_args(Mode))
        checks.number("eta", self.eta)
        checks.each(self, checks.whole, "tokens", "keep", "generations", "every", "batch")
        checks.whole("population", self.population, max(2, self.keep + 1))
        checks.each(self, checks.share, "crossover", "mutation")
        object.__setattr__(self, "pairs", tuple(pair(each) for each in self.pairs))
        checks.each(self, checks.texts, "forbidden")

    def check(self, pipe: DiffusionPipeline) -> None:
        super().check(pipe)
        check_length(pipe)
        if self.mode == "genetic":
            Vocabulary.of(pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        pipe, pairs = victim.pipe, self.pairs or default_pairs(target.concept)
        self.check(pipe)
        check_fit(pipe, [text for each in pairs for text in each])
        if self.mode == "continuous":
            yield self._continuous(target, pipe, pairs)
            return
        vocabulary = Vocabulary.of(pipe, forbidden(target.concept, self.forbidden))
        slots = Slots.of(pipe, self.tokens)
        template = " ".join(slots.words)
        check_prompt(pipe, template, self.tokens)
        goal = goals(pipe, target.prompt, pairs, self.eta)

        def distances(some: Sequence[Entries]) -> list[float]:
            written, far = [vocabulary.written(template, slots, each) for each in some], []
            for k in range(0, len(written), self.batch):
                far += (encoded(pipe, written[k : k + self.batch]) - goal).square().sum(1).tolist()
            return far

        found = (
            (best, f"after {k} generations: squared distance {far:.4g}")
            for k, (best, far) in enumerate(self.evolve(distances, len(vocabulary), Random(target.seed)), 1)
            if k % self.every == 0 or k == self.generations
        )
        yield from texts(pipe, vocabulary, template, slots, found)

    def _continuous(self, target: Target, pipe: Any, pairs: Pairs) -> Proposal:
        """The prompt, whose encoding is moved. A phrase of the concept is also an erasure prompt, which must not be."""
        phrase = target.prompt in target.concept.phrases
        prompt = f"a picture of {target.prompt}" if phrase else target.prompt
        shift, eta = directions(pipe, prompt, pairs), self.eta
        return Proposal(
            prompt,
            about=f"encoding plus {eta:g} times the concept's direction, from {len(pairs)} pairs",
            inside=lambda pipe: shifted(pipe, shift, eta),
            tensors={f"{name}.{key}": each for name, (_, parts) in shift.items() for key, each in parts.items()},
        )

    def evolve(
        self, distances: Callable[[Sequence[Entries]], list[float]], words: int, rng: Random
    ) -> Iterator[tuple[Entries, float]]:
        """Yields the best text and its distance after each generation. The distance never rises.

        Args:
            distances: of texts, each K words as numbers.
            words: the size of the vocabulary.
            rng: source of the random choices.
        """
        texts = [tuple(rng.randrange(words) for _ in range(self.tokens)) for _ in range(self.population)]
        texts = list(dict.fromkeys(texts))
        known = list(zip(distances(texts), texts, strict=True))
        for _ in range(self.generations):
            known = sorted(known)[: self.keep]
            parents = [text for _, text in known]
            children: list[Entries] = []
            while len(children) < self.population - self.keep:
                children += self._children(rng.choice(parents), rng.choice(parents), words, rng)
            children = list(dict.fromkeys(children).keys() - set(parents))  # equal texts would crowd out others
            known += zip(distances(children), children, strict=True)
            far, best = min(known)
            yield best, far

    def _children(self, one: Entries, other: Entries, words: int, rng: Random) -> list[Entries]:
        if rng.random() < self.crossover:
            cut = rng.randrange(1, max(2, self.tokens))
            one, other = one[:cut] + other[cut:], other[:cut] + one[cut:]
        found = []
        for child in (one, other):
            if rng.random() < self.mutation:
                at = rng.randrange(self.tokens)
                child = (*child[:at], rng.randrange(words), *child[at + 1 :])
            found.append(child)
        return found
