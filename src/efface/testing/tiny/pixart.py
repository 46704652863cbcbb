"""PixArt-alpha and -sigma."""

from __future__ import annotations

from typing import Any

from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from .parts import picture_model, scheduler, t5


def pixart(kind: type = PixArtAlphaPipeline, size: int = 8) -> Any:
    """T5, whose text is projected and whose padding is masked, and a transformer that predicts variances as well.

    With latents of the `size` 128 the transformer is also told the size of the picture.
    """
    words, encoder = t5(24)
    heads = 3 if size == 128 else 2  # their width is then divisible by the three numbers of a size
    transformer = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        cross_attention_dim=8 * heads,
        caption_channels=24,
        num_layers=2,
        sample_size=size,
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


def pixart_sigma() -> Any:
    return pixart(PixArtSigmaPipeline)


def options(pipe: Any, given: dict[str, Any], prompts: int) -> dict[str, Any]:
    return {"use_resolution_binning": False, "clean_caption": False, **given}


BUILDERS = {"pixart": pixart, "pixart_sigma": pixart_sigma}
EACH = ("pixart",)
PIPELINES = (PixArtAlphaPipeline, PixArtSigmaPipeline)
