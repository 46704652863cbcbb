"""FLUX.2 dev and klein."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from .parts import QWEN, TEXT, decoder_words, louder

MARKS = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")
MISTRAL = (
    "{% for m in messages %}{% set text = m['content'][0]['text'] %}"
    "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def shallow(kind: Any) -> Any:
    """The pipeline class, whose text comes from all three states of a decoder with two layers."""

    def defaulting(original: Any) -> Any:
        def call(self: Any, *args: Any, text_encoder_out_layers: Any = (0, 1, 2), **options: Any) -> Any:
            return original(self, *args, text_encoder_out_layers=text_encoder_out_layers, **options)

        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return call

    methods = {name: defaulting(getattr(kind, name)) for name in ("encode_prompt", "__call__")}
    return type(kind.__name__, (kind,), {**methods, "__init__": kind.__init__})


def parts(words: Any, encoder: Any, guidance_embeds: bool) -> dict[str, Any]:
    words.padding_side = "left" if guidance_embeds else "right"
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()
    for modulation in (m for n, m in transformer.named_modules() if "modulation" in n and n.endswith("linear")):
        modulation.weight.data *= 4  # gates
    for name, weight in transformer.named_parameters():
        if "add_v_proj" in name or "to_add_out" in name:
            weight.data *= 6
    return {
        "vae": AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
        ).eval(),
        "text_encoder": encoder.eval(),
        "tokenizer": words,
        "transformer": louder(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def flux2() -> Flux2Pipeline:
    """A decoder's text with a position for each column, padded in front; distilled, so without guidance."""
    words = decoder_words(("<pad>", *MARKS), chat_template=MISTRAL)
    picture = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
    }
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": len(words), **TEXT},
        vision_config={"model_type": "pixtral", "image_size": 16, "patch_size": 8, **picture},
    )
    made: Flux2Pipeline = shallow(Flux2Pipeline)(**parts(words, Mistral3ForConditionalGeneration(config), True))
    made.system_message = "a night of the moon"
    return made


def klein() -> Flux2KleinPipeline:
    """Another decoder, padded behind; guidance in a second call, whose text is \"\"."""
    words = decoder_words(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), chat_template=QWEN)
    encoder = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), max_position_embeddings=128, **TEXT))
    made: Flux2KleinPipeline = shallow(Flux2KleinPipeline)(**parts(words, encoder, False))
    return made


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    return {"max_sequence_length": 40, "height": 16, "width": 16, **given}


BUILDERS = {"flux2": flux2, "klein": klein}
EACH = ("flux2",)
PIPELINES = (Flux2Pipeline, Flux2KleinPipeline)
