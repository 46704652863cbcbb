"""Puts trained weights into the package: `python export.py`, or `python export.py --shards FOLDER`.

Takes them from the folder `work`, or joins the shards that `train.py --out FOLDER` wrote. Writes fp16 weights, their
configs, `eyes.json` and `model.json` (hashes and training facts), which `efface.models.emoji128.load` reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from efface.models.emoji.weights import sha256
from efface.models.emoji128 import FOLDER, record

HERE = Path(__file__).parent
LIMIT = 60_000_000  # bytes of weights in the package
NAMES = ("vae", "eyes", "unet", "flux")


def join(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of `name`-0.safetensors and its further parts."""
    first = folder / f"{name}-0.safetensors"
    if not first.exists():
        raise SystemExit(f"{first} is missing: give the folder that `train.py --out` wrote.")
    with safe_open(first, "pt") as file:
        parts = int((file.metadata() or {}).get("parts", "1"))
    tensors: dict[str, Tensor] = {}
    for k in range(parts):
        path = folder / f"{name}-{k}.safetensors"
        if not path.exists():
            raise SystemExit(f"{path} is missing: {name} has {parts} parts.")
        tensors |= load_file(path)
    return tensors


def from_shards(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """Weights, configs and training facts from what `train.py --out` wrote."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    small = load_file(folder / "small.safetensors")
    weights = {
        name: {key.removeprefix(f"{name}."): t for key, t in small.items() if key.startswith(f"{name}.")}
        for name in ("vae", "eyes")
    }
    weights |= {name: join(folder, name) for name in ("unet", "flux")}
    return weights, {name: report[name] for name in NAMES}, report["stages"]


def from_work(work: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """Weights, configs and training facts from the folder that `train.py` works in."""
    for name in NAMES:
        if not (work / f"{name}.safetensors").exists():
            raise SystemExit(f"{work / f'{name}.safetensors'} is missing: run train.py first.")
    stages = {
        path.name.removesuffix(".facts.json"): json.loads(path.read_text("utf-8")) for path in work.glob("*.facts.json")
    }
    weights = {name: load_file(work / f"{name}.safetensors") for name in NAMES}
    return weights, {name: json.loads((work / f"{name}.json").read_text("utf-8")) for name in NAMES}, stages


def export(
    weights: dict[str, dict[str, Tensor]], configs: dict[str, Any], stages: dict[str, Any], folder: Path = FOLDER
) -> None:
    """Writes the models' files into `folder`, or nothing if they would exceed the limit."""
    blobs = {
        name: save({key: t.half().contiguous() for key, t in tensors.items()}) for name, tensors in weights.items()
    }
    for name, blob in blobs.items():
        print(f"{len(blob) / 1e6:7.2f} MB  {name}")
    total = sum(map(len, blobs.values()))
    print(f"{total / 1e6:7.2f} MB  together")
    if total > LIMIT:
        raise SystemExit(f"more than {LIMIT / 1e6:g} MB of weights: nothing written")
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in blobs.items():
        (folder / f"{name}.safetensors").write_bytes(blob)
    for name in ("vae", "unet", "flux"):
        (folder / f"{name}.json").write_text(json.dumps(configs[name], indent=2) + "\n", encoding="utf-8")
    eyes = configs["eyes"] | {"sha256": sha256(folder / "eyes.safetensors")}
    (folder / "eyes.json").write_text(json.dumps(eyes, indent=1) + "\n", encoding="utf-8")
    record(folder, {"training": stages})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder that train.py worked in")
    parser.add_argument("--shards", type=Path, help="folder that `train.py --out` wrote; used instead of --work")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder to write")
    args = parser.parse_args()
    parts = from_shards(args.shards) if args.shards else from_work(args.work)
    export(*parts, args.folder)


if __name__ == "__main__":
    main()
