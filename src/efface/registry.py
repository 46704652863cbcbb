"""Finds the class of a method by its name, which is a file name.

`sld` is the file `efface/erasers/sld.py` and the one class in its `__all__`. A new file is a new method; no list has to
be kept. A line in `efface/__init__.pyi` makes its class a public name. Method names are unique across erasers, editors
and attacks. Detectors, metrics and suites have separate namespaces, so a suite may share the name of the attack it
comes from. Other distributions add methods, detectors, metrics and suites by an entry point named `<room>.<name>`:

    [project.entry-points."efface.methods"]
    "erasers.mine" = "my_package.mine:Mine"
    "detectors.my_eye" = "my_package.eye:MyEye"

`efface.erase(pipe, "alcohol", method="mine")` and `efface.Mine("alcohol")` then work as for a native method. Records
store the registered name of a method; see `name_of`.

Listing imports no method, so it is fast and does not need torch.
"""

import ast
import functools
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

METHODS = ("erasers", "editors", "attacks")
ROOMS = (*METHODS, "detectors", "metrics", "suites")
GROUP = "efface.methods"


def near(name: str, names: Iterable[str]) -> str:
    """The hint for a misspelt name.

    Args:
        name: the unknown name.
        names: the known names.

    Returns:
        `"Did you mean 'eiup'?"`, with up to three names, best first; `""` if nothing is near.

    Example:
        >>> from efface.registry import near
        >>> near("EIPU", ["eiup", "sld"])
        "Did you mean 'eiup'?"
    """
    spelt = {known.casefold(): known for known in names}
    found = [repr(spelt[match]) for match in get_close_matches(name.casefold(), spelt)]
    if not found:
        return ""
    *others, last = found
    return f"Did you mean {', '.join(others)} or {last}?" if others else f"Did you mean {last}?"


def methods(room: str | None = None) -> dict[str, str]:
    """The known methods: name -> room, sorted by room and name.

    Args:
        room: one of `ROOMS`. None: all rooms of methods, `METHODS`.

    Raises:
        ValueError: the room does not exist, a name occurs twice, or an entry point is not named `<room>.<name>`.

    Example:
        >>> from efface import registry
        >>> registry.methods("erasers")["eiup"]
        'erasers'
    """
    if room is not None and room not in ROOMS:
        raise ValueError(_unknown("room", room, ROOMS))
    rooms = METHODS if room in (None, *METHODS) else (room,)
    entries = [(each, name, f"efface.{each}.{name}") for each in rooms for name in _files(each)]
    entries += [(each, name, entry.value) for (each, name), entry in _plugins() if each in rooms]
    found: dict[str, str] = {}
    origin: dict[str, str] = {}
    for each, name, source in sorted(entries, key=lambda entry: (ROOMS.index(entry[0]), entry[1])):
        if name in found:
            raise ValueError(
                f"Expected {_word(each)} names to be unique, got {name!r} for {origin[name]} and {source}. Rename that "
                "one, or uninstall its package."
            )
        found[name], origin[name] = each, source
    return {name: each for name, each in found.items() if room in (None, each)}


def resolve(name: str, room: str | None = None) -> type:
    """Imports and returns the class of a method.

    Args:
        name: the method's file name, such as `"eiup"`.
        room: the room to look in. None: every room of methods.

    Raises:
        ValueError: the room has no such method. The message has near matches and the list. Names of the form
            `module:Class`, which records give to classes without a registered name, are also refused.
        TypeError: `name` is not a text, or the method's file does not export exactly one class.

    Example:
        >>> from efface import registry
        >>> registry.resolve("eiup").__name__
        'EIUP'
    """
    _check_text(name)
    known = methods(room)
    if name not in known:
        if ":" in name:
            raise ValueError(
                f"{name!r} is not registered by any package, and Efface never imports code that a record names. Build "
                f"the method in Python, or register it by an entry point of {GROUP!r}."
            )
        elsewhere = methods().get(name)
        if elsewhere:
            raise ValueError(
                f"Expected one of the {room}, got {name!r}, which is one of the {elsewhere}. {_listed(known)}"
            )
        raise ValueError(_unknown(_word(room), name, known))
    for (where, plugin), entry in _plugins():
        if (where, plugin) == (known[name], name):
            return _only_class(entry.value, [entry.load()])
    path = f"efface.{known[name]}.{name}"
    module = import_module(path)
    return _only_class(path, [getattr(module, each) for each in getattr(module, "__all__", ())])


