"""Tiny random pipelines of all families, whole and real: tokenizers, text models, denoiser, VAE and scheduler.

Random weights alone test little: attention would be uniform and all text alike. Here the token embeddings and the
query, key and value projections are scaled so that what a prompt says changes the picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

import efface
from efface import Concept
from efface._weights import text_hash
from efface.erasers.gie.adapter import Adapter, network

WORDS = ("a", "at", "the", "of", "and", "night", "pub", "cat", "dog", "beer", "wine", "glass", "red", "big", "moon")
LIMIT = 16  # tokens in a prompt, start and end included
STEPS = 3
PROMPT = "a night at the pub"
PROMPTS = (PROMPT, "a red cat")
ALCOHOL = Concept("alcohol", ("beer", "wine glass"))
CAT = Concept("cat")


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


def sd1() -> StableDiffusionPipeline:
    return stable_diffusion(tokenizer(), 32, denoiser(32))


def sd2() -> StableDiffusionPipeline:
    """Wider text, linear projections, heads of one width, and a network that predicts v."""
    unet = denoiser(48, attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True)
    return stable_diffusion(tokenizer("!"), 48, unet, prediction_type="v_prediction")


def sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders side by side, padded differently, and a pooled text past the cross-attention."""
    tokens, tokens_2 = tokenizer(), tokenizer("!")
    unet = denoiser(
        16 + 24,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )
    return StableDiffusionXLPipeline(
        vae=picture_model(),
        text_encoder=text_model(tokens, 16),
        text_encoder_2=text_model(tokens_2, 24, CLIPTextModelWithProjection),
        tokenizer=tokens,
        tokenizer_2=tokens_2,
        unet=unet,
        scheduler=scheduler(),
        add_watermarker=False,
    )


def small() -> StableDiffusionPipeline:
    """One level, quick to compile."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return stable_diffusion(tokenizer(), 32, denoiser(32, block_out_channels=(16,), **blocks))


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


def pixart(kind: type = PixArtAlphaPipeline) -> Any:
    """T5, whose text is projected and whose padding is masked, and a transformer that predicts variances as well."""
    words, encoder = t5(24)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=24,
        num_layers=2,
        sample_size=8,
    ).eval()
    for name, weight in transformer.named_parameters():
        if ".attn2.to_" in name and name.endswith("weight"):
            weight.data *= 2.5
    return kind(
        tokenizer=words,
        text_encoder=encoder,
        vae=picture_model(),
        transformer=transformer,
        scheduler=scheduler(),
    )


def sd3(with_t5: bool = True, **settings: Any) -> StableDiffusion3Pipeline:
    """Two CLIP encoders side by side, T5 behind them, all read beside the picture; a network that predicts velocity."""
    tokens, tokens_2 = tokenizer(), tokenizer("!")
    words, encoder = t5(48)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 24,
        pos_embed_max_size=8,
        **settings,
    ).eval()
    return StableDiffusion3Pipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=text_model(tokens, 16, CLIPTextModelWithProjection),
        tokenizer=tokens,
        text_encoder_2=text_model(tokens_2, 24, CLIPTextModelWithProjection),
        tokenizer_2=tokens_2,
        text_encoder_3=encoder if with_t5 else None,
        tokenizer_3=words if with_t5 else None,
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def sd35() -> StableDiffusion3Pipeline:
    """As 3.5 Medium is built, without T5."""
    return sd3(with_t5=False, dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(guidance_embeds: bool = True) -> FluxPipeline:
    """T5 beside the picture, CLIP pooled; the unconditional prediction has a call of its own."""
    tokens, (words, encoder) = tokenizer(), t5(24)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return FluxPipeline(
        vae=picture_model(shift_factor=0.0),
        text_encoder=text_model(tokens, 16),
        tokenizer=tokens,
        text_encoder_2=encoder,
        tokenizer_2=words,
        transformer=louder(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def louder(transformer: Any) -> Any:
    """With weights that let the text matter."""
    for name, weight in transformer.named_parameters():
        if any(part in name for part in (".add_", "context_embedder", "text_embedder")) and name.endswith("weight"):
            weight.data *= 2.5
    return transformer


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


def pixart_sigma() -> Any:
    return pixart(PixArtSigmaPipeline)


BUILDERS: dict[str, Callable[[], Any]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "small": small}
BUILDERS |= {"bert": bert, "pixart": pixart, "pixart_sigma": pixart_sigma}
BUILDERS |= {"sd3": sd3, "sd35": sd35, "flux": flux}
FAMILIES = ("sd1", "sd2", "sdxl")  # with a UNet


def pipeline(family: str = "sd1") -> Any:
    """A new pipeline; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = BUILDERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, prompt: str | Sequence[str] | None = PROMPT, **options: Any) -> Tensor:
    """What the pipeline draws, before decoding. Picture i of a call has seed i; `seed` shifts them.

    FLUX draws with true guidance, of which `guidance_scale` is the scale.
    """
    given = options.get("prompt_embeds")
    prompt = list(prompt) if isinstance(prompt, tuple) else prompt
    prompts = len(given) if given is not None else 1 if isinstance(prompt, str) else len(prompt)
    seed, images = options.pop("seed", 0), prompts * options.get("num_images_per_prompt", 1)
    generator = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    if isinstance(pipe, (PixArtAlphaPipeline, PixArtSigmaPipeline)):
        options = {"use_resolution_binning": False, "clean_caption": False, **options}
    elif hasattr(pipe, "transformer"):
        options = {"max_sequence_length": 24, **options}
    if isinstance(pipe, FluxPipeline):
        options["true_cfg_scale"] = options.pop("guidance_scale", 4.0)
        given = options.get("negative_prompt_embeds") is not None
        options = {"height": 16, "width": 16, **({} if given else {"negative_prompt": [""] * prompts}), **options}
    options = {"num_inference_steps": STEPS, "generator": generator, "output_type": "latent", **options}
    return pipe(prompt, **options).images


