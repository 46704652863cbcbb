"""What tiny pipelines are made of: tokenizers, text encoders, UNets, a VAE and a scheduler."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

WORDS = ("a", "at", "the", "of", "and", "night", "pub", "cat", "dog", "beer", "wine", "glass", "red", "big", "moon")
LIMIT = 16  # tokens in a prompt, start and end included
QWEN = "{% for m in messages %}<|im_start|> user {{ m['content'] }}<|im_end|>{% endfor %}<|im_start|> assistant"
TEXT = {
    "hidden_size": 8,
    "head_dim": 4,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
}


def tokenizer(padding: str = "<|endoftext|>") -> CLIPTokenizer:
    """A byte-pair tokenizer in which each of `WORDS` is one token; other words fall apart into letters."""
    vocab, merges = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2}, []
    for word in sorted(WORDS, key=len, reverse=True):  # else "at" is joined first in "cat"
        left, *letters = [*word[:-1], f"{word[-1]}</w>"]
        vocab.setdefault(left, len(vocab))
        for letter in letters:
            vocab.setdefault(letter, len(vocab))
            merges += [(left, letter)] * ((left, letter) not in merges)
            left += letter
            vocab.setdefault(left, len(vocab))
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LIMIT, pad_token=padding)
    assert all(len(made(word, add_special_tokens=False).input_ids) == 1 for word in WORDS)
    return made


def text_model(tokens: CLIPTokenizer, width: int, kind: type = CLIPTextModel) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    model = kind(config).eval()
    for name, weight in model.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(weight, std=0.3 if "position" in name else 1.0)
    return model


def t5(width: int) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """Its tokenizer, in which other words than `WORDS` are unknown, and an encoder."""
    vocabulary = {word: k for k, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512}
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, **marks), T5EncoderModel(config).eval()


def decoder_words(marks: tuple[str, ...], **options: Any) -> PreTrainedTokenizerFast:
    """A decoder's tokenizer, with these special tokens, the first of which is padding, and no other token around a
    text."""
    vocabulary = {word: k for k, word in enumerate((*marks, "<unk>", "!", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"pad_token": marks[0], "unk_token": "<unk>", "additional_special_tokens": list(marks[1:])}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **named, **options)


def denoiser(text_width: int, **settings: Any) -> UNet2DConditionModel:
    """Two levels and a middle, with cross-attention in which the text matters."""
    settings = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": text_width,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
        **settings,
    }
    unet = UNet2DConditionModel(**settings).eval()
    for name, weight in unet.named_parameters():
        if ".attn2.to_" in name and name.endswith("weight"):
            weight.data *= 2.5
    return unet


def louder(transformer: Any) -> Any:
    """With weights that let the text matter."""
    for name, weight in transformer.named_parameters():
        if any(part in name for part in (".add_", "context_embedder", "text_embedder")) and name.endswith("weight"):
            weight.data *= 2.5
    return transformer


def qwen_image(pictures: tuple[str, ...] = ()) -> dict[str, Any]:
    """The components of Qwen-Image. `pictures`: the tokenizer's further marks, the third of which is a picture's."""
    words = decoder_words(("<|endoftext|>", "<|im_start|>", "<|im_end|>", *pictures))
    marks = {"image_token_id": words.convert_tokens_to_ids(pictures[2])} if pictures else {}
    config = Qwen2_5_VLConfig(
        **marks,
        text_config={
            "vocab_size": len(words),
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 24,
            **({"patch_size": 4, "window_size": 16} if pictures else {}),
        },
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=1.0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    for name, weight in transformer.named_parameters():
        if "_mod." in name and name.endswith("weight"):
            weight.data *= 4  # gates
    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ).eval(),
        "text_encoder": encoder,
        "tokenizer": words,
        "transformer": louder(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def picture_model(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **settings,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def scheduler(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **settings,
    )


def stable_diffusion(tokens: CLIPTokenizer, text_width: int, unet: UNet2DConditionModel, **schedule: Any) -> Any:
    return StableDiffusionPipeline(
        vae=picture_model(),
        text_encoder=text_model(tokens, text_width),
        tokenizer=tokens,
        unet=unet,
        scheduler=scheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fill(what: str) -> Any:
    """What `efface new family` could not write."""
    raise NotImplementedError(f"This tiny pipeline needs {what}. Write it in the file of the family's tiny pipelines.")
