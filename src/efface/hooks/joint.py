"""Joint attention: texts that the denoiser carries beside the prompt, and what a layer would compute with each of them.

Prompt and picture attend to each other as without these texts. Each carried text attends to itself and to the picture,
and passes all token-wise parts of a block like the prompt's columns. The picture's queries do not see it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import CrossAttention
from .carried import Biases, Carried
from .texts import Text

LARGEST_SHARE = 0.9  # of the prompt in the softmax; above, subtracting it would lose accuracy
Function = Callable[..., Tensor]
TORCHS: Function = vars(torch._C)["_nn"].scaled_dot_product_attention  # `F`'s may be replaced


@dataclass(frozen=True, eq=False)
class Parts:
    """What a joint layer computed for its rows.

    Args:
        query: of the picture.
        alone, mass: the picture's attention to itself, and its log-sum-exp.
        key, value: of the T carried texts.
        bias: what is added to the logits of the texts, such as the logarithm of `Text.repeats`.
        scale: of the logits.
        prompt: the keys and values of the rows' own texts, and what a mask adds to their logits; None without a mask.
        own: the picture's attention to the rows' own texts, and its log-sum-exp, if the layer computed them.

    Shapes: `query` and `alone` [B, heads, Q, d], `mass` [B, heads, Q], `key` and `value` [B, heads, T, K, d], `bias`
    [T, K], those of `prompt` [B, heads, P, d] and [B or 1, heads or 1, Q or 1, P], those of `own` as `alone` and
    `mass`.
    """

    query: Tensor
    alone: Tensor
    mass: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    scale: float
    prompt: tuple[Tensor, Tensor, Tensor | None]
    own: tuple[Tensor, Tensor] | None = None

    def at(self, rows: Any) -> Parts:
        picked = {name: getattr(self, name)[rows] for name in ("query", "alone", "mass", "key", "value")}
        key, value, added = self.prompt
        added = added if added is None or len(added) == 1 else added[rows]
        own = None if self.own is None else (self.own[0][rows], self.own[1][rows])
        return replace(self, **picked, prompt=(key[rows], value[rows], added), own=own)

    def would_be(self, texts: list[int]) -> Tensor:
        """The layer's output for the picture with each of these texts instead of the prompt: [N, B, Q, C]."""
        key, value, bias = self.key[:, :, texts], self.value[:, :, texts], self.bias[texts]
        logits = (self.query @ key.flatten(2, 3).mT).to(bias.dtype).unflatten(-1, bias.shape) * self.scale + bias
        mass = logits.logsumexp(-1)
        read = torch.einsum("bhqnk,bhnkd->nbqhd", (logits - mass[..., None]).exp().to(value.dtype), value)
        share = torch.sigmoid(mass - self.mass[..., None]).permute(3, 0, 2, 1)[..., None]
        return torch.lerp(self.alone.transpose(1, 2).expand_as(read), read.to(bias.dtype), share).flatten(3)

    def read_alone(self, texts: list[int]) -> Tensor:
        """The picture's attention to each of these texts, without its attention to itself: [N, B, Q, C]."""
        key, value, bias = self.key[:, :, texts], self.value[:, :, texts], self.bias[texts]
        logits = (self.query @ key.flatten(2, 3).mT).to(bias.dtype).unflatten(-1, bias.shape) * self.scale + bias
        weights = logits.softmax(-1).to(value.dtype)
        return torch.einsum("bhqnk,bhnkd->nbqhd", weights, value).flatten(3).to(bias.dtype)

    def own_alone(self) -> tuple[Tensor, Tensor]:
        """The same of the rows' own texts: [B, Q, C], and their share in the layer's softmax: [B, Q, heads]."""
        read, mass = self.own or self._read_own()
        share = torch.sigmoid(mass - self.mass).transpose(1, 2)
        return read.transpose(1, 2).flatten(2).to(self.bias.dtype), share

    def _read_own(self) -> tuple[Tensor, Tensor]:
        key, value, added = self.prompt
        logits = (self.query @ key.mT).to(self.bias.dtype) * self.scale
        logits = logits if added is None else logits + added
        mass = logits.logsumexp(-1)
        return (logits - mass[..., None]).exp().to(value.dtype) @ value, mass


