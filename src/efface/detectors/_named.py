"""Detectors by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efface import checks, registry
from efface.core import Detector, check_detector
from efface.fields import field_names
from efface.registry import near

from . import nudenet, open_nsfw
from ._protocols import NUDENET
from .nudenet import NudeNet
from .open_nsfw import OpenNSFW

Spec = str | Mapping[str, Any] | Callable[[tuple[str, ...]], Detector]
"""A detector's name, a mapping with "name" and options, or a callable that makes a detector from names."""


def detector(spec: Spec, names: str | Sequence[str] = ()) -> Detector:
    """Makes a detector by name.

    Args:
        spec: "eyes"; "open_nsfw"; "nudenet" or a protocol such as "nudenet3_any9_t0.45"; or a mapping with the name
            and options, such as {"name": "clip", "labels": ["cat", "dog"], "clip": "FOLDER"}, {"name": "q16",
            "prompts": "q16.safetensors"}, {"name": "classifier", "folder": "FOLDER"}, {"name": "nudenet", "labels":
            "9", "threshold": 0.6}. Names of other packages' detectors also work. A callable receives the names.
        names: the things to detect; any of them counts. () = everything that the detector knows.

    Raises:
        ValueError: the detector or an option is unknown, a detector name occurs twice, or the detector cannot judge
            these names. When called: pictures are not float [N, 3, H, W] in [0, 1], or not finite.
        TypeError: `spec` has another type, or the registered class is not a detector.
        ImportError: its package is missing. The message has the pip command.
        FileNotFoundError: its weights are missing.

    Example:
        >>> import efface
        >>> import torch
        >>> efface.detector("eyes", "cat")(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 2])
    """
    asked = (names,) if isinstance(names, str) else tuple(names)
    if callable(spec):
        return spec(asked)
    if not isinstance(spec, (str, Mapping)):
        raise TypeError(
            checks.refusal(
                "a detector's name, a mapping with its name and options, or a callable",
                spec,
                'Write for example efface.detector("eyes", "cat").',
            )
        )
    options: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(options.pop("name", ""))
    make, preset = _kind(name)
    known = _options(name, make)
    if make is NudeNet:
        nudenet._nudenet()
    elif make is OpenNSFW:
        open_nsfw._network()
    for option in options:
        if option not in known:
            hint = near(str(option), known)
            raise ValueError(
                f"The detector {name!r} has no option {option!r}. {hint}{' ' if hint else ''}"
                f"Its options: {', '.join(known) or 'none'}."
            )
    made: Detector = make(names=asked, **preset | options)
    check_detector(made)
    return made


def _options(name: str, cls: Any) -> list[str]:
    """The fields of a detector besides `names`."""
    fields = field_names(cls)
    if "names" not in fields:
        raise TypeError(
            f"Expected the detector {name!r} to be a dataclass with a field `names`, got "
            f"`{cls.__module__}.{cls.__qualname__}`. Change it, or uninstall its package."
        )
    return [field for field in fields if field != "names"]


def _kind(name: str) -> tuple[type, dict[str, Any]]:
    """The class of a detector, and the options that its name implies."""
    if name in NUDENET:
        labels, threshold = NUDENET[name]
        return NudeNet, {"labels": labels, "threshold": threshold}
    known = [*registry.methods("detectors"), *NUDENET]
    if name not in known:
        hint = near(name, known)
        raise ValueError(
            f"Unknown detector {checks.shown(name)}. {hint}{' ' if hint else ''}Known: {', '.join(known)}."
        )
    return registry.resolve(name, "detectors"), {}


def judges_anything_unsafe(spec: Spec) -> bool:
    """Whether a detector works without names."""
    if callable(spec):
        return False
    cls, _ = _kind(spec if isinstance(spec, str) else str(spec.get("name", "")))
    return bool(getattr(cls, "anything_unsafe", False))
