"""Packs what `train.py` needs on a machine without network: `python pack.py FOLDER`.

Writes `icons.npz`, and `text/` with the tokenizer and the text encoder in fp16, cut to the tokens that captions can
hold. There: `python train.py --icons FOLDER/icons.npz --text FOLDER/text`.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import data
import nets


def texts() -> list[str]:
    """Texts that between them hold every token of every caption and prompt."""
    v = data.VOCABULARY
    out = [
        *v["captions"].values(),
        *(icon.replace("-", " ") for icon in data.ICONS),
        *v["plurals"].values(),
        *data.COLOURS,
    ]
    for group in (*v["synonyms"].values(), *v["generic"].values()):
        out += group
    for name, theme in v["themes"].items():
        out += [name, *theme["train"]]
    for held in data.json.loads((data.MODEL / "paraphrases.json").read_text("utf-8")).values():
        out += held
    out += [*v["concepts"], *data.STYLES, *v["professions"], *v["groups"]]
    out += ["a an the of in on at and with next to beside two three small tiny little male female style as without not"]
    out += ["a picture image photo on a plain background, watermarked picture of it watermark man woman person people"]
    for seed in range(20):  # and a look at what is really drawn
        out += data.table((90_000, seed), 5_000, data.Sampler())[1]
    return list(dict.fromkeys(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    data.icons()
    shutil.copyfile(data.WORK / "icons.npz", args.folder / "icons.npz")
    kept = nets.pack_text(args.folder / "text", texts())
    for path in sorted(args.folder.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(args.folder)}")
    print(f"{kept} tokens; icons {data.icons_hash(data.icons())}; data {data.data_hash()}")


if __name__ == "__main__":
    main()