untouched = functools.cache(lambda family: pipeline(family))


def drawn(family: str = "sd1", *erasers: Any, prompt: str | tuple[str, ...] = PROMPT, **options: Any) -> Tensor:
    """What a pipeline draws with these erasers on, and nothing else; the plain picture without one."""
    return _drawn(family, *erasers, prompt=prompt, **{"num_inference_steps": STEPS, **options})


@functools.cache
def _drawn(family: str, *erasers: Any, prompt: str | tuple[str, ...], **options: Any) -> Tensor:
    pipe = untouched(family)
    with contextlib.ExitStack() as on:
        for eraser in erasers:
            on.enter_context(eraser.apply(pipe))
        return latents(pipe, prompt, **options)


def add_lora(pipe: Any) -> None:
    """A random LoRA on the attention of the denoiser."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.unet.add_adapter(config)


def denoiser_of(pipe: Any) -> Any:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def change(a: Tensor, b: Tensor) -> float:
    """How far `a` is from `b`, relative to the size of `b`."""
    return float((a - b).norm() / b.norm())


@functools.cache
def batch(family: str = "sd1", rows: int = 2) -> dict[str, Any]:
    """Arguments of a bare denoiser call with random text."""
    unet = pipeline(family).unet
    random = torch.Generator().manual_seed(1)
    made: dict[str, Any] = {
        "sample": torch.randn(rows, 4, 8, 8, generator=random),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(rows, LIMIT, unet.config.cross_attention_dim, generator=random),
    }
    if family == "sdxl":
        made["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, 24, generator=random),
            "time_ids": torch.zeros(rows, 6),
        }
    return made


def bare(pipe: Any, family: str = "sd1", rows: int = 2, **arguments: Any) -> Tensor:
    """The denoiser called by itself; all rows are conditional."""
    call = {**batch(family, rows), **arguments}
    with torch.no_grad(), efface.conditional_rows(pipe, [True] * len(call["sample"])):
        return pipe.unet(**call).sample


# ---------------------------------------------------------------- GIE's adapter


def execution_order(pipe: Any) -> tuple[str, ...]:
    """Names of the cross-attention layers, as they run."""
    names, order = {m: n for n, m in denoiser_of(pipe).named_modules() if n.endswith("attn2")}, []
    watches = [m.register_forward_pre_hook(lambda module, args: order.append(names[module])) for m in names]
    latents(pipe, num_inference_steps=1)
    for watch in watches:
        watch.remove()
    return tuple(dict.fromkeys(order))


def adapter(pipe: Any, **changes: Any) -> Adapter:
    """One whose answers are well apart; the layers as they run: down, middle, up."""
    layers = execution_order(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = network(len(layers))
        torch.nn.init.constant_(net[4].bias, 1.0)
        mean, std = torch.rand(len(layers)) / 10, 0.02 + torch.rand(len(layers)) / 100
    given = {
        "net": net,
        "mean": mean,
        "std": std,
        "layers": layers,
        "model": text_hash(pipe, {}),
        "text_encoder": "CLIP",
    }
    return Adapter(**(given | changes))


_files = tempfile.TemporaryDirectory()


def adapter_file(pipe: Any) -> str:
    """Of the adapter for this pipeline's model."""
    file = Path(_files.name) / f"{text_hash(pipe, {})}.safetensors"
    return str(file if file.exists() else adapter(pipe).save(file))


def steps_for(monkeypatch: pytest.MonkeyPatch, *erasers: Any) -> None:
    """More steps where SAFREE's filter is on, which acts in the first fifth of the trajectory only."""
    if any(getattr(eraser, "validation", None) for eraser in erasers):
        monkeypatch.setattr(sys.modules[__name__], "STEPS", 5)


def fitted(eraser: Any, pipe: Any) -> Any:
    """The eraser; if it has an adapter, with the one for this pipeline's model."""
    adapted = getattr(eraser, "adapter", None) is not None
    return dataclasses.replace(eraser, adapter=adapter_file(pipe)) if adapted else eraser
