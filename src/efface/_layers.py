"""The attention layers of a denoiser: they see queries, keys and values go by, and hand outputs over to be edited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ._forward import Act, Forward


class Watcher(Protocol):
    """What the layers call."""

    def edit(self, layer: Layer, hidden: Tensor) -> Tensor: ...

    def edit_self(self, layer: Layer, hidden: Tensor) -> Tensor: ...


class Layer:
    """One attention module; hooks on its submodules see the query and hand over what comes in front of `to_out`.

    Args:
        site: what edits.
        name: of the module in the denoiser.
        attn: the module.
    """

    seen: tuple[str, ...] = ("to_q",)

    def __init__(self, site: Watcher, name: str, attn: Attention) -> None:
        self.site, self.name, self.attn = site, name, attn
        self.to_q: Tensor | None = None
        self.to_k: Tensor | None = None  # this and the next of self-attention only
        self.to_v: Tensor | None = None
        self.edited = False  # in this denoiser call
        self.hooks: dict[nn.Module, Forward] = {}

    def acts(self) -> dict[nn.Module, Act]:
        """What to do in each submodule; loading or unloading a LoRA swaps them."""
        found: dict[nn.Module, Act] = {getattr(self.attn, part): self._keep(part) for part in self.seen}
        found[self.attn.to_out[0]] = self._edit
        return found

    def fit(self) -> None:
        """Hooks the present submodules, on top of whatever else is on them."""
        parts = [*(getattr(self.attn, part) for part in self.seen), self.attn.to_out[0]]
        if [*self.hooks] == parts and all(hook.on_top() for hook in self.hooks.values()):
            return
        self.unhook()
        self.hooks = {module: Forward(module, act) for module, act in self.acts().items()}

    def unhook(self) -> None:
        for hook in self.hooks.values():
            hook.take_off()
        self.hooks = {}

    def begin(self) -> None:
        """Nothing was seen of this denoiser call yet."""
        self.to_q = self.to_k = self.to_v = None
        self.edited = False

    def _keep(self, part: str) -> Act:
        def keep(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = forward(*args, **kwargs)
            setattr(self, part, out)
            return out

        return keep

    def _edit(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, *others = args
        hidden = self.site.edit(self, hidden)
        self.to_q = None
        return forward(hidden, *others, **kwargs)


class SelfLayer(Layer):
    """One self-attention module, for erasers that copy its map from a second picture."""

    seen = ("to_q", "to_k", "to_v")

    def _edit(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, *others = args
        hidden = self.site.edit_self(self, hidden)
        self.to_q = self.to_k = self.to_v = None
        return forward(hidden, *others, **kwargs)
