"""Declares fields of methods for type checkers, and lists their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

T = TypeVar("T")
Given = TypeVar("Given")
Held = TypeVar("Held")


class Converted(Generic[Given, Held]):
    """The type of a dataclass field that takes a `Given` in the constructor and then holds a `Held`.

    Only type checkers use it. At run time `Converted(default)` is the default, and `__post_init__` converts. In derived
    dataclasses, mypy shows `Given` again.
    """

    if TYPE_CHECKING:

        def __init__(self, default: Given) -> None: ...

        @overload
        def __get__(self, instance: None, owner: Any) -> Given: ...

        @overload
        def __get__(self, instance: object, owner: Any) -> Held: ...

        def __get__(self, instance: Any, owner: Any) -> Any: ...

        def __set__(self, instance: object, value: Given) -> None: ...

    else:

        def __new__(cls, default):
            return default


def computed(read: Callable[[Any], T], default: T | None = None) -> T:
    """A class attribute whose value depends on the method's fields: `read(method)`.

    At run time it is a property. For type checkers it is the attribute that `Method` declares, where they refuse
    `@property`. `default` is its value with the default fields: lists read that of `needs` from the source.

        guides: ClassVar[bool] = computed(lambda self: self.strength > 0)
    """
    return cast("T", property(read))


def field_names(method: Any) -> tuple[str, ...]:
    """The field names of a method or its class, in order; empty if it is not a dataclass."""
    return tuple(f.name for f in dataclasses.fields(method)) if dataclasses.is_dataclass(method) else ()
