"""Compares the methods' needs with the families' offers, for refusals and for the matrix of methods and families.

A method's `needs` are names from `OFFERS`; "cross_text|joint_text" means either. If they depend on fields, `forms` maps
labels to field values, such as {"`trajectories=2`": {"trajectories": 2}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import registry
from ..core import Concept
from ._declared import declared
from ._find import FAMILIES, family
from ._offers import OFFERS
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ROOMS = ("erasers", "editors")


class Form(NamedTuple):
    """A method with its default fields, or one of its forms.

    `method` is its registered name. `label` names the form; "" is the default form.
    """

    method: str
    cls: str
    label: str
    needs: tuple[str, ...]


def lacking(needs: Iterable[str], offers: Iterable[str]) -> tuple[str, ...]:
    """The needs that the offers do not meet."""
    return tuple(need for need in needs if not set(need.split("|")) & set(offers))


def forms() -> list[Form]:
    """All forms of every eraser and editor, the default form first. Imports all of them, except plug-ins that lack a
    package."""
    found = []
    for name, cls in ((name, _imported(name)) for name in _known()):
        named: Mapping[str, Mapping[str, Any]] = {"": {}, **getattr(cls, "forms", {})} if cls else {}
        found += [Form(name, cls.__name__, label, _needs(cls, fields)) for label, fields in named.items()]
    return found


def default_forms() -> list[Form]:
    """The default form of every eraser and editor. Reads the source of native ones, and imports only plug-ins."""
    found = []
    for name, room in _known().items():
        if read := declared(name, room):
            found.append(Form(name, read[0], "", read[1]))
        elif cls := _imported(name):
            found.append(Form(name, cls.__name__, "", _needs(cls, {})))
    return found


def _known() -> dict[str, str]:
    return {name: room for name, room in registry.methods().items() if room in ROOMS}


def _imported(name: str) -> Any:
    """The class of a method; None if it is a plug-in that lacks a package."""
    try:
        return registry.resolve(name)
    except ImportError:
        return None


def _needs(cls: Any, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The needs of a class with these fields. Makes an object only if the needs depend on fields."""
    if not isinstance(needs := getattr(cls, "needs", ()), property):
        return tuple(needs)
    made = cls(Concept("a concept"), **fields) if hasattr(cls, "apply") else cls(**fields)
    return tuple(made.needs)


# ---------------------------------------------------------------- refusals


def check(method: Any, pipe: DiffusionPipeline) -> None:
    """Raises ValueError if the pipeline lacks a method's needs, and TypeError if its family is unknown."""
    needs, facts, cls = tuple(getattr(method, "needs", ())), family(pipe), type(method)
    offers = facts.offered(pipe) if needs else frozenset()
    if not (lacks := lacking(needs, offers)):
        return
    named: Mapping[str, Mapping[str, Any]] = getattr(cls, "forms", {})
    if named and lacking(_needs(cls, {}), offers):  # the default form also fails here
        named = {}
    labels = [label for label, fields in named.items() if set(lacks) & set(_needs(cls, fields))]
    raise ValueError(refusal(cls.__name__, needs, pipe, " and ".join(labels)))


def refusal(who: str, needs: Iterable[str], pipe: DiffusionPipeline, label: str = "") -> str:
    """The message for a pipeline that lacks needs.

    Args:
        who: the subject, such as the name of a method's class.
        needs: names from `OFFERS`.
        pipe: a pipeline of a known family.
        label: the form of the method with the need, if the default form lacks it.
    """
    facts, needs = family(pipe), tuple(needs)
    offers = facts.offered(pipe)
    wanted = _listed([" or ".join(OFFERS[n].words for n in need.split("|")) for need in lacking(needs, offers)])
    has = _listed([offer.words for name, offer in OFFERS.items() if name in offers]) or "none of what methods need"
    where = _listed([each.name for each in FAMILIES if not lacking(needs, each.offers)], "or") or "no known family"
    here = f"Use {who} without it, or with it on {where}" if label else f"Use it on {where}"
    return (
        f"{who}{f' with {label}' if label else ''} needs {wanted}, but this {type(pipe).__name__} ({facts.name}) has "
        f"{has}. {here}; {facts.name} works with {what_works(facts, offers)}."
    )


def what_works(facts: Family, offers: Iterable[str] | None = None) -> str:
    """Lists the methods that work in their default form, and the call arguments that guided methods need.

    Args:
        facts: the family.
        offers: the pipeline's offers. None: the family's.
    """
    offers = set(facts.offers if offers is None else offers)
    fit = [form for form in default_forms() if not lacking(form.needs, offers)]
    conditional = [form.cls for form in fit if facts.guidance_condition and "guidance" in form.needs]
    free = _listed([form.cls for form in fit if form.cls not in conditional])
    if not conditional:
        return free or "no method"
    return f"{free + ', and ' if free else ''}{_listed(conditional)} with {facts.guidance_condition}"


# ---------------------------------------------------------------- tables


def about(facts: Family) -> str:
    """A line about a family for lists: how it reads text, and the working methods."""
    kinds = dict.fromkeys("bidirectional" if t in facts.bidirectional else "causal" for t in facts.tokenizers)
    layers = "cross-attention" if facts.cross_attention else "joint attention"
    encoders = "encoder" if len(facts.tokenizers) == 1 else "encoders"
    return f"{_listed(sorted(kinds))} text {encoders}, read in {layers}; {what_works(facts)}"


def matrix() -> dict[tuple[str, str], dict[str, str]]:
    """(method, form) -> family -> "yes", "" for no, or the required call arguments."""
    return {
        (form.method, form.label): {
            each.name: ""
            if lacking(form.needs, each.offers)
            else (each.guidance_condition if "guidance" in form.needs else "") or "yes"
            for each in FAMILIES
        }
        for form in forms()
    }


def _listed(words: Iterable[str], word: str = "and") -> str:
    """ "a, b and c"."""
    *others, last = [*words] or [""]
    return f"{', '.join(others)} {word} {last}" if others else last