@dataclass(eq=False)
class JointAttention(CrossAttention):
    """A joint attention layer on the rows that a method edits, as its picture's queries see it.

    `would_be` and `with_empty` take the texts that the method declared: `ErasurePrompts.text`, and the neutral texts of
    `Method.references`. Each text has a state of its own in the layer, so other texts have none.

    Args:
        attn: the layer, with its own projections.
        query: the layer's query of the picture, after normalisation and rotation.
        output: the layer's output for the picture, before any method; None for unconditional rows.
        name: the layer's name in the denoiser.
        memory: the method's memory, which is empty at the start of a pipeline call.
        prompt: the text of the conditional rows, as the denoiser gets it; None for unconditional rows.
        neutral: R neutral texts, the empty prompt first.
        empty: not used here; the encoded empty prompt is carried.
        unconditional: whether guidance pushes away from these rows.
        parts: what the layer computed.
        carried: the texts beside the prompt.

    Shapes: `query` and `output` [B, Q, C].

    Raises:
        ValueError: a text is not carried, or keys of a text are asked for.

    Example:
        >>> from dataclasses import dataclass
        >>> import efface, efface.testing
        >>> from efface.hooks import Method
        >>> @dataclass(frozen=True)
        ... class Away(Method):
        ...     needs, edits_attention = ("joint_text",), True
        ...     concepts: tuple[efface.Concept, ...] = ()
        ...
        ...     def edit(self, out, cross, prompts):
        ...         return 2 * out - cross.would_be(prompts.text).mean(0)
        >>> pipe = efface.testing.pipeline("flux")
        >>> with Away(efface.Concept("beer")).apply(pipe) as handle:
        ...     image = pipe("a night", height=16, width=16, num_inference_steps=1).images[0]
        >>> handle.record["layers"]
        2
    """

    parts: Parts | None = None
    carried: Carried | None = field(default=None, repr=False)

    def _on(self, rows: Any) -> dict[str, Any]:
        return super()._on(rows) | {"parts": None if self.parts is None else self.parts.at(rows)}

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError: the keys of a text depend on the picture and on the layers before."""
        raise ValueError(
            f"Layer {self.name!r} reads text in joint attention, where a text has no keys without the picture. Use "
            "`would_be` and `with_empty`."
        )

    def would_be(self, text: Text) -> Tensor:
        """The layer's output for each of N carried texts: [N, B, Q, C], float32 or wider."""
        parts, places = self._carried(text)
        return parts.would_be(places)

    def with_empty(self, text: Text) -> Tensor:
        """The layer's output for the R neutral texts, the empty one first, and for N carried texts: [R + N, B, Q, C].

        Raises:
            ValueError: the layer has no neutral texts.
        """
        return torch.cat([self.would_be(self._neutral()), self.would_be(text)])

    def read_alone(self, text: Text) -> tuple[Tensor, Tensor, Tensor]:
        """What the picture reads of texts alone: attention without the picture's own columns.

        Args:
            text: N carried texts.

        Returns:
            For the row's own text [B, Q, C]; the share of this text in the layer's softmax [B, Q, heads]; for the R
            neutral texts, the empty one first, and the N texts [R + N, B, Q, C].

        Raises:
            ValueError: the layer has no neutral texts, or does not carry a text.
        """
        parts, places = self._carried(self._neutral())
        return *parts.own_alone(), parts.read_alone([*places, *self._carried(text)[1]])

    def _carried(self, text: Text) -> tuple[Parts, list[int]]:
        if self.parts is None or self.carried is None or id(text) not in self.carried.places:
            raise ValueError(
                f"Layer {self.name!r} reads text in joint attention and does not carry this text. Use the texts of "
                "`ErasurePrompts.text`, without changing them."
            )
        return self.parts, self.carried.places[id(text)]

    def _neutral(self) -> Text:
        if self.neutral is None:
            raise ValueError(
                f"Layer {self.name!r} has no neutral texts. Give the method `references`, the empty one first."
            )
        return self.neutral


class Inputs(NamedTuple):
    """Queries, keys and values of an attention call: [B, heads, L, d]."""

    query: Tensor
    key: Tensor
    value: Tensor

    def at(self, columns: slice, rows: slice = slice(None)) -> Inputs:
        return Inputs(*(x[rows, :, columns] for x in self))


class Watched(TorchFunctionMode):
    """Replaces torch's `scaled_dot_product_attention` inside a block by `act(function, inputs, options)`."""

    NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

    def __init__(self, act: Callable[[Function, Inputs, dict[str, Any]], Tensor]) -> None:
        super().__init__()
        self.act = act

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not TORCHS:
            return func(*args, **(kwargs or {}))
        options: dict[str, Any] = {**dict(zip(self.NAMES, args, strict=False)), **(kwargs or {})}
        return self.act(func, Inputs(*(options.pop(name) for name in Inputs._fields)), options)


