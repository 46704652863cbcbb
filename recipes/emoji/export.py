"""Stage 4: the trained weights into the package. `python export.py`

Takes `work/unet_ema.safetensors` (metadata: the UNet's config and progress) and the folder `work/vae`; writes fp16
weights, their configs and `model.json` (hashes and training facts), which `efface.models.emoji.load` reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import scenes
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from train_vae import SEED as VAE_SEED

from efface.models.emoji.vae import EmojiVAE
from efface.models.emoji.weights import FOLDER
from efface.models.emoji.weights import record as record_hashes

LIMIT = 40_000_000  # bytes of weights in the package, the eyes included


def metadata(path: Path) -> dict[str, Any]:
    """The JSON values of a safetensors file's metadata; empty if there is no such file."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) for key, value in (file.metadata() or {}).items()}


def progress(*paths: Path) -> dict[str, Any]:
    """Training facts from checkpoints, the later ones winning; seconds become minutes."""
    facts: dict[str, Any] = {}
    for path in paths:
        facts |= metadata(path).get("progress", {})
    if "seconds" in facts:
        facts["minutes"] = round(facts.pop("seconds") / 60, 1)
    return facts


def halves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous fp16 copies; a value that fp16 cannot hold is an error."""
    out = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    if broken := [name for name, tensor in out.items() if not tensor.isfinite().all()]:
        raise SystemExit(f"not finite in fp16: {', '.join(broken[:5])}")
    return out


def export(work: Path = scenes.WORK, folder: Path = FOLDER, limit: int = LIMIT) -> None:
    """Writes the model's files from `work` into `folder`, or nothing if they would exceed `limit` bytes."""
    for path in (work / "unet_ema.safetensors", work / "vae"):
        if not path.exists():
            raise SystemExit(f"{path} is missing. Run train_vae.py and train_unet.py first.")
    vae = EmojiVAE.from_pretrained(work / "vae")
    config = metadata(work / "unet_ema.safetensors")["config"]
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(load_file(work / "unet_ema.safetensors"))

    data = {f"{name}.safetensors": save(halves(model.state_dict())) for name, model in (("unet", unet), ("vae", vae))}
    present = folder.glob("*.safetensors") if folder.is_dir() else []
    sizes = {path.name: path.stat().st_size for path in present} | {name: len(b) for name, b in data.items()}
    for name, size in sorted(sizes.items()):
        print(f"{size / 1e6:7.2f} MB  {name}")
    print(f"{sum(sizes.values()) / 1e6:7.2f} MB  together")
    if sum(sizes.values()) > limit:
        raise SystemExit(f"more than {limit / 1e6:g} MB of weights: nothing written")

    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in data.items():
        (folder / name).write_bytes(blob)
    training = {
        "vocabulary": scenes.vocabulary_hash(),
        "torch": torch.__version__,
        "unet": progress(work / "unet.safetensors", work / "unet_ema.safetensors"),
        "vae": {"seed": VAE_SEED} | progress(work / "vae.safetensors"),
    }
    record = {"version": 1, "files": {}, "training": training}
    for name, value in (("unet", config), ("vae", dict(vae.config)), ("model", record)):
        clean = {key: entry for key, entry in value.items() if not key.startswith("_")}
        (folder / f"{name}.json").write_text(json.dumps(clean, indent=2) + "\n", encoding="utf-8")
    record_hashes(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=scenes.WORK, help="folder of the trained files")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder to write")
    args = parser.parse_args()
    export(args.work, args.folder)
