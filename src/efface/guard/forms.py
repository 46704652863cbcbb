"""The base of policies and their parts: strict, immutable, with messages in the words of Efface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from .. import checks
from ..core import Concept, ConceptLike, as_concepts, field_names

CURE = "Correct the policy, see docs/guard.md."


class Frozen(BaseModel):
    """A part of a policy. It cannot be changed, and knows no other entries."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    def __init__(self, /, **entries: Any) -> None:
        try:
            super().__init__(**entries)
        except ValidationError as error:
            raise ValueError(_words(error, type(self).__name__)) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy, with other entries if `update` has some. It is checked, and has a hash of its own, like a new one."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | dict(update or {}))


def _words(error: ValidationError, owner: str) -> str:
    """The first fault, in the words of Efface."""
    found = error.errors(include_url=False)[0]
    inner = found.get("ctx", {}).get("error")
    if isinstance(inner, ValueError):
        return str(inner)
    owner = f"{'an' if owner[0] in 'AE' else 'a'} {owner.lower()}"
    entry = ".".join(str(part) for part in found["loc"] if isinstance(part, (str, int)))
    where = f"`{checks.short(entry)}` of {owner}" if entry else owner
    expected = found["msg"].removeprefix("Input should be ")
    if found["type"] == "extra_forbidden":
        return f"Expected no entry {where}, because it is unknown. {CURE}"
    if found["type"] == "missing":
        return f"Expected {where}, which is missing. {CURE}"
    return checks.refusal(f"{where} to be {expected}", found["input"], CURE)


def as_given(value: Any) -> tuple[Concept, ...]:
    """Concepts from names, mappings with the fields of `Concept`, and `Concept` objects."""
    given = [value] if isinstance(value, (str, Concept, Mapping)) else value
    if not isinstance(given, Sequence):
        cure = "Write for example ['alcohol', {'name': 'neon sign'}]."
        raise ValueError(checks.refusal("`concepts` to be concepts", value, cure))
    try:
        return as_concepts([_concept(each) if isinstance(each, Mapping) else each for each in given])
    except TypeError as error:
        raise ValueError(str(error)) from None


def _concept(entries: Mapping[str, Any]) -> Concept:
    if not entries.keys() <= set(field_names(Concept)) or "name" not in entries:
        names = ", ".join(field_names(Concept))
        raise ValueError(checks.refusal(f"a concept with `name`, and no entries besides {names}", entries, CURE))
    more: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entries.items()}
    return Concept(**more)


def frozen(value: Any) -> Any:
    """JSON types that cannot be changed. Raises ValueError for other types."""
    if isinstance(value, Mapping):
        return MappingProxyType({name: frozen(each) for name, each in value.items()})
    if value is not None and not isinstance(value, (str, int, float, list, tuple)):
        raise ValueError(checks.refusal("JSON types in a policy", value, "Give texts, numbers, lists and mappings."))
    return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value


def plain(value: Any) -> Any:
    """The value as JSON types."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


Given = ConceptLike | Sequence[ConceptLike | Mapping[str, Any]]
Settings = Annotated[Mapping[str, Any], AfterValidator(frozen)]
