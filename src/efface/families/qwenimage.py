"""Qwen-Image: a decoder with a template, whose first tokens are dropped, in joint attention with masked padding.

Guidance comes in a second call, whose text has a length of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._parts import Reading, between, encode_parameters, tokenizer_of
from .base import Family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor, nn

LONGEST = 1024  # the default of `max_sequence_length` in `encode_prompt`


@dataclass(frozen=True)
class _QwenImage(Family):
    def recognises(self, pipe: DiffusionPipeline) -> bool:
        """Not if the text encoder reads the prompt together with a picture (Edit), which a phrase does not have."""
        return super().recognises(pipe) and "image" not in encode_parameters(pipe)

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
    def placed(self, denoiser: nn.Module, positions: Tensor, prompt: int) -> Iterator[None]:
        """Picks the rotations of these positions among those that the denoiser counted for all columns."""

        def pick(module: nn.Module, args: Any, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            from torch import cat

            picture, text = out
            return picture, cat([text[positions.round().long()], text[:prompt]])

        embedding: Any = denoiser.pos_embed
        handle = embedding.register_forward_hook(pick)
        try:
            yield
        finally:
            handle.remove()


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
