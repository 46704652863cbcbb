"""Stage 5: heads that compare pictures with texts. `python train_aligned.py --minutes 4`.

Scenes with their captions go through the packaged autoencoder and the frozen eyes; a head per eye then learns to map
the eye's features onto the sentence vector of the caption (InfoNCE within the batch, and the cosine itself). The text
encoder is not trained. Resumes with the same command; at the end writes `aligned.safetensors` and `aligned.json` into
the package. Run it after `train_eyes.py --freeze`: the heads belong to these eyes, and the loader checks that.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
import training
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from train_eyes import reconstruct, unit

import efface
from efface.models.emoji import text_encoder
from efface.models.emoji.aligned import HIDDEN, Head, features, sentences
from efface.models.emoji.eyes import load_eyes
from efface.models.emoji.weights import FOLDER, sha256

POOL, HELD = 404, 70_002  # seeds of the scenes
SAME = 0.95  # captions nearer than that are no wrong pair


def pool(seed: int, n: int) -> dict[str, Tensor]:
    """Features of both eyes for `n` scenes, "0" and "1", and the sentence vectors of their captions, "text"."""
    rng, eyes, vae, sheets = np.random.default_rng(seed), load_eyes(), efface.load("emoji").vae, scenes.icons()
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {"0": [], "1": []}
    captions: list[str] = []
    for k in range(0, n, 250):
        images, drawn = scenes.batch(rng, sheets, min(250, n - k))
        captions += [scene.caption for scene in drawn]
        size = 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator) ** 1.5
        noise = size * torch.randn(len(images), vae.config.latent_channels, 8, 8, generator=generator)
        smooth = 0.6 * torch.rand(len(images), 1, 1, 1, generator=generator) ** 2
        x = reconstruct(vae, unit(images), noise, smooth)
        with torch.no_grad():
            for name, eye in zip(seen, eyes.eyes, strict=True):
                seen[name].append(features(eye, x))
        if k % 5000 == 0:
            print(f"{k + len(images)} of {n} scenes", flush=True)
    texts = sorted(set(captions))
    place = {text: j for j, text in enumerate(texts)}
    vectors = sentences(texts, *text_encoder())
    return {name: torch.cat(parts) for name, parts in seen.items()} | {"text": vectors[[place[c] for c in captions]]}


def kept_pool(work: Path, n: int) -> dict[str, Tensor]:
    """`pool`, made once for these eyes and this vocabulary."""
    path = work / "aligned_pool.safetensors"
    made_of = {"eyes": sha256(FOLDER / "eyes.safetensors"), "vocabulary": scenes.vocabulary_hash(), "scenes": str(n)}
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata() == made_of:
                return load_file(path)
    found = pool(POOL, n)
    work.mkdir(exist_ok=True)
    save_file(found, path, made_of)
    return found


def nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of finding the own text among those of the batch, and the own picture among the pictures."""
    same = (texts @ texts.T > SAME) & ~torch.eye(len(texts), dtype=torch.bool)
    logits = (scale.exp() * images @ texts.T).masked_fill(same, -torch.inf)
    own = torch.arange(len(texts))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def measured(head: Head, seen: Tensor, texts: Tensor) -> dict[str, float]:
    """Mean cosine of right and wrong pairs, and how often the own text is the nearest of 256 (or as good as it)."""
    with torch.no_grad():
        z = head(seen)
    own, rates, wrong = (z * texts).sum(-1), [], []
    for k in range(0, len(z) - 255, 256):
        table = z[k : k + 256] @ texts[k : k + 256].T
        same = texts[k : k + 256] @ texts[k : k + 256].T > SAME
        rates.append(same[range(256), table.argmax(1)].float().mean())
        wrong.append(table[~same].mean())
    right = {"right": own.mean(), "wrong": torch.stack(wrong).mean(), "top_1_of_256": torch.stack(rates).mean()}
    return {name: round(float(v), 4) for name, v in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--scenes", type=int, default=40_000, help="scenes to learn from")
    parser.add_argument("--held", type=int, default=2048, help="held-out scenes to measure on, at least 256")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--work", type=Path, default=scenes.WORK, help="checkpoint and pool")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the heads are written")
    args = parser.parse_args()
    torch.manual_seed(POOL)
    data = kept_pool(args.work, args.scenes)
    heads = nn.ModuleList(Head(eye.width) for eye in load_eyes().eyes)
    scale = nn.Parameter(torch.tensor(3.0))
    model = nn.ModuleDict({"heads": heads, "scale": nn.ParameterList([scale])})

    def loss(step: int) -> Tensor:
        some = torch.randint(args.scenes, (args.batch,), generator=torch.Generator().manual_seed(step))
        texts, total = data["text"][some], torch.zeros(())
        for k, head in enumerate(heads):
            z = head(data[str(k)][some])
            total = total + nce(z, texts, scale.clamp(max=4.6)) + (1 - (z * texts).sum(-1)).mean()
        return total

    ema = training.train("aligned", args.work, model, loss, minutes=args.minutes, lr=1e-3, images=args.batch)
    tensors = {n.removeprefix("heads."): t.half().contiguous() for n, t in ema.items() if n.startswith("heads.")}
    held, facts = pool(HELD, max(args.held, 256)), []
    for k, head in enumerate(heads):
        head.load_state_dict({n.removeprefix(f"{k}."): t.float() for n, t in tensors.items() if n.startswith(f"{k}.")})
        facts.append(measured(head.eval(), held[str(k)], held["text"]))
        print(f"eye {k} held-out {facts[-1]}")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / "aligned.safetensors")
    (args.out / "aligned.safetensors").chmod(0o644)
    card = {
        "sha256": sha256(args.out / "aligned.safetensors"),
        "eyes_sha256": sha256(FOLDER / "eyes.safetensors"),
        "hidden": HIDDEN,
        "date": date.today().isoformat(),
        "vocabulary": scenes.vocabulary_hash(),
        "scenes": args.scenes,
        "minutes": args.minutes,
        "held_out": {"scenes": len(held["text"]), "eyes": facts},
    }
    (args.out / "aligned.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
    print(f"wrote {args.out / 'aligned.safetensors'} and aligned.json")


if __name__ == "__main__":
    main()
