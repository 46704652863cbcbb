"""Erase concepts from text-to-image diffusion models.

    import efface

    pipe = efface.load("emoji")
    with efface.erase(pipe, "alcohol"):
        images = pipe("a night at the pub").images

The public names are those of `__init__.pyi`. Efface imports them on first use: `import efface` alone loads neither
torch nor diffusers. Methods of other distributions (see `efface.registry`) are also available by class name:
`efface.Mine`. A native name has priority over a plug-in of the same name.
"""

from typing import Any

import lazy_loader as _lazy_loader

__version__ = "0.1.0"

_native, _, _names = _lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _names:
        return _native(name)
    from .registry import near, plugin

    value = None if name.startswith("_") else plugin(name)
    if value is None:
        hint = near(name, __dir__())
        raise AttributeError(f"module 'efface' has no attribute {name!r}.{hint and ' '}{hint}", name=name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from .registry import plugin_classes

    return sorted({*__all__, *plugin_classes()})