def name_of(cls: type) -> str:
    """The registered name of a class: `resolve(name_of(cls))` is `cls`.

    Args:
        cls: a method, detector, metric or suite.

    Returns:
        For a native class, the file or package name of its method. For a plug-in, the name of its entry point. For any
        other class, `module:Class`. Only such names contain a colon; `resolve` refuses them, because Efface never
        imports code that a record names.

    Example:
        >>> from efface import registry
        >>> registry.name_of(registry.resolve("eiup"))
        'eiup'
        >>> registry.name_of(dict)
        'builtins:dict'
    """
    for room in ROOMS:
        for name in _files(room):
            module = sys.modules.get(f"efface.{room}.{name}")
            if module and any(getattr(module, each, None) is cls for each in getattr(module, "__all__", ())):
                return name
    for (_, name), entry in _plugins():
        if _loaded(entry, cls) is cls:
            return name
    return f"{cls.__module__}:{cls.__qualname__}"


def plugin(class_name: str) -> type | None:
    """Imports and returns a method of another distribution by its class name. Returns None if there is none.

    Raises:
        ImportError: two distributions have methods with a class of that name.
        TypeError: the entry point does not name a class.
    """
    found = {entry.value: entry for entry in plugin_classes().get(class_name, ())}
    if len(found) > 1:
        raise ImportError(
            f"Expected one class named `efface.{class_name}`, got {' and '.join(map(_origin, found.values()))}. Import "
            "the class from its package, or use the method's registered name."
        )
    return next((_only_class(entry.value, [entry.load()]) for entry in found.values()), None)


def plugin_classes() -> dict[str, list[EntryPoint]]:
    """Class name -> the entry points of methods (erasers, editors, attacks) with that class. Imports none of them.

    Leaves out classes with the name of an Efface module: `from efface import api` must import the module.
    """
    found: dict[str, list[EntryPoint]] = {}
    for entry in _entries(entry_points, _path()):
        room, _, name = entry.name.partition(".")
        _, cls = _target(entry)
        if room in METHODS and name and cls.isidentifier() and find_spec(f"efface.{cls}") is None:
            found.setdefault(cls, []).append(entry)
    return found


def split(method: str) -> tuple[str, str]:
    """Splits a method's name from its preset, which follows a dot; "" without a preset.

    Raises:
        TypeError: `method` is not a text.

    Example:
        >>> from efface import registry
        >>> registry.split("sld.strong"), registry.split("sld")
        (('sld', 'strong'), ('sld', ''))
    """
    _check_text(method)
    name, _, preset = method.partition(".")
    return name, preset


def presets(cls: type) -> dict[str, Callable[..., Any]]:
    """The presets of a method by name: class methods that use published settings, and take `concepts` unless the method
    is an editor.

    Example:
        >>> from efface import registry
        >>> list(registry.presets(registry.resolve("safree")))
        ['paper', 'artist', 'official_sdxl']
        >>> list(registry.presets(registry.resolve("esd")))
        ['paper', 'code_2025']
    """
    named = {name: getattr(cls, name) for name, kind in vars(cls).items() if isinstance(kind, classmethod)}
    edits = hasattr(cls, "fit") and not hasattr(cls, "apply")
    firsts = {name: next(iter(signature(make).parameters), "") for name, make in named.items()}
    return {name: make for name, make in named.items() if edits or firsts[name] == "concepts"}


def preset_names(name: str, room: str) -> list[str]:
    """The presets of a native method, read from its source. Does not import it.

    Example:
        >>> from efface import registry
        >>> registry.preset_names("safree", "erasers")
        ['paper', 'artist', 'official_sdxl']
    """
    spec = find_spec(f"efface.{room}.{name}") if name in _files(room) else None
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    files = sorted(origin.parent.glob("*.py")) if spec.submodule_search_locations else [origin]
    sources = [ast.parse(file.read_text("utf-8")) for file in files]
    classes = [node for source in sources for node in source.body if isinstance(node, ast.ClassDef)]
    exported = {each.value for source in sources for each in ast.walk(source) if isinstance(each, ast.Constant)}
    found = []
    for node in classes:
        for part in node.body if node.name in exported else []:
            if isinstance(part, ast.FunctionDef) and [getattr(each, "id", "") for each in part.decorator_list] == [
                "classmethod"
            ]:
                taken = [arg.arg for arg in part.args.args[1:]]
                if taken[:1] == ["concepts"] or room == "editors":
                    found.append(part.name)
    return found


