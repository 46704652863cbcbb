"""Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImagePipeline

from .parts import qwen_image


def qwenimage() -> QwenImagePipeline:
    """A decoder's text without its first tokens, padded to the longest and masked; guidance in a second call."""
    pipe = QwenImagePipeline(**qwen_image())
    start, _ = pipe.prompt_template_encode.split("{}")
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(start).input_ids)
    return pipe


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    """True guidance, of which `guidance_scale` is the scale."""
    given = {"max_sequence_length": 40, "height": 16, "width": 16, **given}
    given["true_cfg_scale"] = given.pop("guidance_scale", 4.0)
    negative = {} if given.get("negative_prompt_embeds") is not None else {"negative_prompt": [""] * prompts}
    return {**negative, **given}


BUILDERS = {"qwenimage": qwenimage}
EACH = ("qwenimage",)
PIPELINES = (QwenImagePipeline,)
