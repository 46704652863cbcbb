"""Whether weights, modules and torch's settings have changed. Kept encodings, keys and values depend on them."""

from __future__ import annotations

import enum
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_VALUES = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, enum.Enum, type)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HARMLESS = "transformers.utils.output_capturing"  # hooks that only collect a module's outputs
_OF_MODULES = tuple(vars(nn.Module()))  # without the names below
_HALF = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_DEEP = 12  # nested containers, after which a value counts as not comparable
_wrapped: Any = getattr(torch._C, "_functorch").is_functorch_wrapped_tensor  # noqa: B009


class Incomparable(Exception):
    """Nothing tells whether a value has changed."""


# ---------------------------------------------------------------- weights


def plain(tensors: Iterable[Tensor], grad: bool) -> bool:
    """Whether these are ordinary tensors in memory, none of which needs a gradient now (`grad`: gradients are on)."""
    return not any(
        type(x) not in (Tensor, nn.Parameter)
        or x.is_inference()
        or x.is_meta
        or x.layout is not torch.strided
        or x.element_size() not in _INTEGERS
        or (grad and x.requires_grad)
        or _wrapped(x)
        for x in tensors
    )


class Weights:
    """Plain tensors, and what they were.

    `are` compares identity, address, version, dtype, device and shape, which most changes of a tensor change.
    `have_bits_of` compares sums of the bits along rows and columns, because `weight.data += x`, which fuses LoRAs,
    changes none of these.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._each = [(weakref.ref(x), _facts(x)) for x in tensors]
        self._sums = sums(tensors)

    def are(self, tensors: Sequence[Tensor]) -> bool:
        pairs = zip(self._each, tensors, strict=False)
        same = all(ref() is x and facts == _facts(x) for (ref, facts), x in pairs)
        return same and len(self._each) == len(tensors)

    def have_bits_of(self, tensors: Sequence[Tensor]) -> bool:
        alike: dict[torch.device, list[Tensor]] = {}
        for a, b in zip(self._sums, sums(tensors), strict=True):
            alike.setdefault(a.device, []).append((a == b).all())
        return all(bool(torch.stack(each).all()) for each in alike.values())


def _facts(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), x._version, x.dtype, x.device, x.shape, x.stride()


def sums(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Sums of each tensor's bits along rows and columns, and of its values along rows; vectors stay whole.

    Bits are summed in words of 64, for speed. The highest bits of a word are lost when sums overflow, but not in the
    sums of values.
    """
    found = []
    for x in tensors:
        values = x.detach()
        if values.ndim < 2:
            found.append(_bits(values).clone())
            continue
        values = values.flatten(1)
        bits = _bits(values)
        found += [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]
        if values.is_floating_point() and values.element_size() > 1:
            found.append(_bits(values.sum(1)))
    return found


def _bits(x: Tensor) -> Tensor:
    """The bits as integers, if possible several numbers in one."""
    size = x.element_size()
    words = x.ndim and x.is_contiguous() and not (x.shape[-1] * size % 8 or x.storage_offset() * size % 8)
    return x.view(torch.int64 if words else _INTEGERS[size])


# ---------------------------------------------------------------- modules and settings


class Is:
    """An object, which equals only itself, while it lives."""

    def __init__(self, value: Any) -> None:
        self._ref = weakref.ref(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and self._ref() is not None and self._ref() is other._ref()

    def __hash__(self) -> int:
        return id(self._ref)


def of_module(root: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
    """All that decides a module's output besides the input and its tensors, which are added to `tensors`.

    Raises:
        Incomparable: it is no module, its output may be random (training mode), other code takes part in it (hooks, a
            replaced `forward`, as offloading has), or an attribute has a type that cannot be compared.
    """
    if not isinstance(root, nn.Module):
        raise Incomparable
    found, known = [], {}
    for name, module in root.named_modules():
        inside = vars(module)
        if inside["training"] or "forward" in inside:
            raise Incomparable
        hooks = [hook for kind in _HOOKS for hook in inside[kind].values()]
        if any(getattr(hook, "__module__", None) != _HARMLESS for hook in hooks):
            raise Incomparable
        own = []
        for kind in ("_parameters", "_buffers"):
            there = {each: x for each, x in inside[kind].items() if x is not None}
            own.append(tuple(there))
            tensors += there.values()
        others = {key: value for key, value in inside.items() if key not in _OF_MODULES}
        for key, value in others.items():
            if id(value) not in known:  # modules share their config
                known[id(value)] = frozen(value, tensors)
            own.append((key, known[id(value)]))
        found.append((name, type(module), type(module).forward, *own))
    return tuple(found)


def frozen(value: Any, tensors: list[Tensor] | None = None, depth: int = 0) -> Any:
    """A value that equals that of an equal value, and stays when the value changes. Tensors are added to `tensors`.

    Raises:
        Incomparable: the value has, or holds, another type than those of configs.
    """
    if isinstance(value, _VALUES):
        return type(value), value
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value
    if depth > _DEEP:
        raise Incomparable
    if isinstance(value, Tensor) and tensors is not None:
        tensors.append(value)
        return Tensor
    return type(value), _inside(value, functools.partial(frozen, tensors=tensors, depth=depth + 1))


def _inside(value: Any, deeper: Callable[[Any], Any]) -> tuple[Any, ...] | frozenset[Any]:
    """What a container or a config holds."""
    if isinstance(value, Mapping):
        return tuple((deeper(key), deeper(each)) for key, each in value.items())
    if isinstance(value, (set, frozenset)):
        return frozenset(map(deeper, value))
    if isinstance(value, functools.partial):
        return tuple(map(deeper, (value.func, value.args, value.keywords)))
    if isinstance(value, (list, tuple)):
        return tuple(map(deeper, value))
    if type(value).__name__.endswith("Config"):
        return (deeper(vars(value)),)
    raise Incomparable


def setting(device: torch.device) -> tuple[Any, ...]:
    """torch's settings that decide how a module computes on a device.

    Raises:
        Incomparable: other code watches or changes the computation, such as a compiler or a mode.
    """
    if torch.compiler.is_compiling() or _modes() or nn.modules.module._has_any_global_hook():
        raise Incomparable
    kinds = [kind for kind in dict.fromkeys(("cpu", device.type)) if torch.amp.is_autocast_available(kind)]
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
    exact = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    cuda = torch.backends.cuda
    kernels = [getattr(cuda, f"{name}_sdp_enabled")() for name in ("flash", "mem_efficient", "math", "cudnn")]
    half = [getattr(cuda.matmul, name) for name in _HALF]
    others = torch.is_inference_mode_enabled(), torch.get_default_dtype(), F.scaled_dot_product_attention
    return (*casts, *exact, *kernels, *half, *others)  # libraries replace the last


def _modes() -> int:
    inner: Any = torch._C
    return int(inner._len_torch_dispatch_stack() + inner._len_torch_function_stack())