def about(room: str) -> dict[str, str]:
    """Name -> the first line of its file; for plug-ins, the entry point. Imports nothing.

    Example:
        >>> from efface import registry
        >>> registry.about("suites")["coco"]
        'COCO captions: prompts that no erasure should change.'
    """
    found = {name: f"a plugin, {entry.value}" for (where, name), entry in _plugins() if where == room}
    for name in _files(room):
        spec = find_spec(f"efface.{room}.{name}")
        text = ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) if spec and spec.origin else None
        found[name] = (text or "").partition("\n")[0]
    return {name: found[name] for name in methods(room)}


def _files(room: str) -> list[str]:
    """The method files of a room; empty if the room does not exist. Imports nothing."""
    spec = find_spec(f"efface.{room}")
    folders = (spec.submodule_search_locations if spec else None) or []
    return [module.name for module in iter_modules(folders) if not module.name.startswith("_")]


@functools.lru_cache(1)
def _entries(read: Callable[..., Iterable[EntryPoint]], where: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of all distributions on the path. Reading them takes long, so they are kept until it changes."""
    return tuple(read(group=GROUP))


def _path() -> tuple[tuple[str, int], ...]:
    """The places of `sys.path`, and when something was last installed there or removed."""
    places = [place or "." for place in sys.path]
    return tuple((place, os.stat(place).st_mtime_ns if os.path.exists(place) else 0) for place in places)


def _plugins() -> list[tuple[tuple[str, str], EntryPoint]]:
    """((room, name), entry point) of every method from another distribution."""
    found = []
    for entry in _entries(entry_points, _path()):
        room, _, name = entry.name.partition(".")
        if room not in ROOMS or not name or {".", ":"} & set(name):  # a dot precedes a preset, a colon a class
            owner = entry.dist.name if entry.dist else "unknown"
            raise ValueError(
                f"Expected entry points of {GROUP!r} to be named <room>.<name> with a room of {', '.join(ROOMS)} and a "
                f"name without '.' and ':', got {entry.name!r} ({entry.value}) from the package {owner!r}. Correct or "
                "uninstall it."
            )
        found.append(((room, name), entry))
    return found


def _target(entry: EntryPoint) -> tuple[str, str]:
    """The module and the class that an entry point names; "" for a missing part."""
    module, _, cls = entry.value.partition("[")[0].partition(":")
    return module.strip(), cls.strip()


def _loaded(entry: EntryPoint, cls: type) -> object:
    """The object that a plug-in's entry point names, if it may be `cls`. Does not import other plug-ins."""
    module, name = _target(entry)
    found: Any = sys.modules.get(module)
    if found is None and name == cls.__qualname__ and module.partition(".")[0] == cls.__module__.partition(".")[0]:
        found = import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _origin(entry: EntryPoint) -> str:
    return f"{entry.value} of the package {entry.dist.name!r}" if entry.dist else entry.value


def _only_class(path: str, exported: list[object]) -> type:
    classes = [each for each in exported if isinstance(each, type)]
    if len(classes) != 1:
        names = ", ".join(each.__name__ for each in classes) or "none"
        raise TypeError(
            f"Expected `{path}` to export exactly one class in `__all__`, got {names}. Correct its `__all__`."
        )
    return classes[0]


def _check_text(method: object) -> None:
    if not isinstance(method, str):
        raise TypeError(f"Expected the name of a method, got {method!r:.80}. Give a text, such as 'eiup'.")


def _word(room: str | None) -> str:
    """The word that messages use for a member of the room."""
    return "method" if room in (None, *METHODS) else room.removesuffix("s")


def _listed(names: Iterable[str]) -> str:
    return f"Known: {', '.join(names) or 'none'}."


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    names = list(names)
    return " ".join(filter(None, [f"Unknown {kind} {name!r:.80}.", near(name, names), _listed(names)]))
