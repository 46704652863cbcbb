"""Qwen-Image-Edit and Qwen-Image-Edit Plus."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

from diffusers import AutoencoderKLQwenImage, QwenImageEditPipeline, QwenImageEditPlusPipeline
from PIL import Image
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .parts import louder, qwen_image

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SMALLER = 1024  # by how much the areas of reference pictures shrink


class Processor(Qwen2VLProcessor):
    """The real one, without a processor of videos, which needs another package."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


class Decoder(AutoencoderKLQwenImage):
    """Without traces of the last picture that it encoded, which tests would take for traces of a method."""

    def encode(self, x: Any, return_dict: bool = True) -> Any:
        kept = dict(self.__dict__)
        made = super().encode(x, return_dict)
        self.__dict__.update(kept)
        return made


def small(kind: Any) -> Any:
    """The pipeline class, whose reference pictures have some hundred pixels, not a million."""
    module = sys.modules[kind.__module__]

    def call(self: Any, *args: Any, **options: Any) -> Any:
        original = module.calculate_dimensions

        def dimensions(area: int, ratio: float) -> Any:
            return original(max(area // SMALLER, 32 * 32), ratio)

        with mock.patch.object(module, "calculate_dimensions", dimensions):
            return kind.__call__(self, *args, **options)

    return type(kind.__name__, (kind,), {"__call__": call, "__init__": kind.__init__})


def qwenimage_edit(kind: Any = QwenImageEditPipeline) -> Any:
    """A decoder that reads a picture before the words; the picture's latents are beside those of the result."""
    made = qwen_image(MARKS)
    words = made["tokenizer"]
    made["vae"].__class__ = Decoder
    louder(made["transformer"])  # again, since the words are one part of the text
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)
    pipe = small(kind)(**made, processor=Processor(images, words))
    start, _ = pipe.prompt_template_encode.split("<|im_end|>\n<|im_start|>user\n")
    pipe.prompt_template_encode_start_idx = len(words(f"{start}<|im_end|>\n<|im_start|>user\n").input_ids)
    return pipe


def qwenimage_edit_plus() -> Any:
    """As a later version, which takes several pictures for one prompt."""
    return qwenimage_edit(QwenImageEditPlusPipeline)


def picture(colour: tuple[int, int, int] = (200, 30, 40)) -> Image.Image:
    return Image.new("RGB", (32, 32), colour)


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    """One picture for each prompt; true guidance, of which `guidance_scale` is the scale."""
    given = {"image": [picture()] * prompts, "height": 16, "width": 16, **given}
    given["true_cfg_scale"] = given.pop("guidance_scale", 4.0)
    negative = {} if given.get("negative_prompt_embeds") is not None else {"negative_prompt": [""] * prompts}
    return {**negative, **given}


BUILDERS = {"qwenimage_edit": qwenimage_edit, "qwenimage_edit_plus": qwenimage_edit_plus}
EACH = ()
PIPELINES = (QwenImageEditPipeline, QwenImageEditPlusPipeline)