def attended(
    carried: Carried,
    function: Function,
    inputs: Inputs,
    options: dict[str, Any],
    biases: Biases,
    edit: Callable[[Parts, Tensor], Tensor],
) -> Tensor:
    """One joint attention [rows, heads, L, d] with carried texts.

    Args:
        carried: the texts.
        function: the stock attention.
        inputs: of texts, prompt and picture.
        options: further arguments of the stock attention.
        biases: what they and the mask add to the logits of the texts.
        edit: receives the parts of `carried.rows` and the picture's output [rows, Q, C] of all rows; returns the edited
            output.
    """
    rows, bias, first = carried.rows, carried.bias, carried.first
    heads, scale = inputs.query.shape[1], options.get("scale") or inputs.query.shape[-1] ** -0.5
    texts, prompt, picture = carried.split(inputs.query.shape[2])
    both = slice(min(prompt.start, picture.start), max(prompt.stop, picture.stop))
    added = None
    if (mask := options.get("attn_mask")) is not None:
        added = added_for(mask if len(mask) == 1 else mask[rows], prompt, picture, bias.dtype)
        mask = mask[..., both] if mask.shape[2] == 1 else mask[..., both, both]
        options = options | {"attn_mask": mask.contiguous()}
    seen = None if mask is not None else attention(inputs.at(both), scale)
    out, mass = seen or (function(*inputs.at(both), **options), None)
    cut = carried.prompt if first else out.shape[2] - carried.prompt
    beside, inside = out.tensor_split([cut], 2)[:: 1 if first else -1]
    here = inputs.at(picture, rows)
    alone = of_prompt = None
    if mass is not None and carried.prompt < inside.shape[2]:
        mass = mass[rows].tensor_split([cut], 2)[first]
        of_prompt = with_mass(Inputs(here.query, *inputs.at(prompt, rows)[1:]), scale)
        alone = without(of_prompt, inside[rows].to(bias.dtype), mass.to(bias.dtype))
    alone, lse = alone or with_mass(here, scale)
    own = Inputs(*(x[:, :, carried.spread].unflatten(2, bias.shape) for x in inputs.at(texts, rows)))
    _, *of_text = inputs.at(prompt, rows)
    held = (own.key, own.value, biases.picture, scale, (of_text[0], of_text[1], added), of_prompt)
    found = Parts(here.query, alone.to(bias.dtype), lse.to(bias.dtype), *held)
    edited = edit(found, inside.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2)
    read = _apart(own, here, biases, scale)[:, :, carried.present].to(out.dtype)
    before, after = rows.start, len(out) - rows.stop
    if before or after:  # rows that do not need the texts
        read = F.pad(read, (0, 0, 0, 0, 0, 0, before, after))
    return torch.cat([read, beside, edited] if first else [edited, beside, read], 2)


def added_for(mask: Tensor, prompt: slice, picture: slice, dtype: torch.dtype) -> Tensor:
    """What a mask [B, heads, L or 1, L] adds to the logits of the picture's queries for the prompt, relative to those
    for the picture: [B, heads, Q or 1, P]."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
    mask = (mask if mask.shape[2] == 1 else mask[:, :, picture]).to(dtype)
    return mask[..., prompt] - mask[..., picture][..., :1]


def _apart(text: Inputs, picture: Inputs, biases: Biases, scale: float) -> Tensor:
    """Each text's attention to itself and to the picture: [B, heads, T * K, d]. `text` [B, heads, T, K, d]."""
    bias = biases.picture
    own = (text.query @ text.key.mT).to(bias.dtype) * scale + biases.own
    others = (text.query.flatten(2, 3) @ picture.key.mT).to(bias.dtype).unflatten(2, bias.shape) * scale
    others = others + biases.others
    weights = torch.cat([own, others], -1).softmax(-1).to(text.value.dtype)
    own, others = weights.split([own.shape[-1], others.shape[-1]], -1)
    return (own @ text.value).flatten(2, 3) + others.flatten(2, 3) @ picture.value


def without(some: tuple[Tensor, Tensor], out: Tensor, mass: Tensor) -> tuple[Tensor, Tensor] | None:
    """Attention without some keys, which `out` and its log-sum-exp `mass` include; None if their share is large.

    `some` has the attention to these keys, and its log-sum-exp.
    """
    gone, lse = some
    share = (lse.to(mass.dtype) - mass).exp()[..., None]
    if large(share):
        return None
    return (out - share * gone.to(out.dtype)) / (1 - share), mass + torch.log1p(-share[..., 0])


def large(share: Tensor) -> bool:
    return bool(share.amax() > LARGEST_SHARE)


def with_mass(inputs: Inputs, scale: float) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, Q, d] and its log-sum-exp [B, heads, Q]."""
    if (found := attention(inputs, scale)) is not None:
        return found
    query, key, value = inputs
    logits = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    mass = logits.logsumexp(-1)
    return (logits - mass[..., None]).exp().to(value.dtype) @ value, mass


def attention(inputs: Inputs, scale: float) -> tuple[Tensor, Tensor] | None:
    """The stock attention, bit for bit, with its log-sum-exp; None if its kernel does not return that."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return None  # the log-sum-exp of kernels has no gradient
    query, aten = inputs.query, torch.ops.aten
    choice = torch._fused_sdp_choice(*inputs, scale=scale)
    if query.device.type == "cpu" and choice == 1:
        out, mass = aten._scaled_dot_product_flash_attention_for_cpu(*inputs, scale=scale)
    elif query.device.type == "cuda" and choice == 1 and query.shape[-1] % 8 == 0:
        out, mass, *_ = aten._scaled_dot_product_flash_attention(*inputs, scale=scale)
    elif query.device.type == "cuda" and choice in (2, 3):
        kernel = (aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention)[choice - 2]
        out, mass, *_ = kernel(*inputs, None, True, scale=scale)
    else:
        return None
    return out, mass.reshape(*out.shape[:2], -1)[..., : out.shape[2]]
