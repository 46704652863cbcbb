"""Erase concepts from text-to-image diffusion models.

    import efface

    pipe = efface.load("emoji")
    with efface.erase(pipe, "alcohol"):
        images = pipe("a night at the pub").images

The names below are imported on first use: `import efface` alone loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from efface.api import concept, concepts, erase, load, stack
    from efface.core import Concept, Detector, Eraser, Handle
    from efface.erasers.eiup import EIUP
    from efface.erasers.negative_prompt import NegativePrompt
    from efface.erasers.safree import SAFREE
    from efface.erasers.sld import SLD

__version__ = "0.1.0"

__all__ = [
    "EIUP",
    "SAFREE",
    "SLD",
    "Concept",
    "Detector",
    "Eraser",
    "Handle",
    "NegativePrompt",
    "__version__",
    "concept",
    "concepts",
    "erase",
    "load",
    "stack",
]

_HOME = {
    "EIUP": "efface.erasers.eiup",
    "SAFREE": "efface.erasers.safree",
    "SLD": "efface.erasers.sld",
    "Concept": "efface.core",
    "Detector": "efface.core",
    "Eraser": "efface.core",
    "Handle": "efface.core",
    "NegativePrompt": "efface.erasers.negative_prompt",
    "concept": "efface.api",
    "concepts": "efface.api",
    "erase": "efface.api",
    "load": "efface.api",
    "stack": "efface.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'efface' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
