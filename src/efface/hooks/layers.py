"""The attention layers of a denoiser. Hooks observe queries, keys and values, and pass outputs to the edits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..families import Family
from . import watch
from .attention import CrossAttention
from .forward import Act, Hooks
from .joint import Function, Inputs, Watched


class Editing(Protocol):
    """The denoiser call that edits the outputs of layers."""

    def edit(self, layer: Layer, hidden: Tensor) -> Tensor: ...

    def edit_self(self, layer: Layer, hidden: Tensor) -> Tensor: ...

    def attend(self, layer: Layer, function: Function, inputs: Inputs, options: dict[str, Any]) -> Tensor: ...


class Layer:
    """One attention module. Hooks on its submodules observe the query, and pass on the input of `to_out`.

    Args:
        running: returns the denoiser call in which a layer runs.
        name: of the module in the denoiser.
        attn: the module, diffusers' `Attention`.
    """

    seen: tuple[str, ...] = ("to_q",)
    missed = staticmethod(watch.missed)  # the message if it was not seen

    def __init__(self, running: Callable[[str], Editing], name: str, attn: Any) -> None:
        self.running, self.name, self.attn = running, name, attn
        self.to_q: Tensor | None = None
        self.to_k: Tensor | None = None  # this and the next of self-attention only
        self.to_v: Tensor | None = None
        self.came = False  # whether it was seen in this denoiser call
        self.hooks = Hooks()
        self.whole: Any = None  # the processor that does not call `to_q` or `to_out`, if it is of that kind

    def acts(self) -> dict[nn.Module, Act]:
        """The action in each submodule. Loading or unloading a LoRA replaces submodules."""
        if self.whole is not None:
            return {self.attn: self._around}
        found: dict[nn.Module, Act] = {getattr(self.attn, part): partial(self._keep, part) for part in self.seen}
        return found | {self.attn.to_out[0]: self._out}

    def fit(self, on: bool) -> None:
        """Hooks the current submodules, as the outermost hooks, or none."""
        if self.whole is not None and self.attn.processor is not self.whole:
            self.whole = None
        self.hooks.fit(self.acts() if on else {})

    def begin(self) -> None:
        """Resets the observations at the start of a denoiser call."""
        self.to_q = self.to_k = self.to_v = None
        self.came = False

    def take_whole(self) -> None:
        """Watches the complete module from now on, until it gets another processor."""
        self.whole = self.attn.processor
        self.fit(True)

    def edit(self, hidden: Tensor) -> Tensor:
        """The input of `to_out` [rows, Q, C], after the edits."""
        hidden = self._edited(hidden)
        self.to_q = self.to_k = self.to_v = None
        return hidden

    def _edited(self, hidden: Tensor) -> Tensor:
        return self.running(self.name).edit(self, hidden)

    def _keep(self, part: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = forward(*args, **kwargs)
        setattr(self, part, out)
        return out

    def _out(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, *others = args
        return forward(self.edit(hidden), *others, **kwargs)

    def _around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Wraps a module whose processor uses the weights of `to_q` or `to_out` without calling these modules.

        Computes their outputs again, and applies the edit after `to_out`, which is linear. Ignores processors that do
        not compute attention to the text, so that the call raises.
        """
        out = forward(*args, **kwargs)
        query, attended = attention(self.attn, *args, **kwargs)
        if query is None or attended is None or not isinstance(out, Tensor):
            return out
        project, factor = self.attn.to_out[0], self.attn.rescale_output_factor
        again = project(attended)
        if self.attn.residual_connection:
            again = again + (args[0] if args else kwargs["hidden_states"])
        tolerance = 1e-3 if out.dtype in (torch.float32, torch.float64) else 3e-2
        if again.shape != out.shape or (again / factor - out).norm() > tolerance * out.norm():
            return out
        self.to_q = query
        edited = self.edit(attended)
        return out if edited is attended else out + (project(edited) - project(attended)) / factor


def attention(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """The query and the input of `to_out` [B, Q, C], from the module's projections; None if the attention is not
    standard."""
    mask = attention_mask
    odd = hidden_states.ndim != 3 or attn.group_norm or attn.spatial_norm
    if odd or encoder_hidden_states is None or (mask is not None and mask.numel() != len(mask) * mask.shape[-1]):
        return None, None
    query = attn.to_q(hidden_states)
    cross = CrossAttention(attn, query)
    return query, cross.attend(*cross.keys_values(encoder_hidden_states), None if mask is None else mask.flatten(1))


class SelfLayer(Layer):
    """One self-attention module."""

    seen = ("to_q", "to_k", "to_v")

    def _edited(self, hidden: Tensor) -> Tensor:
        return self.running(self.name).edit_self(self, hidden)


class JointLayer(Layer):
    """One joint attention module. Watches its call of torch's attention, with any processor."""

    missed = staticmethod(watch.unseen)

    def acts(self) -> dict[nn.Module, Act]:
        return {self.attn: self._around}

    def take_whole(self) -> None:
        """There is no other way to watch it."""

    def _around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = 0

        def attend(function: Function, inputs: Inputs, options: dict[str, Any]) -> Tensor:
            nonlocal found
            if inputs.query.shape[2] != inputs.key.shape[2]:  # attention to an IP-Adapter's picture
                return function(*inputs, **options)
            found += 1
            return self.running(self.name).attend(self, function, inputs, options)

        with Watched(attend):
            out = forward(*args, **kwargs)
        self.came = found == 1
        return out


class Layers:
    """All attention layers of a denoiser, and the module that projects their text, if there is one.

    Args:
        facts: the family.
        running: returns the denoiser call in which a layer runs.
        project: replaces the projection's `forward`.
    """

    def __init__(self, facts: Family, running: Callable[[str], Editing], project: Act) -> None:
        self._facts, self._running, self._project = facts, running, project
        self.cross: list[Layer] = []
        self.own: list[SelfLayer] = []
        self.projects = False  # whether a module projects the text for the layers
        self._hooks = Hooks()  # on that module

    def find(self, denoiser: nn.Module) -> None:
        """Finds the denoiser's current layers, and removes the hooks of former layers."""
        known: dict[nn.Module, Layer] = {layer.attn: layer for layer in (*self.cross, *self.own)}
        joint = self._facts.joint_layers(denoiser)
        named = {n: m for n, m in denoiser.named_modules() if isinstance(m, Attention)} | joint
        kinds = {
            n: JointLayer if n in joint else Layer if m.is_cross_attention else SelfLayer for n, m in named.items()
        }
        found = [known.pop(m) if m in known else kinds[n](self._running, n, m) for n, m in named.items()]
        for gone in known.values():
            gone.fit(False)
        self.cross = [layer for layer in found if not isinstance(layer, SelfLayer)]
        self.own = [layer for layer in found if isinstance(layer, SelfLayer)]

    def fit(self, denoiser: nn.Module | None, *, cross: bool, own: bool) -> None:
        """Hooks the needed layers, and removes the hooks of all others."""
        projection = None if denoiser is None else self._facts.text_projection(denoiser)
        self.projects = projection is not None
        self._hooks.fit({projection: self._project} if cross and projection is not None else {})
        for layer in self.cross:
            layer.fit(cross)
        for layer in self.own:
            layer.fit(own)
