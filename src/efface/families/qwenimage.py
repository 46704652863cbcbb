"""Qwen-Image: a decoder with a template, whose first tokens are dropped, in joint attention with masked padding.

Guidance comes in a second call, whose text has a length of its own. In Qwen-Image-Edit the decoder reads the call's
pictures before the words, so each text is encoded with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from .. import checks
from ._parts import Reading, between, encode_parameters, tokenizer_of
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

LONGEST = 1024  # the default of `max_sequence_length` in `encode_prompt`
PICTURE = "<|image_pad|>"  # the token that the processor repeats for a picture
BEFORE = "Picture {}: <|vision_start|>" + PICTURE + "<|vision_end|>"  # where the template has no place for pictures


@dataclass(frozen=True)
class _QwenImage(Family):
    def recognises(self, pipe: DiffusionPipeline) -> bool:
        return super().recognises(pipe) and ("image" in encode_parameters(pipe)) == self.reads_pictures

    @property
    def reads_pictures(self) -> bool:
        """Whether the text encoder reads the prompt together with pictures."""
        return False

    def state_width(self, encoder: Any) -> int:
        return int(encoder.config.get_text_config().hidden_size)

    def limit(self, pipe: DiffusionPipeline, tokenizer: str, settings: Mapping[str, Any]) -> int:
        return min(int(settings.get("max_sequence_length") or LONGEST), int(pipe.tokenizer_max_length))

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        make, dropped = tokenizer_of(pipe, tokenizer), pipe.prompt_template_encode_start_idx
        ids, empty = (list(make(pipe.prompt_template_encode.format(each)).input_ids) for each in (text, ""))
        own = between(ids, empty)
        return Reading(ids[dropped:], slice(own.start - dropped, own.stop - dropped), dropped)

    @contextmanager
    def placed(self, denoiser: nn.Module, carried: Any) -> Iterator[None]:
        """Picks the rotations of these positions among those that the denoiser counted for all columns."""

        def pick(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            from torch import cat

            picture, text = out
            return picture, cat([text[carried.positions.round().long()], text[: carried.prompt]])

        embedding: Any = denoiser.pos_embed
        handle = embedding.register_forward_hook(pick)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class _Edit(_QwenImage):
    """A phrase is encoded with the pictures that the prompt is encoded with. Outside of a call, where none is known, a
    grey one stands in if the template has a place for it."""

    @property
    def reads_pictures(self) -> bool:
        return True

    def limit(self, pipe: DiffusionPipeline, tokenizer: str, settings: Mapping[str, Any]) -> int:
        """The tokenizer's: these pipelines do not cut texts."""
        return int(tokenizer_of(pipe, tokenizer).model_max_length)

    def read(self, pipe: DiffusionPipeline, tokenizer: str, text: str, settings: Mapping[str, Any]) -> Reading:
        pictures = _pictures(pipe, settings)
        template, counts = pipe.prompt_template_encode, [_tokens(pipe, picture) for picture in pictures]
        before = "" if PICTURE in template else "".join(BEFORE.format(k + 1) for k in range(len(pictures)))
        make, dropped = tokenizer_of(pipe, tokenizer), pipe.prompt_template_encode_start_idx
        mark = make.convert_tokens_to_ids(PICTURE)
        written = (make(template.format(before + each)).input_ids for each in (text, ""))
        ids, empty = (_expanded(list(each), mark, counts) for each in written)
        own = between(ids, empty)
        return Reading(ids[dropped:], slice(own.start - dropped, own.stop - dropped), dropped)

    def encoded(
        self, pipe: DiffusionPipeline, encode: Callable[..., Any], texts: Sequence[str], settings: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """One by one: each text has the tokens of all pictures, so a batch of phrases would need much memory."""
        from torch import arange, cat

        given = {**settings, "image": _pictures(pipe, settings) or None}
        states = [encode(**self.encoding_arguments(pipe, [text], given))[0] for text in texts]
        lengths = [each.shape[1] for each in states]
        for text, length in zip(texts, lengths, strict=True):
            if length != (expected := len(self.read(pipe, "tokenizer", text, settings).ids)):
                raise ValueError(
                    f"Expected {expected} tokens for a text with the call's pictures, got {length}. Give the pictures "
                    "as PIL images to a pipeline with the processor of its model."
                )
        longest = max(lengths)
        counted = arange(longest, device=states[0].device).expand(len(texts), -1)
        seen = None if min(lengths) == longest else counted < counted.new_tensor(lengths)[:, None]
        return cat([self.padded(each, longest) for each in states]), seen


def _pictures(pipe: DiffusionPipeline, settings: Mapping[str, Any]) -> list[Any]:
    """The pictures that each prompt of a call is encoded with.

    Raises:
        ValueError: they differ among the prompts. TypeError: they are no PIL images.
    """
    given = settings.get("image")
    found = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    if odd := [each for each in found if not isinstance(getattr(each, "size", None), tuple)]:
        raise TypeError(checks.refusal("`image` to be PIL images", odd[0], "Convert the pictures."))
    if PICTURE in pipe.prompt_template_encode and found:  # one picture for each prompt
        if others := [each for each in found[1:] if each is not found[0] and each != found[0]]:
            raise ValueError(
                f"Expected one picture for all prompts of a {type(pipe).__name__} call with erasers, whose phrases are "
                f"encoded with the picture, got {1 + len(others)} pictures. Call the pipeline once per picture."
            )
        return found[:1]
    return found or [_grey()] * (PICTURE in pipe.prompt_template_encode)


@functools.cache
def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (56, 56), (128, 128, 128))


def _tokens(pipe: DiffusionPipeline, picture: Any) -> int:
    """The number of tokens of a picture."""
    width, height = picture.size
    processor = pipe.processor.image_processor
    patches, merged = processor.get_number_of_image_patches(height, width), processor.merge_size
    return int(patches // merged**2)


def _expanded(ids: list[int], mark: int, counts: Sequence[int]) -> list[int]:
    """The tokens of a text, in which each picture's `mark` stands as often as counted."""
    waiting = iter(counts)
    return [token for each in ids for token in [each] * (next(waiting, 1) if each == mark else 1)]


QWEN_IMAGE = _QwenImage(
    "Qwen-Image",
    denoiser_class="QwenImageTransformer2DModel",
    encoders=("Qwen2_5_VL",),
    offers=frozenset({"joint_text", "causal_text", "guidance"}),
    returns=("text", "mask"),
    resizable=("tokenizer",),
    padded_to_limit=False,  # to the longest text of an `encode_prompt` call; without a mask if all have one length
    scale="true_cfg_scale",
    guidance_in_two_calls=True,
    unit_time=True,
    mask_argument="encoder_hidden_states_mask",
    shared_arguments=("img_shapes",),  # the first counts for all rows
    positions=True,
    picture_output=1,
)
QWEN_IMAGE_EDIT = _Edit(
    "Qwen-Image-Edit",
    **{
        each.name: getattr(QWEN_IMAGE, each.name)
        for each in fields(QWEN_IMAGE)
        if each.name not in ("name", "settings")
    },
    settings=("image",),
)
