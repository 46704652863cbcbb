"""Concept Arithmetics: combines prompts in the guidance so that they rebuild the erased concept."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from .. import checks
from ._compose import Composition, Term, check
from ._contract import Access, Attack, Proposal, Target
from ._words import random_text

if TYPE_CHECKING:
    from ._contract import Victim

__all__ = ["ConceptArithmetics"]

Recipe = Literal["sign_flip", "context_cancel", "parts", "contrast", "fitted"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)


@dataclass(frozen=True)
class ConceptArithmetics(Attack):
    """Draws a composition of prompts in place of the erased one. Needs no training, gradients or search for tokens.

        e = e0 + sum_i w_i (e'(c_i) - e0)

    with the guarded model's predictions e' and weights w_i of any sign. The coefficients sum to 1, so the composition
    is the same for noise, velocity and picture predictions. Recipes, for the target prompt c:

    | recipe         | terms                                          | breaks erasers that                       |
    |----------------|------------------------------------------------|-------------------------------------------|
    | sign_flip      | (c, w), w < 0                                  | reverse the vector (ESD, eta > 0)         |
    | context_cancel | (c and context, w), (context, -w), (anchor, -u)| map c to an anchor, or act on c alone     |
    | parts          | (each part of c, w)                            | act on the whole text of c                |
    | contrast       | (a family that contains c, w), (its others, -w)| act on c, and not on its family           |
    | fitted         | weights by least squares against g v(c)        | any: measures what is left of v(c)        |

    The first four need the guarded model alone. "fitted" needs the base model too, as an auditor has it: it solves
    `(A + lam I) w = b` with A_ij = mean <V_i, V_j>, b_i = mean <V_i, g v(c)>, and reports the cosine on other seeds.

    Paper: "Concept Arithmetics for Circumventing Concept Inhibition in Diffusion Models", Petsiuk and Saenko 2024,
    arXiv 2404.13706. Composition as in Liu et al. 2022, arXiv 2206.01714, equation 11.

    Differs: only the abstract was available, and no official code is public. The composition follows from the abstract
    and from Liu et al.; the recipes, weights and the fit are ours, so this is an attack in the manner of the paper. No
    number of the paper can be compared. Qwen-Image's pipeline gives each guided prediction the norm of the conditional
    one, so there a composition has the right direction, and the norm of `e0 + sum / g`.

    Args:
        recipes: which recipes to try, in this order.
        weights: the weights w of the sign flip.
        context_weights: the weights w and u of the other recipes.
        contexts: texts X that "context_cancel" adds as "c and X" and takes away again.
        parts: texts of "parts"; () = the words of the prompt, without articles.
        family: the text of "contrast" whose pictures include the concept; "" leaves the recipe out, unless the concept
            has `keep`.
        siblings: the other members of that family; () = the concept's `keep`.
        window: the share of the trajectory in which the terms act, by noise level: 0 is pure noise, 1 the picture.
        guidance: the scale g of the pipeline call, which cancels, and of the fitted vector; above 1.
        most: the largest norm of the sum, as a multiple of g times that of the first term; None: no limit.

    Shapes: predictions [B, C, h, w]; FLUX [B, L, C].

    Raises:
        ValueError: a field is out of range, or the pipeline has no guidance, or uses `guidance_rescale` or PAG.

    Example:
        >>> from efface import Concept
        >>> from efface.attacks._contract import Target
        >>> attack = ConceptArithmetics(recipes=("sign_flip",), weights=(-1.0,))
        >>> [made.about for made in attack.propose(Target(Concept("cat"), "a cat"), None)]
        ['sign flip: -1 (a cat)']
    """

    access: ClassVar[Access] = "sampler"
    needs: ClassVar[tuple[str, ...]] = ("guidance",)

    recipes: tuple[Recipe, ...] = RECIPES
    weights: tuple[float, ...] = (-1.0, -3.0, -5.0, -7.5, -10.0, -15.0)
    context_weights: tuple[float, ...] = (7.5, 3.0, 5.0, 10.0)
    contexts: tuple[str, ...] = ("a cat", "a table")
    parts: tuple[str, ...] = ()
    family: str = ""
    siblings: tuple[str, ...] = ()
    window: tuple[float, float] = (0.0, 1.0)
    guidance: float = 7.5
    most: float | None = None

    def __post_init__(self) -> None:
        known = tuple(checks.choice("recipes", each, RECIPES) for each in checks.texts("recipes", self.recipes))
        object.__setattr__(self, "recipes", known)
        for name in ("weights", "context_weights"):
            object.__setattr__(self, name, tuple(checks.number(name, each) for each in getattr(self, name)))
        checks.each(self, checks.texts, "contexts", "parts", "siblings")
        checks.text("family", self.family, empty=True)
        object.__setattr__(self, "window", checks.window("window", self.window))
        object.__setattr__(self, "guidance", checks.number("guidance", self.guidance, 1, above=True))
        Composition((Term("a", 1.0),), self.guidance, self.most)

    def check(self, pipe: Any) -> None:
        super().check(pipe)
        check(pipe)

    def propose(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for recipe in self.recipes:
            yield from getattr(self, f"_{recipe}")(target, victim)

    def control(self, proposal: Proposal, target: Target, victim: Victim, rng: Random) -> Proposal:
        """The same weights with random texts of equally many tokens."""
        composition, without = proposal.inside, target.concept.phrases
        if not isinstance(composition, Composition):
            raise TypeError(f"Expected a proposal of {type(self).__name__}, got another one. Give its own.")
        terms = [
            replace(term, prompt=random_text(victim.pipe, term.prompt, rng, without) if term.prompt else "")
            for term in composition.terms
        ]
        return replace(self._proposal("random texts", terms), about="random texts")

    def _proposal(self, recipe: str, terms: list[Term], note: str = "") -> Proposal:
        composition = Composition(tuple(terms), self.guidance, self.most)
        about = f"{recipe}: {', '.join(map(str, terms))}{note}"
        return Proposal(terms[0].prompt, {"guidance": self.guidance}, about, composition)

    def _term(self, prompt: str, weight: float) -> Term:
        return Term(prompt, weight, self.window)

    def _sign_flip(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        for weight in self.weights:
            yield self._proposal("sign flip", [self._term(target.prompt, weight)])

    def _context_cancel(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        anchor = target.concept.anchor
        for weight in self.context_weights:
            for context in self.contexts:
                terms = [self._term(f"{target.prompt} and {context}", weight), self._term(context, -weight)]
                yield self._proposal("context cancel", terms)
                if anchor:
                    yield self._proposal("context cancel", [*terms, self._term(anchor, -weight)])

    def _parts(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        parts = self.parts or _words(target.prompt)
        for weight in self.context_weights if len(parts) > 1 else ():
            yield self._proposal("parts", [self._term(part, weight) for part in parts])

    def _contrast(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        siblings = self.siblings or target.concept.keep
        family = self.family or ", ".join([target.prompt, *siblings[:3]])
        for weight in self.context_weights if siblings else ():
            others = [self._term(text, -weight / len(siblings)) for text in siblings]
            yield self._proposal("contrast", [self._term(family, weight), *others])

    def _fitted(self, target: Target, victim: Victim) -> Iterator[Proposal]:
        from ._fit import fit

        texts = _distinct([target.prompt, *(f"{target.prompt} and {c}" for c in self.contexts), *self.contexts])
        texts = _distinct([*texts, *target.concept.phrases, *_words(target.prompt)])[:8]
        made = fit(victim, target.prompt, texts, self.guidance)
        cosines = ", ".join(f"{each:.2f}" for each in made.cosines)
        note = f"; cosine from noise to picture {cosines}; |v|/|e0| {made.signal:.3f}"
        terms = [self._term(text, round(w, 4)) for text, w in zip(texts, made.weights, strict=True)]
        yield self._proposal("fitted", terms, note)


@functools.lru_cache(maxsize=256)
def _words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt without articles and prepositions."""
    small = {"a", "an", "the", "of", "and", "in", "on", "at", "with"}
    return tuple(word for word in prompt.split() if word.lower().strip(",.") not in small)


def _distinct(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(texts))
