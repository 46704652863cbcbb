"""The calibration prompts of CCRT: combinations of entities on which the edited and the base model differ most."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .. import files

Individual = tuple[str, ...]  # one to three entities
Broader = Mapping[str, Collection[str]]  # entity -> its direct hypernyms
LONGEST = 3
LITTLE = {"a", "an", "and", "at", "by", "for", "in", "of", "on", "or", "the", "to", "with"}

# fmt: off
ENTITIES: tuple[str, ...] = (
    "apple", "banana", "cherry", "lemon", "tomato", "carrot", "bread", "cheese", "pizza", "cake", "dog", "horse",
    "rabbit", "elephant", "lion", "bear", "fish", "bird", "butterfly", "bee", "snail", "turtle", "tree", "rose",
    "sunflower", "mushroom", "cactus", "mountain", "island", "moon", "sun", "cloud", "rainbow", "snowman", "house",
    "castle", "church", "bridge", "tent", "car", "bus", "train", "bicycle", "boat", "airplane", "rocket", "clock",
    "book", "pencil", "key", "lamp", "chair", "umbrella", "shoe", "hat", "crown", "ring", "guitar", "drum",
)
# fmt: on


def words(text: str) -> set[str]:
    """The content words of a text."""
    return set(re.findall(r"\w+", text.casefold())) - LITTLE


def related(text: str, phrases: Iterable[str], broader: Broader | None = None) -> bool:
    """Whether a text shares a word with one of the phrases, or is a direct or indirect kind of it."""
    forbidden = {word for phrase in phrases for word in words(phrase)}
    seen: set[str] = set()
    queue = [text]
    while queue:
        node = queue.pop()
        if words(node) & forbidden:
            return True
        if node not in seen:
            seen.add(node)
            queue += (broader or {}).get(node, ())
    return False


def compose(entities: Sequence[str]) -> str:
    """Lists entities, such as "a cat, an apple and a boat"."""
    named = [f"{'an' if entity[0].casefold() in 'aeiou' else 'a'} {entity}" for entity in entities]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def crossover(a: Individual, b: Individual, broader: Broader | None = None) -> Individual:
    """The direct hypernyms and hyponyms that the parents share. If there are none, both parents."""
    broader = broader or {}

    def near(individual: Individual) -> set[str]:
        up = {parent for gene in individual for parent in broader.get(gene, ())}
        return up | {child for child, parents in broader.items() if set(parents) & set(individual)}

    shared = near(a) & near(b)
    return tuple(sorted(shared)) if shared else tuple(dict.fromkeys((*a, *b)))


def mutate(individual: Individual, entities: Sequence[str], rate: float, rng: random.Random) -> Individual:
    """Replaces each gene by a random entity with probability `rate`."""
    return tuple(rng.choice(entities) if rng.random() < rate else gene for gene in individual)


def search(
    entities: Sequence[str],
    fitness: Callable[[Sequence[Individual]], Sequence[float]],
    *,
    keep: int,
    generations: int,
    mutation: float,
    rng: random.Random,
    broader: Broader | None = None,
    allowed: Callable[[Individual], bool] = lambda individual: True,
) -> list[tuple[Individual, float]]:
    """The `keep` fittest individuals with their scores, best first.

    Each generation selects the `keep` fittest. Four fifths of them form random pairs with one child each, and a quarter
    is copied with mutations. Children with more than three entities or with excluded ones are dropped. No individual is
    scored twice.
    """
    scores: dict[Individual, float] = {}

    def ranked(population: Iterable[Individual]) -> list[Individual]:
        found = list(dict.fromkeys(tuple(sorted(individual)) for individual in population))
        new = [individual for individual in found if individual not in scores]
        if new:
            scores.update(zip(new, fitness(new), strict=True))
        return sorted(found, key=lambda individual: (-scores[individual], individual))

    best = ranked((entity,) for entity in entities)[:keep]
    for _ in range(generations):
        parents = rng.sample(best, k=int(0.8 * len(best)) // 2 * 2)
        children = [crossover(a, b, broader) for a, b in zip(parents[::2], parents[1::2], strict=True)]
        present = [*best, *children]
        mutants = [mutate(one, entities, mutation, rng) for one in rng.sample(present, k=len(present) // 4)]
        young = [tuple(dict.fromkeys(one)) for one in (*children, *mutants)]
        best = ranked([*best, *(one for one in young if len(one) <= LONGEST and allowed(one))])[:keep]
    return [(individual, scores[individual]) for individual in best]


class Calibration:
    """The source of calibration prompts: entities unrelated to the removed concepts, and a template.

    Args:
        entities: names of things.
        removed: phrases of all removed concepts.
        template: a text with {} for the entities.
        composer: makes a prompt from entities. None: the template.
        broader: entity to its direct hypernyms.
        fits: whether a prompt fits the text encoder. Individuals with longer prompts are left out.

    Raises:
        ValueError: fewer than two entities remain.
    """

    def __init__(
        self,
        entities: Sequence[str],
        removed: Sequence[str],
        template: str,
        composer: Callable[[Sequence[str]], str] | None = None,
        broader: Broader | None = None,
        fits: Callable[[str], bool] = lambda text: True,
    ) -> None:
        self.removed, self.template, self.composer, self.broader = removed, template, composer, broader
        self.fits = fits
        self.entities = [entity for entity in dict.fromkeys(entities) if self.allowed((entity,))]
        if len(self.entities) < 2:
            raise ValueError(
                "Expected at least two entities that are unrelated to the removed concepts and fit the text encoder, "
                f"got {len(self.entities)} of {len(entities)}. Give others."
            )

    def allowed(self, individual: Individual) -> bool:
        unrelated = not any(related(entity, self.removed, self.broader) for entity in individual)
        return unrelated and self.fits(self.put(individual))

    def put(self, individual: Sequence[str]) -> str:
        """Fills the entities into the template."""
        return self.template.format(compose(individual))

    def prompts(
        self,
        distance: Callable[[Sequence[str]], Sequence[float]],
        *,
        keep: int,
        generations: int,
        mutation: float,
        seed: int,
        path: Path | None = None,
        key: str = "",
    ) -> list[str]:
        """The prompts of the fittest. Stores them in the file `path`, and reads them from there if it was written for
        `key`."""
        if path and files.there(path):
            from .. import schema

            kept = schema.read(path, schema.Prompts, "Delete it to start the search again.")
            if kept["key"] == key:
                return list(kept["prompts"])
        best = search(
            self.entities,
            lambda individuals: distance([self.put(one) for one in individuals]),
            keep=keep,
            generations=generations,
            mutation=mutation,
            rng=random.Random(seed),
            broader=self.broader,
            allowed=self.allowed,
        )
        composed = [(self.composer or self.put)(one) for one, _ in best]
        found = [text for text in composed if self.composer is None or not related(text, self.removed)]
        if not found:
            raise ValueError("Every prompt of the composer names a removed concept. Give another composer.")
        if path:
            files.write_json(path, {"key": key, "prompts": found})
        return found
