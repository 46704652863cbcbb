"""The base of detectors, which evaluates each picture once and caches the result."""

from __future__ import annotations

import abc
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, ClassVar

from torch import Tensor

from efface.core import check_pictures

KEPT = 20_000
Looks = OrderedDict[tuple[str, bytes], Any]
_looks: Looks = OrderedDict()
_own: ContextVar[Looks | None] = ContextVar("efface_looks", default=None)


@contextmanager
def forgetting() -> Iterator[None]:
    """Inside, results are kept for this block only: those of pictures that are never judged again."""
    token = _own.set(OrderedDict())
    try:
        yield
    finally:
        _own.reset(token)


def looks(detector: Looking, images: Tensor) -> list[Any]:
    """The results of `detector` for pictures [N, 3, H, W], from the cache if possible.

    Raises:
        ValueError: the pictures are not float [N, 3, H, W] in [0, 1].
    """
    images, cache = check_pictures(images), _looks if (own := _own.get()) is None else own
    keys = [(detector.look_name, hashlib.sha256(x.contiguous().numpy().tobytes()).digest()) for x in images]
    known = {}
    for key in keys:
        with suppress(KeyError):  # another thread may have dropped it
            known[key] = cache[key]
    new = [k for k, key in enumerate(keys) if key not in known]
    known |= (found := dict(zip([keys[k] for k in new], detector.look(images[new]) if new else [], strict=True)))
    cache.update(found)
    while len(cache) > KEPT:
        cache.popitem(last=False)
    return [known[key] for key in keys]


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
