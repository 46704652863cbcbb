"""SD 1.x and 2.x, and the kind of `emoji`."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .parts import LIMIT, WORDS, denoiser, stable_diffusion, tokenizer


def sd1() -> StableDiffusionPipeline:
    return stable_diffusion(tokenizer(), 32, denoiser(32))


def sd2() -> StableDiffusionPipeline:
    """Wider text, linear projections, heads of one width, and a network that predicts v."""
    unet = denoiser(48, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
    return stable_diffusion(tokenizer("!"), 48, unet, prediction_type="v_prediction")


def small() -> StableDiffusionPipeline:
    """One level, quick to compile."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return stable_diffusion(tokenizer(), 32, denoiser(32, block_out_channels=(16,), **blocks))


def bert() -> StableDiffusionPipeline:
    """The `emoji` model's kind: a text encoder that reads both ways, with [CLS], [SEP], [MASK] and masked padding."""
    vocabulary = {word: k for k, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    marks = {f"{mark.lower()}_token": f"[{mark}]" for mark in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LIMIT,
    )
    config.use_attention_mask = True
    encoder = BertModel(config).eval()
    for name, weight in encoder.named_parameters():
        if "embeddings.weight" in name:
            torch.nn.init.normal_(weight, std=0.3 if "position" in name else 1.0)
    pipe = stable_diffusion(tokenizer(), 32, denoiser(32))
    pipe.register_modules(
        text_encoder=encoder,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LIMIT, **marks),
    )
    return pipe


BUILDERS = {"sd1": sd1, "sd2": sd2, "small": small, "bert": bert}
EACH = ("sd1", "sd2", "bert")
