"""Z-Image: a decoder with a chat template, whose texts have no padding, in one stream with the picture.

The pipeline and the denoiser take lists with one latent and one text per row, prompts before negative prompts. Here
they are tensors, in the order of other families, and the model still gets its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import Adapted, Reading, between, tokenizer_of
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

MASK = "cap_mask"  # no argument of the denoiser: which columns of the padded texts are there
OTHERS = ("controlnet_block_samples", "siglip_feats", "image_noise_mask")


@dataclass(frozen=True)
class _ZImage(Family):
    def recognises(self, pipe: DiffusionPipeline) -> bool:
        """Not Omni, whose rows have lists of texts and pictures."""
        return super().recognises(pipe) and pipe.transformer.config.siglip_feat_dim is None

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        make: Any = tokenizer_of(pipe, tokenizer)
        if make.padding_side != "right":
            raise ValueError(
                f"Expected the tokenizer of a {type(pipe).__name__} to pad on the right, got {make.padding_side!r}. "
                "Set its `padding_side`."
            )
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        ids, empty = (
            list(make(make.apply_chat_template([{"role": "user", "content": each}], **options)).input_ids)
            for each in (text, "")
        )
        return Reading(ids, between(ids, empty))

    def unlisted(self, made: Any, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        """Texts in as many columns as the pipeline encodes."""
        length = arguments.get("max_sequence_length") or LONGEST
        (text, mask), (negative, negative_mask) = (_stacked(each, length) for each in made)
        return text, negative, mask, negative_mask

    def listed(self, made: tuple[Any, ...]) -> Any:
        text, negative, mask, negative_mask = made
        return _rows(text, mask), [] if negative is None else _rows(negative, negative_mask)

    def noise(self, time: Any) -> Any:
        return 1 - time

    def adapted(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        prompts: int | None,
        guided: bool,
        length: int | None,
    ) -> Adapted:
        from torch import stack

        x, texts = arguments["x"], arguments[self.text_argument]
        if odd := [name for name in OTHERS if arguments.get(name) is not None]:
            raise ValueError(
                f"Expected a denoiser call as ZImagePipeline makes it, got `{odd[0]}`. Use that pipeline, without a "
                "ControlNet and without pictures beside the prompt."
            )
        if prompts is not None and len(texts) not in (prompts, *[2 * prompts] * guided):
            raise ValueError(
                f"Expected {prompts} rows of prompts, and as many of negative ones with guidance, got {len(texts)}. "
                "Leave `num_images_per_prompt` out, and give each prompt several times."
            )
        half = prompts if prompts is not None and len(texts) == 2 * prompts else 0

        def turned(rows: Sequence[Any]) -> list[Any]:
            """The first `2 * half` rows, unconditional ones first, or back in the model's order; and the others."""
            return [*rows[half : 2 * half], *rows[:half], *rows[2 * half :]]

        def call(*args: Any, **given: Any) -> Any:
            given = dict(zip(PARAMETERS, args, strict=False)) | given
            captions = _rows(given[self.text_argument], given.pop(MASK))
            rows = {"x": turned(given["x"].unbind()), self.text_argument: turned(captions)}
            out = forward(**{**given, **rows, "t": stack(turned(given["t"]))})
            return _with_sample(out, -stack(turned(out[0])))

        def restored(out: Any) -> Any:
            return _with_sample(out, turned((-out[0]).unbind()))

        text, mask = _stacked(turned(texts), length or 0)
        rows = {"x": stack(turned(x)), "t": stack(turned(arguments["t"])), self.text_argument: text, MASK: mask}
        return Adapted(call, arguments | rows, restored, (lambda x: stack(turned(x))) if half else None)

    def text_columns(self, arguments: Mapping[str, Any]) -> int:
        """With learned padding, and that to the longest row."""
        return int(arguments[MASK].sum(1).amax() + SEVERAL - 1) // SEVERAL * SEVERAL

    def joint_layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """Not those of the refiners, where text and picture are apart."""
        return {name: m for name, m in super().joint_layers(denoiser).items() if name.startswith("layers.")}

    @contextmanager
    def placed(self, denoiser: nn.Module, carried: Any) -> Iterator[None]:
        """Appends the refined texts behind the rows. Each text is as far from the picture as if it were the prompt."""
        from torch import arange, cat

        model: Any = denoiser
        total, width = carried.bias.shape
        of = carried.present // width
        counts = (of == arange(total, device=of.device)[:, None]).sum(1)
        refined: list[Tensor] = []

        def longer(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, mask, freqs, *others = args
            if not refined:  # here the denoiser's weights are where they are needed
                refined.append(_refined(model, carried, of, counts.tolist()))
            first = layer is model.layers[0]
            length = x.shape[1] - (0 if first else carried.columns)
            picture = length - carried.prompt
            own = of.new_full((len(x),), carried.prompt) if mask is None else mask.sum(1) - picture
            positions = carried.positions.long() + 1 - counts[of] + own[:, None]
            if first:
                x = cat([x, refined[0].to(x).expand(len(x), -1, -1)], 1)
            if mask is not None:
                mask = cat([mask, mask.new_ones(len(mask), carried.columns)], 1)
            return (x, mask, cat([freqs, _rotations(model, positions).to(freqs)], 1), *others), kwargs

        handles = [layer.register_forward_pre_hook(longer, with_kwargs=True) for layer in model.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


PARAMETERS = ("x", "t", "cap_feats", "return_dict")
LONGEST = 512  # the default of `max_sequence_length` in `encode_prompt`


SEVERAL = 32  # columns, of which the denoiser pads texts to a multiple


def _refined(model: Any, carried: Any, of: Tensor, counts: Sequence[int]) -> Tensor:
    """The carried texts [X, D] after the denoiser's layers for texts, each by itself and with its learned padding."""
    from torch import cat

    seen, width = carried.seen.bool(), model.cap_embedder[1].weight
    texts = [carried.states[(of == k) & seen] for k in range(len(counts))]
    made = [
        model._pad_with_ids(text, (length, 1, 1), (1, 0, 0), text.device)
        for text, length in zip(texts, counts, strict=True)
    ]
    states, positions, padding = ([each[k] for each in made] for k in range(3))
    columns = model.cap_embedder(cat(states).to(width.dtype)).split([len(each) for each in states])
    x, freqs, mask, _, _ = model._prepare_sequence(
        list(columns), positions, padding, model.cap_pad_token, None, width.device
    )
    for layer in model.context_refiner:
        x = layer(x, mask, freqs)
    return cat([row[:length] for row, length in zip(x, counts, strict=True)])


def _rotations(model: Any, positions: Tensor) -> Tensor:
    """The rotations of texts at these positions [rows, X], which may be below 0."""
    from torch import where

    ids = positions.abs().flatten()[:, None] * positions.new_tensor([1, 0, 0])
    found = model.rope_embedder(ids).unflatten(0, positions.shape)
    return where(positions[..., None] < 0, found.conj(), found)


def _stacked(texts: Sequence[Tensor], length: int) -> tuple[Tensor | None, Tensor | None]:
    """Texts [L, D] of several lengths in one tensor, in at least `length` columns, and its mask."""
    from torch import arange, stack
    from torch.nn.functional import pad

    if not len(texts):
        return None, None
    lengths = [len(each) for each in texts]
    longest = max(length, *lengths)
    counted = arange(longest, device=texts[0].device).expand(len(texts), -1)
    padded = [pad(each, (0, 0, 0, longest - len(each))) for each in texts]
    return stack(padded), counted < counted.new_tensor(lengths)[:, None]


def _rows(text: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[seen] for row, seen in zip(text, mask.bool(), strict=True)]


def _with_sample(out: Any, sample: Any) -> Any:
    return (sample, *out[1:]) if isinstance(out, tuple) else type(out)(sample=sample)


ZIMAGE = _ZImage(
    "Z-Image",
    denoiser_class="ZImageTransformer2DModel",
    encoders=("Qwen3",),
    offers=frozenset({"joint_text", "causal_text", "guidance", "guidance_scale"}),
    returns=("text", "negative", "mask", "negative_mask"),
    resizable=("tokenizer",),
    settings=("max_sequence_length",),
    width_names=("cap_feat_dim",),
    unguided=0,
    ends_guidance=True,
    unit_time=True,
    text_argument="cap_feats",
    time_argument="t",
    mask_argument=MASK,
    joint="attention",
    text_first=False,
    positions=True,
    text_multiple=SEVERAL,
    joins_late=True,
)
