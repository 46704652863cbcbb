"""Whether weights still hold what was written to them, and the hook that asks when their module is called.

A tensor's pointer and version counter do not tell: `weight.data += x`, by which LoRAs are fused, moves neither. So a
strided sample of the values is kept and compared bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE = 4096  # elements of a tensor that are compared, at most
SHARE = 1000  # on an accelerator, a check costs at most 1 / SHARE of the time between two checks
_PAUSED: ContextVar[bool] = ContextVar("paused", default=False)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NARROW = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Seal:
    """What a tensor held when it was written.

    Args:
        sample: some of its elements.
        shape: of the tensor.
        fused: names of the LoRAs (PEFT) that were fused into it then.
        other: how far something else has moved the sample at most, as seen by checks that failed; None: not at all.
    """

    sample: Tensor
    shape: torch.Size
    fused: tuple[str, ...] = ()
    other: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, fused: tuple[str, ...] = ()) -> Seal:
        return cls(sampled(tensor).clone(), tensor.shape, fused)


def sampled(tensor: Tensor) -> Tensor:
    """At most `SAMPLE` elements, at a stride that meets every column."""
    step = -(-tensor.numel() // SAMPLE)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:
        step += 1
    return tensor.detach().reshape(-1)[:: max(step, 1)]


def differing(pairs: Mapping[str, tuple[Seal, Tensor]]) -> tuple[list[str], list[str]]:
    """The names of tensors that do not hold the bits they were sealed with, and of those that do but for a cast.

    A cast may have gone to another precision and back. One synchronisation serves all tensors of a device.
    """
    names, flags, others = [], [], []
    for name, (seal, tensor) in pairs.items():
        now = sampled(tensor)
        kept = seal.sample.to(now.device) if seal.sample.device != now.device else seal.sample
        if tensor.shape != seal.shape or kept.dtype != now.dtype:
            others.append(name)
        else:
            names.append(name)
            flags.append((_bits(now) != _bits(kept)).any())
    for device in {flag.device for flag in flags}:
        here = [k for k, flag in enumerate(flags) if flag.device == device]
        differs = torch.stack([flags[k] for k in here]).tolist()
        others += [names[k] for k, different in zip(here, differs, strict=True) if different]
    cast = [name for name in others if _cast(*pairs[name])]
    return [name for name in others if name not in cast], cast


def near(seal: Seal, tensor: Tensor, change: Tensor | None = None) -> bool:
    """Whether a tensor holds what it was sealed with, plus a `change` [as its sample], up to rounding.

    What was added and taken away again leaves rounding errors of its own size, which an earlier check has seen.
    """
    if tensor.shape != seal.shape:
        return False
    now = sampled(tensor).double()
    kept, other = seal.sample.to(now), seal.other
    moved = torch.zeros_like(now) if change is None else change.to(now)
    size = kept.abs() + moved.abs() + (0 if other is None else other.to(now))
    if tensor.element_size() >= 4:  # a change this small is none
        size = size + size.max()
    return bool(((now - kept - moved).abs() <= 2 * torch.finfo(tensor.dtype).eps * size).all())


def moved(seal: Seal, tensor: Tensor) -> Tensor | None:
    """How far the sample is from its seal, and was before."""
    if tensor.shape != seal.shape:
        return seal.other
    now = sampled(tensor).double()
    far = (now - seal.sample.to(now)).abs()
    return far if seal.other is None else torch.maximum(far, seal.other.to(far))


def _bits(x: Tensor) -> Tensor:
    return x.view(_BITS[x.element_size()])


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _cast(seal: Seal, tensor: Tensor) -> bool:
    """Whether a tensor holds what it was sealed with in another precision, or rounded to a narrower one meanwhile."""
    if tensor.shape != seal.shape:
        return False
    now = sampled(tensor)
    kept = seal.sample.to(now.device)
    return any(_same(kept.to(through).to(now.dtype), now) for through in (now.dtype, *_NARROW))


def _number(moment: Any) -> float:
    """A time as a number; without one, or under `torch.func`, each call is a trajectory of its own."""
    if isinstance(moment, Tensor):
        if not moment.numel() or torch._C._functorch.is_functorch_wrapped_tensor(moment):
            return math.inf
        return float(moment.detach().reshape(-1)[0])
    return float(moment) if isinstance(moment, (int, float)) else math.inf


def check_now(module: nn.Module) -> None:
    """Makes the check of a module that is watched, whatever was checked before; nothing for other modules.

    For callers that know when a picture begins: a graph that `torch.compile` made of a watched module has no check.
    """
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, Watch) and hook.check is not None:
            hook.check(module)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """A call of the module with other weights in place, which are not to be compared."""
    token = _PAUSED.set(True)
    try:
        yield
    finally:
        _PAUSED.reset(token)


class Watch:
    """Asks for a check when a module is called, loads weights or is copied.

    A check is left out within a trajectory (the same text, and time goes on) while it would cost more than its share.

    Args:
        module: what is watched; None watches nothing (what a pickle holds).
        check: raises if the module's weights are not what they should be.
        loaded: called after `load_state_dict`.
        copied: called with the module, its copy, and what `copy.deepcopy` has copied so far.
    """

    def __init__(
        self,
        module: nn.Module | None = None,
        check: Callable[[nn.Module], None] | None = None,
        loaded: Callable[[nn.Module], None] | None = None,
        copied: Callable[[nn.Module, nn.Module, dict[int, Any]], None] | None = None,
    ) -> None:
        self.module = None if module is None else weakref.ref(module)
        self.check, self.loaded, self.copied = check, loaded, copied
        self.called: weakref.ref[nn.Module] | None = None
        self.text: weakref.ref[Tensor] | None = None
        self.time, self.next = math.inf, 0.0

    def put(self, called: nn.Module) -> None:
        """Watches the module; `called`: itself, or what `torch.compile` has put around it, which is called eagerly."""
        module = getattr(called, "_orig_mod", called)
        for each in {called: None, module: None}:
            each.register_forward_pre_hook(self, with_kwargs=True)
        module.register_load_state_dict_post_hook(self.after_load)
        self.called = weakref.ref(called)

    @staticmethod
    def take_off(module: nn.Module) -> None:
        """Takes off the watch of a module, also one that a copy or a pickle has brought along."""
        found = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Watch)]
        called = [each for hook in found if hook.called is not None and (each := hook.called()) is not None]
        for each in {module: None, **dict.fromkeys(called)}:
            for key, hook in list(each._forward_pre_hooks.items()):
                if isinstance(hook, Watch):
                    del each._forward_pre_hooks[key]
                    each._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, after in list(module._load_state_dict_post_hooks.items()):
            if isinstance(getattr(after, "__self__", None), Watch):
                del module._load_state_dict_post_hooks[key]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.check is None or torch.compiler.is_compiling() or _PAUSED.get():
            return
        text = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        moment = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        began, same_text = time.perf_counter(), text is not None and self.text is not None and self.text() is text
        forward = True
        if not isinstance(moment, Tensor) or moment.device.type == "cpu":  # elsewhere, reading it waits for the device
            last, self.time = self.time, _number(moment)
            forward = self.time < last
        if same_text and forward and began < self.next:
            return
        self.text = weakref.ref(text) if isinstance(text, Tensor) else None
        self.check(getattr(module, "_orig_mod", module))
        ended = time.perf_counter()
        self.next = ended + SHARE * (ended - began)

    def after_load(self, module: nn.Module, keys: Any) -> None:
        if self.loaded is not None:
            self.loaded(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        original = None if self.module is None else self.module()
        copy = memo.get(id(original))  # a module is known before its hooks are copied
        made = Watch(copy, self.check, self.loaded, self.copied) if isinstance(copy, nn.Module) else Watch()
        memo[id(self)] = made
        if original is not None and made.copied is not None:
            made.copied(original, copy, memo)
        return made

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()
