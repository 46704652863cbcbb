"""A policy: what is erased, how, and what happens when a detector still finds it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from .. import api, checks, registry
from ..core import Concept, config, field_names
from .contradictions import check_contradictions
from .edit import Edit, edits
from .forms import CURE, Frozen, Given, Settings, as_given, plain

RESERVED = ("concepts", "rows", "strength")
DELIVERED = ("drawn", "redrawn", "logged")
"""The outcomes of a row that has a picture."""


class Erasure(Frozen):
    """One line of a policy: concepts that a method erases at one strength.

    Args:
        concepts: names of shipped concepts, mappings with the fields of `efface.Concept`, or `Concept` objects.
        method: a run-time method that takes the concepts of each row, or a preset such as "sld.strong".
        strength: > 0, in the unit of the method. None: the default of the method.
        anchors: concept to the text that the method maps it to, for methods with anchors.
        fields: further fields of the method, such as {"window": [0.0, 0.8]}.

    Raises:
        ValueError: a concept, the method or a field is unknown, a value is out of range, or the method cannot act on
            single rows of a batch.

    Example:
        >>> from efface.guard import Erasure
        >>> Erasure(concepts=["alcohol"], strength=1.5).method
        'eiup'
    """

    concepts: Annotated[tuple[Concept, ...], BeforeValidator(as_given), Field(min_length=1, max_length=100)]
    method: str = "eiup"
    strength: Annotated[float, Field(gt=0)] | None = None
    anchors: Settings = Field(default_factory=lambda: MappingProxyType({}))
    fields: Settings = Field(default_factory=lambda: MappingProxyType({}))

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            concepts: Given,
            method: str = "eiup",
            strength: float | None = None,
            anchors: Mapping[str, str] = ...,
            fields: Mapping[str, Any] = ...,
        ) -> None: ...

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [concept.name for concept in self.concepts]
        if strange := [name for name in self.anchors if name not in names]:
            raise ValueError(checks.refusal(f"`anchors` of the concepts {', '.join(names)}", strange[0], CURE))
        for name, anchor in self.anchors.items():
            checks.text(f"`anchor` of {name!r}", anchor)
        if own := [name for name in RESERVED if name in self.fields]:
            cure = (
                "Write `strength` beside `method`."
                if own == ["strength"]
                else "The policy decides it, so leave it out."
            )
            raise ValueError(checks.refusal("other `fields` of a method", own[0], cure))
        return self

    @property
    def anchored(self) -> tuple[Concept, ...]:
        """The concepts with their anchors."""
        return tuple(
            Concept(each.name, each.phrases, self.anchors.get(each.name, each.anchor), each.keep)
            for each in self.concepts
        )

    @property
    def setting(self) -> str:
        """Equal for erasures that one applied method can serve."""
        return json.dumps([self.method, self.strength, plain(self.fields)], sort_keys=True)

    def build(self, concepts: Sequence[Concept] | None = None) -> Any:
        """The eraser."""
        given = {} if self.strength is None else {"strength": self.strength}
        return api.build(self.method, tuple(concepts or self.anchored), **given, **plain(self.fields))

    def check_method(self) -> None:
        """Raises ValueError unless the method can be built, acts, and takes the concepts of each row."""
        cls = registry.resolve(registry.split(self.method)[0], "erasers")
        if "rows" not in field_names(cls):
            raise ValueError(
                f"Expected a method that takes the concepts of each row, got {self.method!r}, which acts on the whole "
                "batch. Choose another method, or use a pipeline for this policy alone."
            )
        eraser = self.build()
        if not getattr(eraser, "uses_anchors", False) and any(concept.anchor for concept in self.anchored):
            raise ValueError(
                f"{self.method!r} maps no concept to an anchor with these fields. Leave the anchors out, or write "
                '{"normalization": "swap"} as `fields` of \'eiup\'.'
            )
        if eraser.is_off():
            raise ValueError(f"{self.method!r} changes nothing with these fields. Write `unguarded: true` instead.")

    def as_json(self) -> dict[str, Any]:
        facts = [vars(concept) | {"phrases": [*concept.phrases], "keep": [*concept.keep]} for concept in self.anchored]
        return {"concepts": facts, "method": self.method, "strength": self.strength, "fields": plain(self.fields)}


class Gate(Frozen):
    """What happens when a detector still finds an erased concept in a picture.

    Args:
        detector: a detector's name, or a mapping with its name and options, as `efface.detector` takes them.
        on_detection: "block" returns no picture; "redraw" draws again with more strength, and blocks if the concept
            is still found; "log" returns the picture and records the detection.
        redraws: how often to redraw, 1 or 2.
        stronger: factor > 1 of the strength at each redraw.

    Raises:
        ValueError: an entry is unknown or out of range.

    Example:
        >>> from efface.guard import Gate
        >>> Gate(detector="eyes", on_detection="redraw").redraws
        1
    """

    detector: str | Settings
    on_detection: Literal["block", "redraw", "log"] = "block"
    redraws: Annotated[int, Field(ge=1, le=2)] = 1
    stronger: Annotated[float, Field(gt=1, le=10)] = 1.5

    def as_json(self) -> dict[str, Any]:
        return {name: plain(getattr(self, name)) for name in type(self).model_fields}


def _erase(value: Any) -> Any:
    """Erasures; names and concepts in a plain list form one."""
    if isinstance(value, (str, Concept)):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return value
    alone = [each for each in value if _is_concept(each)]
    made: list[Any] = [Erasure(concepts=alone)] if alone else []
    for each in value:
        if isinstance(each, Mapping) and not _is_concept(each) and all(isinstance(name, str) for name in each):
            made.append(Erasure(**each))
        elif not _is_concept(each):
            made.append(each)
    return tuple(made)


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _is_concept(value: Any) -> bool:
    return isinstance(value, (str, Concept)) or (isinstance(value, Mapping) and "name" in value)


class Policy(Frozen):
    """What is erased for a tenant, how, and what happens when a detector still finds it. Immutable, with a hash.

    Args:
        erase: names of concepts, which `eiup` erases at its default strength, or `Erasure` objects or mappings.
        deltas: weight edits, `Edit` objects or mappings, in the order in which they are applied.
        version: a number >= 1 of your choice, which records show beside the hash.
        gate: a detector after drawing. None: no detector.
        partial_pictures: whether pictures may leave before they are finished. Not with a gate, which judges finished
            pictures.
        guidance: the smallest and the largest guidance scale that a picture may be drawn with, above 1. None: any. Low
            scales follow the prompt in fewer details, and methods were measured at 7.5.
        unguarded: True for a policy that erases nothing. Neither `erase` nor `deltas` nor `gate` may be given then.

    Raises:
        ValueError: the policy is empty or contradicts itself: a concept is erased twice by one method or by two deltas,
            occurs with different phrases, or is erased and also used as an anchor or kept. Or an entry is unknown or
            out of range.

    Example:
        >>> import efface
        >>> policy = efface.Policy(erase=["alcohol", "weapon"], version=2)
        >>> [concept.name for concept in policy.concepts], len(policy.hash)
        (['alcohol', 'weapon'], 64)
    """

    version: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    erase: Annotated[tuple[Erasure, ...], BeforeValidator(_erase), Field(max_length=20)] = ()
    deltas: Annotated[tuple[Edit, ...], BeforeValidator(edits), Field(max_length=8)] = ()
    gate: Gate | None = None
    partial_pictures: bool = False
    guidance: Annotated[tuple[float, float] | None, BeforeValidator(_pair)] = None
    unguarded: bool = False
    _hash: str = PrivateAttr("")

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            version: int = 1,
            erase: Given | Sequence[Erasure] = (),
            deltas: Sequence[Edit | Mapping[str, Any]] = (),
            gate: Gate | Mapping[str, Any] | None = None,
            partial_pictures: bool = False,
            guidance: Sequence[float] | None = None,
            unguarded: bool = False,
        ) -> None: ...

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.unguarded and (self.erase or self.deltas or self.gate):
            raise ValueError(
                "Expected an unguarded policy without `erase`, `deltas` and `gate`, got some. Leave out one of both."
            )
        if not self.unguarded and not (self.erase or self.deltas):
            raise ValueError(
                "Expected a policy that erases something, got an empty one. Write `unguarded: true` to erase nothing."
            )
        if self.partial_pictures and self.gate:
            raise ValueError(
                "Expected a policy with a gate or with partial pictures, got both. Leave out one, because a gate "
                "judges finished pictures."
            )
        if self.guidance is not None and not 1 < self.guidance[0] <= self.guidance[1]:
            raise ValueError(
                checks.refusal("`guidance` with a smallest and a largest scale, above 1", self.guidance, "Give two.")
            )
        methods = [(repr(registry.split(each.method)[0]), each.anchored) for each in self.erase]
        check_contradictions([(name, concept) for name, some in methods for concept in some], self.deltas)
        for each in self.erase:
            each.check_method()
        if self.gate is not None and self.gate.on_detection == "redraw":
            self._check_redraw()
        self._hash = hashlib.sha256(self._canonical().encode()).hexdigest()
        return self

    def _check_redraw(self) -> None:
        from ..families import filled_for

        built = [(each.method, filled_for(each.build(), "")) for each in self.erase]
        fixed = [repr(method) for method, eraser in built if getattr(eraser, "strength", None) is None]
        if fixed or not self.erase:
            what = fixed[0] if fixed else "A policy with deltas only"
            raise ValueError(f"{what} has no strength to raise for a redraw. Give a `strength`, or choose `block`.")

    def _canonical(self) -> str:
        return json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @property
    def hash(self) -> str:
        """SHA-256 of the policy: concepts with phrases and anchors, methods, fields, deltas, gate and version."""
        return self._hash

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """All erased concepts, once each."""
        edited = (each.concepts for each in self.deltas)
        return tuple(dict.fromkeys(itertools.chain(*(each.anchored for each in self.erase), *edited)))

    @property
    def weights(self) -> tuple[tuple[str, float | None], ...]:
        """SHA-256 and strength of each delta, in order. Rows of one pipeline call have the same ones."""
        return tuple((each.sha256, each.strength) for each in self.deltas)

    def as_json(self) -> dict[str, Any]:
        """The policy as JSON types, which `Policy(**...)` takes.

        Entries of later versions are left out at their defaults, so that hashes of earlier policies do not change.
        """
        found: dict[str, Any] = {
            "version": self.version,
            "erase": [each.as_json() for each in self.erase],
            "gate": None if self.gate is None else self.gate.as_json(),
            "unguarded": self.unguarded,
        }
        if self.deltas:
            found["deltas"] = [each.as_json() for each in self.deltas]
        if self.partial_pictures:
            found["partial_pictures"] = True
        if self.guidance is not None:
            found["guidance"] = [*self.guidance]
        return found

    def configs(self) -> list[dict[str, Any]]:
        """The erasers with all their fields, as records store them."""
        return [config(each.build()) for each in self.erase]

    def plus(self, names: Sequence[str]) -> Policy:
        """This policy with further erasures of shipped concepts. Concepts that methods erase already do not change.

        The method and its fields are those of the first erasure; `eiup` if there is none.
        """
        known = {concept.name for each in self.erase for concept in each.concepts}
        new = [name for name in dict.fromkeys(names) if name not in known]
        if not new:
            return self
        first = self.erase[0] if self.erase else Erasure(concepts=new)
        added = Erasure(concepts=new, method=first.method, strength=first.strength, fields=first.fields)
        return self.model_copy(update={"erase": (*self.erase, added), "unguarded": False})

    def check_guidance(self, scale: float) -> None:
        """Raises ValueError for a guidance scale that the policy does not allow."""
        if self.guidance is not None and not self.guidance[0] <= scale <= self.guidance[1]:
            low, high = self.guidance
            raise ValueError(
                checks.refusal(f"a guidance scale from {low:g} to {high:g}, as the policy says", scale, "Give another.")
            )


unguarded = Policy(unguarded=True)
"""The policy that erases nothing, which has to be said in words."""

__test__ = {
    "unguarded": """
    >>> import efface
    >>> efface.Guard({"kids": ["alcohol"], "press": efface.unguarded}).policies["press"].unguarded
    True
    """
}
