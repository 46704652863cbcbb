"""Puts trained weights into the package: `python export.py`, or `python export.py --shards FOLDER`.

Takes them from the folder `work`, or joins the shards that `train.py --out FOLDER` wrote. Writes fp16 weights, their
configs, `eyes.json` and `model.json` (hashes and training facts), which `efface.models.emoji128.load` reads. With
`--keep`, parts that were not trained again stay what the package holds.
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
        raise SystemExit(f"{first} is missing. Give the folder that `train.py --out` wrote.")
    with safe_open(first, "pt") as file:
        parts = int((file.metadata() or {}).get("parts", "1"))
    tensors: dict[str, Tensor] = {}
    for k in range(parts):
        path = folder / f"{name}-{k}.safetensors"
        if not path.exists():
            raise SystemExit(f"{path} is missing: {name} has {parts} parts.")
        tensors |= load_file(path)
    return tensors


Parts = tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]]


def from_shards(folder: Path, keep: bool = False) -> Parts:
    """Weights, configs and training facts from what `train.py --out` wrote; with `keep`, of those parts that it has."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    small = load_file(folder / "small.safetensors") if (folder / "small.safetensors").exists() or not keep else {}
    weights = {
        name: {key.removeprefix(f"{name}."): t for key, t in small.items() if key.startswith(f"{name}.")}
        for name in ("vae", "eyes")
    }
    weights |= {
        name: join(folder, name) for name in ("unet", "flux") if not keep or (folder / f"{name}-0.safetensors").exists()
    }
    weights = {name: tensors for name, tensors in weights.items() if tensors}
    if missing := [name for name in NAMES if name not in weights or name not in report]:
        if not keep:
            raise SystemExit(f"{folder} lacks {', '.join(missing)}: train them, or give --keep.")
        weights = {name: tensors for name, tensors in weights.items() if name not in missing}
    return weights, {name: report[name] for name in weights}, report["stages"]


def from_work(work: Path, keep: bool = False) -> Parts:
    """Weights, configs and training facts from the folder that `train.py` works in; with `keep`, of what is there."""
    names = [name for name in NAMES if (work / f"{name}.safetensors").exists()]
    if not keep and (missing := [name for name in NAMES if name not in names]):
        raise SystemExit(f"{work / f'{missing[0]}.safetensors'} is missing. Run train.py first, or give --keep.")
    stages = {
        path.name.removesuffix(".facts.json"): json.loads(path.read_text("utf-8")) for path in work.glob("*.facts.json")
    }
    weights = {name: load_file(work / f"{name}.safetensors") for name in names}
    return weights, {name: json.loads((work / f"{name}.json").read_text("utf-8")) for name in names}, stages


def kept(parts: Parts, folder: Path = FOLDER) -> Parts:
    """`parts`, completed by what the package holds. Denoisers fit one encoder only, so a new encoder is refused."""
    weights, configs, stages = parts
    old = {name: load_file(folder / f"{name}.safetensors") for name in NAMES}
    if "vae" in weights and (stale := [name for name in ("unet", "flux", "eyes") if name not in weights]):
        encoder = {key: t.half() for key, t in weights["vae"].items() if key.startswith("encoder.")}
        if any(not t.equal(old["vae"][key]) for key, t in encoder.items()):
            raise SystemExit(f"The new autoencoder makes other latents: train {', '.join(stale)} too.")
    read = {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in NAMES}
    before = json.loads((folder / "model.json").read_text("utf-8")).get("training", {})
    facts = {
        name: new | ({"before": before[name]} if "started_from" in new and name in before else {})
        for name, new in stages.items()
    }
    return old | weights, read | configs, before | facts


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
    parser.add_argument("--keep", action="store_true", help="parts that were not trained stay what the package holds")
    args = parser.parse_args()
    parts = from_shards(args.shards, args.keep) if args.shards else from_work(args.work, args.keep)
    export(*(kept(parts) if args.keep else parts), args.folder)


if __name__ == "__main__":
    main()
