"""The genetic search of CCRT: entities, alone or together, on which an edited model strays most from its base."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Individual = tuple[str, ...]  # one to three entities
Broader = Mapping[str, Collection[str]]  # entity -> its direct hypernyms
LONGEST = 3
LITTLE = frozenset("a an and at by for in of on or the to with".split())

ENTITIES: tuple[str, ...] = tuple(
    """
    apple banana cherry lemon tomato carrot bread cheese pizza cake dog horse cow rabbit elephant lion bear fish bird
    butterfly bee snail turtle tree rose sunflower mushroom cactus mountain island moon sun cloud rainbow snowman house
    castle church bridge tent car bus train bicycle boat airplane rocket clock book pencil key lamp chair umbrella shoe hat
    crown ring guitar drum camera telephone
    """.split()
)


def words(text: str) -> set[str]:
    """The words of a text that carry meaning."""
    return set(re.findall(r"\w+", text.casefold())) - LITTLE


def related(text: str, phrases: Iterable[str], broader: Broader | None = None) -> bool:
    """Whether a text shares a word with one of the phrases, or is a kind of it, at any distance."""
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
    """ "a cat, an apple and a boat"."""
    named = [f"{'an' if entity[0].casefold() in 'aeiou' else 'a'} {entity}" for entity in entities]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def crossover(a: Individual, b: Individual, broader: Broader | None = None) -> Individual:
    """The direct hypernyms and hyponyms that the parents share; if there are none, both parents together."""
    broader = broader or {}

    def near(individual: Individual) -> set[str]:
        up = {parent for gene in individual for parent in broader.get(gene, ())}
        return up | {child for child, parents in broader.items() if set(parents) & set(individual)}

    shared = near(a) & near(b)
    return tuple(sorted(shared)) if shared else tuple(dict.fromkeys((*a, *b)))


def mutate(individual: Individual, entities: Sequence[str], rate: float, rng: random.Random) -> Individual:
    """Each gene replaced by a random entity with probability `rate`."""
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
    allowed: Callable[[str], bool] = lambda entity: True,
) -> list[tuple[Individual, float]]:
    """The `keep` fittest individuals with their scores, best first.

    In each generation the `keep` fittest survive; four fifths of them pair off at random and have one child each; a
    quarter of all is copied with mutations. Children of more than three entities, and with one that is not allowed, are
    dropped. Nobody is scored twice.
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
        best = ranked([*best, *(one for one in young if len(one) <= LONGEST and all(map(allowed, one)))])[:keep]
    return [(individual, scores[individual]) for individual in best]
