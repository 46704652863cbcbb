"""The hooks on a denoiser's modules: they see queries, keys and values go by, and hand outputs over to be edited."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

HOOK = "efface"


class Watcher(Protocol):
    """What the hooks call."""

    def alone(self) -> AbstractContextManager[None]: ...

    def denoise(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def edit(self, attn: Attention, query: Tensor | None, hidden: Tensor) -> Tensor: ...

    def edit_self(
        self, attn: Attention, query: Tensor | None, key: Tensor | None, value: Tensor | None, hidden: Tensor
    ) -> Tensor: ...


class _SeeQuery(ModelHook):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.layer.query = output
        return output


class _SeeKey(_SeeQuery):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.layer.key = output
        return output


class _SeeValue(_SeeQuery):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        self.layer.value = output
        return output


class _EditOutput(ModelHook):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def pre_forward(self, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        query, self.layer.query = self.layer.query, None
        return (self.layer.site.edit(self.layer.attn, query, hidden), *args), kwargs


class _EditSelf(_EditOutput):
    def pre_forward(self, module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        layer = self.layer
        parts, layer.query, layer.key, layer.value = (layer.query, layer.key, layer.value), None, None, None
        return (layer.site.edit_self(layer.attn, *parts, hidden), *args), kwargs


class WatchDenoiser(ModelHook):
    def __init__(self, site: Watcher) -> None:
        super().__init__()
        self.site = site

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.site.denoise(self.fn_ref.original_forward, args, kwargs)
        with self.site.alone():
            return self.site.denoise(self.fn_ref.original_forward, args, kwargs)


class Layer:
    """One cross-attention module and the two submodules that carry its hooks now."""

    def __init__(self, site: Watcher, attn: Attention) -> None:
        self.site, self.attn = site, attn
        self.query: Tensor | None = None
        self.key: Tensor | None = None  # this and the next of self-attention only
        self.value: Tensor | None = None
        self.hooked: tuple[nn.Module, ...] | None = None

    def watches(self) -> dict[nn.Module, ModelHook]:
        return {self.attn.to_q: _SeeQuery(self), self.attn.to_out[0]: _EditOutput(self)}

    def fit(self) -> None:
        """Hooks the present submodules; loading or unloading a LoRA swaps them."""
        watches = self.watches()
        if self.hooked != tuple(watches):
            self.unhook()
            for module, hook in watches.items():
                register(module, hook)
            self.hooked = tuple(watches)

    def unhook(self) -> None:
        for module in self.hooked or ():
            unregister(module)
        self.hooked = None


class SelfLayer(Layer):
    """One self-attention module."""

    def watches(self) -> dict[nn.Module, ModelHook]:
        attn = self.attn
        see = {attn.to_q: _SeeQuery(self), attn.to_k: _SeeKey(self), attn.to_v: _SeeValue(self)}
        return {**see, attn.to_out[0]: _EditSelf(self)}


def register(module: nn.Module, hook: ModelHook) -> None:
    found = hasattr(module, "_diffusers_hook")  # FLUX's own pipeline puts an empty registry there
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    hook.found_registry = found


def unregister(module: nn.Module) -> None:
    registry = module._diffusers_hook
    found = registry.get_hook(HOOK).found_registry
    registry.remove_hook(HOOK, recurse=False)
    if not registry.hooks:  # leave the module as it was found; someone else's `forward` stays
        if getattr(module.forward, "__func__", None) is type(module).forward:
            vars(module).pop("forward", None)
        if not found:
            del module._diffusers_hook
