"""The base of detectors, which evaluates each picture once and caches the result."""

from __future__ import annotations

import abc
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from efface.core import check_pictures

KEPT = 20_000
_looks: OrderedDict[tuple[str, bytes], Any] = OrderedDict()


def looks(detector: Looking, images: Tensor) -> list[Any]:
    """The results of `detector` for pictures [N, 3, H, W], from the cache if possible.

    Raises:
        ValueError: the pictures are not float [N, 3, H, W] in [0, 1].
    """
    images = check_pictures(images)
    keys = [(detector.look_name, hashlib.sha256(x.contiguous().numpy().tobytes()).digest()) for x in images]
    new = [k for k, key in enumerate(keys) if key not in _looks]
    found = dict(zip([keys[k] for k in new], detector.look(images[new]) if new else [], strict=True))
    out = [found[key] if key in found else _looks[key] for key in keys]
    _looks.update(found)
    while len(_looks) > KEPT:
        _looks.popitem(last=False)
    return out


class Looking(abc.ABC):
    """A detector in two steps: `look` evaluates pictures, shared by detectors of one `look_name`; `decide` answers."""

    anything_unsafe: ClassVar[bool] = False
    """Whether it detects unsafe pictures of any kind without names."""

    @property
    @abc.abstractmethod
    def name(self) -> str: ...
    @property
    @abc.abstractmethod
    def look_name(self) -> str: ...
    @abc.abstractmethod
    def look(self, images: Tensor) -> list[Any]: ...
    @abc.abstractmethod
    def decide(self, looks: list[Any]) -> Tensor: ...

    def ratios(self, looks: list[Any]) -> Tensor | None:
        """The score of each picture divided by its threshold, [J, N]; at 1 the answer changes. None without scores."""
        return None

    def __call__(self, images: Tensor) -> Tensor:
        return self.decide(looks(self, images))


def only(judge: str, names: Sequence[str], known: Sequence[str]) -> None:
    strangers = [name for name in names if name.lower() not in known]
    if strangers:
        raise ValueError(
            f"{judge} cannot judge {', '.join(strangers)}, only {', '.join(known)}. Choose another detector."
        )
