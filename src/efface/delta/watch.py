"""Checks whether weights still hold their written content, with a hook on calls of their module.

`weight.data += x`, which fuses LoRAs, changes neither a tensor's pointer nor its version counter. A seal therefore
stores a strided sample of the values and compares it bit by bit.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 4096  # largest number of compared elements per tensor
SHARE = 1000  # on an accelerator, a check costs at most 1 / SHARE of the time between two checks
_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Seal:
    """The content of a tensor at the time of writing.

    Args:
        sample: some of its elements.
        shape: shape of the tensor.
        fused: names of the LoRAs (PEFT) that were fused into it at that time.
        other: the largest distance from the sample in a failed check since then. None: no check failed.
    """

    sample: Tensor
    shape: torch.Size
    fused: tuple[str, ...] = ()
    other: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, fused: tuple[str, ...] = ()) -> Seal:
        return cls(sampled(tensor).clone(), tensor.shape, fused)

    def near(self, tensor: Tensor, changes: Sequence[Tensor] = ()) -> bool:
        """Whether the tensor holds the sealed content plus these changes, up to rounding.

        Adding and subtracting a value leaves rounding errors on its scale, which `other` records.
        """
        if tensor.shape != self.shape:
            return False
        now = sampled(tensor).double()
        kept, moved = self.sample.to(now), torch.zeros_like(now)
        for change in changes:
            moved += sampled(change).to(now)
        size = kept.abs() + moved.abs() + (0 if self.other is None else self.other.to(now))
        if tensor.element_size() >= 4:  # the rounding of large elements hides a small change
            size = size + size.max()
        return bool(((now - kept - moved).abs() <= 2 * torch.finfo(tensor.dtype).eps * size).all())

    def moved(self, tensor: Tensor) -> Seal:
        """The seal, updated with the tensor's distance."""
        if tensor.shape != self.shape:
            return self
        now = sampled(tensor).double()
        far = (now - self.sample.to(now)).abs()
        return replace(self, other=far if self.other is None else torch.maximum(far, self.other.to(far)))

    def cast(self, tensor: Tensor) -> bool:
        """Whether the tensor holds the sealed content in another precision, or after a cast to a narrower one and
        back."""
        if tensor.shape != self.shape:
            return False
        now = sampled(tensor)
        kept = self.sample.to(now.device)
        return any(torch.equal(_bits(kept.to(through).to(now.dtype)), _bits(now)) for through in (now.dtype, *_NARROW))


def sampled(tensor: Tensor) -> Tensor:
    """At most `SAMPLE` elements, at a stride that covers every column."""
    step = -(-tensor.numel() // SAMPLE)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    return tensor.detach().reshape(-1)[:: max(step, 1)]


def differing(pairs: Mapping[str, tuple[Seal, Tensor]]) -> list[str]:
    """The names of the tensors that no longer match their seals. Synchronises once per device."""
    flags, others = {}, []
    for name, (seal, tensor) in pairs.items():
        now, kept = sampled(tensor), seal.sample
        if tensor.shape != seal.shape or kept.dtype != now.dtype:
            others.append(name)
        else:
            flags[name] = (_bits(now) != _bits(kept.to(now.device))).any()
    for device in {flag.device for flag in flags.values()}:
        here = [name for name, flag in flags.items() if flag.device == device]
        differs = torch.stack([flags[name] for name in here]).tolist()
        others += [name for name, different in zip(here, differs, strict=True) if different]
    return others


def _bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.element_size()])


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Calls of the module in this block use other weights, which are not compared."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


class Watch:
    """A hook on a module that starts a check when the module is called or loaded weights.

    By itself, as in a pickle, it has no effect: a subclass defines the check. It skips checks within a trajectory (same
    text, continuing time) while they would cost more than their share.
    """

    def __init__(self) -> None:
        self.text: weakref.ref[Tensor] | None = None
        self.time, self.next = math.inf, 0.0

    def check(self) -> None:
        """Raises unless the module is as expected."""

    def after_load(self, module: nn.Module, keys: Any) -> None:
        """Called after `load_state_dict` of the module."""

    def put(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self, with_kwargs=True)
        module.register_load_state_dict_post_hook(self.after_load)

    @staticmethod
    def take_off(module: nn.Module) -> None:
        """Removes the watch of a module, also one from a copy or a pickle."""
        for key, hook in [*module._forward_pre_hooks.items()]:
            if isinstance(hook, Watch):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        for key, after in [*module._load_state_dict_post_hooks.items()]:
            if isinstance(getattr(after, "__self__", None), Watch):
                del module._load_state_dict_post_hooks[key]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or _PAUSED.get():
            return
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        moment = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        began, same_text = time.perf_counter(), text is not None and self.text is not None and self.text() is text
        forward = True
        if (
            not isinstance(moment, Tensor) or moment.device.type == "cpu"
        ):  # on other devices, reading it would synchronise
            last, self.time = self.time, _number(moment)
            forward = self.time < last
        if same_text and forward and began < self.next:
            return
        self.text = weakref.ref(text) if isinstance(text, Tensor) else None
        self.check()
        ended = time.perf_counter()
        self.next = ended + SHARE * (ended - began)

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


_wrapped: Any = getattr(torch._C, "_functorch").is_functorch_wrapped_tensor  # noqa: B009


def _number(moment: Any) -> float:
    """A time as a number. Without one, or under `torch.func`, each call counts as a separate trajectory."""
    if isinstance(moment, Tensor):
        if not moment.numel() or _wrapped(moment):
            return math.inf
        return float(moment.detach().reshape(-1)[0])
    return float(moment) if isinstance(moment, (int, float)) else math.inf
