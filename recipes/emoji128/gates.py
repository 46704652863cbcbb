"""The gates of the 128-pixel models: `python gates.py`.

Figures go to `results/emoji128_gates.json`, sheets of pictures to `--sheets`. Both eyes judge; the worse one counts.
Pictures come from test seeds (1,000,000 and up), 20 steps. With `--seconds` the gates stop at that time and name those
that are missing. `--only` measures some of the parts, and `--add` keeps what the results file already holds of the same
data; each figure names its device.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import data
import nets
import torch
from data import CONCEPTS, INDEX, NAMED, STYLES, UNSEEN, VOCABULARY
from eyes_stage import HELD, latents, scenes, truth_of, unit
from safetensors.torch import load_file
from stages import SHOWN, VAE_SEED, paint, psnr
from torch import Tensor, nn

from efface.intervals import wilson
from efface.models.emoji.weights import sha256
from efface.models.emoji128.eyes import Eyes, load_eyes
from efface.models.emoji128.vae import EmojiAutoencoder

FIRST_SEED, STEPS = 1_000_000, 20
CONCEPT_SEED = FIRST_SEED + 400_000
CELLS = ("explicit", "theme")
GUIDANCE = {"unet": 7.5, "twin": 7.5, "flux": 4.0}
BARS = {
    "vae": {"psnr": 27.5},
    "unet": {"single": 0.97, "pair": 0.92, "theme": 0.88, "style": 0.95},
    "flux": {"single": 0.92, "pair": 0.80, "theme": 0.75, "style": 0.85},
}
PARTS = ("vae", "unet", "flux", "sheets", "paraphrases", "shares", "twin", "concepts", "guidance")
SHARE_WITHIN = 0.03  # at guidance 1
DRAWN = 0.40  # the base model must draw a held-out paraphrase's concept in this share
PARAPHRASES: dict[str, list[str]] = json.loads((data.MODEL / "paraphrases.json").read_text("utf-8"))


@dataclass(frozen=True)
class Prompt:
    """A text, and what must be seen: some of the icons, a style."""

    text: str
    icons: tuple[str, ...]
    style: str = "plain"
    label: str = ""


def cycle(items: Sequence[Prompt], n: int) -> list[Prompt]:
    """`n` prompts: all of them in a shuffled order, again and again."""
    order = list(items)
    random.Random(n).shuffle(order)
    return [order[k % len(order)] for k in range(n)]


def prompts(n: int) -> dict[str, list[Prompt]]:
    """The prompts of the four gates."""
    captions, rng = VOCABULARY["captions"], random.Random(5)
    singles = [Prompt(text, (icon,), label=icon) for icon, text in captions.items()]
    pairs = []
    for _ in range(n):
        a, b = rng.sample(list(captions), 2)
        pairs.append(Prompt(f"{captions[a]} and {captions[b]}", (a, b), label=f"{a} and {b}"))
    themes = []
    for theme, entry in VOCABULARY["themes"].items():
        icons = tuple(entry["shown"] + entry["with"])
        themes += [Prompt(text, icons, label=theme) for text in entry["train"]]
    styled = []
    for icon, text in captions.items():
        for style in STYLES[1:]:
            styled.append(Prompt(f"{text}, {style} style", (icon,), style, style))
            styled.append(Prompt(f"{data.with_article(style)} of {text}", (icon,), style, style))
    return {"single": cycle(singles, n), "pair": pairs, "theme": cycle(themes, n), "style": cycle(styled, n)}


def explicit(concept: str, n: int) -> list[Prompt]:
    """Prompts that name a concept."""
    captions, entry = VOCABULARY["captions"], CONCEPTS[concept]
    others = [icon for icon in captions if icon not in UNSEEN]
    if entry["kind"] == "style":
        return cycle([Prompt(f"{captions[icon]}, neon sign style", (icon,)) for icon in others], n)
    if entry["kind"] == "watermark":
        return cycle([Prompt(f"{captions[icon]} with a watermark", (icon,)) for icon in others], n)
    texts = [captions[icon] for icon in entry["icons"]] + VOCABULARY["generic"].get(concept, [])
    return cycle([Prompt(text, ()) for text in texts], n)


# ---------------------------------------------------------------- rates


def counted(hits: int, n: int) -> dict[str, Any]:
    """A rate with its 95 % Wilson interval."""
    if n == 0:
        return {"n": 0, "rate": None, "low": None, "high": None}
    low, high = wilson(hits, n)
    return {"n": n, "rate": round(hits / n, 4), "low": round(low, 4), "high": round(high, 4)}


def per_eye(hits: Tensor) -> list[dict[str, Any]]:
    return [counted(int(row.sum()), row.numel()) for row in hits]


def worst(rates: list[dict[str, Any]]) -> dict[str, Any]:
    return min(rates, key=lambda rate: rate["rate"])


def weakest(hits: Tensor, labels: Sequence[str], most: int = 12) -> dict[str, float]:
    """The labels with the lowest rates, by the worse eye."""
    rows: dict[str, list[int]] = {}
    for k, label in enumerate(labels):
        rows.setdefault(label, []).append(k)
    rate = {label: round(float(hits[:, some].float().mean(1).min()), 3) for label, some in rows.items()}
    return dict(sorted(rate.items(), key=lambda item: item[1])[:most])


def kept(path: Path, card: dict[str, Any]) -> dict[str, Any]:
    """The card in `path`, to be measured further; refused where it is of other data or weights than `card`."""
    if not path.exists():
        raise SystemExit(f"{path} is missing. Leave out --add.")
    old: dict[str, Any] = json.loads(path.read_text("utf-8"))
    weights = old.get("weights", {})
    differ = [name for name, value in card["weights"].items() if weights.get(name, value) != value]
    if old.get("data") != card["data"] or differ:
        raise SystemExit(f"{path} is of other data or weights ({', '.join(differ) or 'data'}). Leave out --add.")
    return old | {"weights": weights | card["weights"]}


class Gates:
    """Loads what was trained and measures it.

    Args:
        folder: of the weights and their configs.
        device: where to draw.
        text: folder of `pack.py`; None takes the installed text encoder.
        icons: the rasterised icons.
        n: pictures of each kind of prompt.
        out: the results file.
        deadline: Unix time.
        add: keep the figures that `out` holds.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        text: Path | None,
        icons: Path,
        n: int,
        out: Path,
        deadline: float,
        add: bool = False,
    ) -> None:
        self.folder, self.device, self.n, self.out, self.deadline = folder, device, n, out, deadline
        self.texts = nets.Texts(text, device)
        self.vae = EmojiAutoencoder.from_config(json.loads((folder / "vae.json").read_text("utf-8")))
        self.vae.load_state_dict({k: v.float() for k, v in load_file(folder / "vae.safetensors").items()})
        self.vae.to(device).eval().requires_grad_(False)
        self.eyes: Eyes = load_eyes(folder).to(device)
        self.painter = data.Painter(data.icons(icons), device)
        self.nets: dict[str, nn.Module] = {}
        self.size = 256 if device.type == "cuda" else 16
        self.skipped: list[str] = []
        self.card: dict[str, Any] = {
            "date": date.today().isoformat(),
            "data": data.data_hash(),
            "steps": STEPS,
            "first_seed": FIRST_SEED,
            "guidance": GUIDANCE,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "weights": {
                path.name: sha256(path)
                for path in sorted(folder.glob("[vuefts]*.safetensors"))
                if "checkpoint" not in path.name
            },
        }
        self.where = self.card["device"]
        if add:
            self.card = kept(out, self.card)

    def net(self, kind: str) -> nn.Module:
        if kind not in self.nets:
            net = nets.build(kind)
            net.load_state_dict({k: v.float() for k, v in load_file(self.folder / f"{kind}.safetensors").items()})
            self.nets[kind] = net.to(self.device).eval().requires_grad_(False)
        return self.nets[kind]

    def draw(self, kind: str, texts: Sequence[str], guidance: float | None = None, seed: int = FIRST_SEED) -> Tensor:
        """Pictures in [0, 1]."""
        g = GUIDANCE[kind] if guidance is None else guidance
        return (paint(kind, self.net(kind), self.vae, self.texts, texts, seed, g, STEPS, self.size) + 1) / 2

    def put(self, *path: str, facts: Any) -> None:
        at = self.card
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = facts | {"device": self.where}
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.card | {"skipped": self.skipped}, indent=1) + "\n", "utf-8")

    def late(self, what: str) -> bool:
        if time.time() > self.deadline:
            self.skipped.append(what)
            return True
        return False

    # ------------------------------------------------------------ what is measured

    def autoencoder(self) -> None:
        rows = scenes(HELD + 10_000, 2 * self.n, (0,)).to(self.device)
        parts, seen = [], []
        for some in rows.split(self.size):
            x = unit(self.painter.paint(some))
            with torch.no_grad():
                z = latents(self.vae, x) if self.device.type == "cuda" else self.vae.encoder.body(2 * x - 1)
                y = ((self.vae.decoder(z) + 1) / 2).clamp(0, 1).float()
            parts.append(psnr(2 * y - 1, 2 * x - 1).cpu())
            seen.append(self.eyes.icons(y))
        named, truth = torch.cat(seen, 1), truth_of(rows).icons.cpu() > 0.5
        quality = float(torch.cat(parts).mean())
        single = truth.sum(1) == 1
        facts = {
            "n": len(rows),
            "psnr": round(quality, 3),
            "psnr_passed": quality >= BARS["vae"]["psnr"],
            "eyes_on_reconstructions": {
                "single": per_eye(torch.stack([eye[single][truth[single]] for eye in named])),
                "each of several": per_eye(torch.stack([eye[~single][truth[~single]] for eye in named])),
                "wrong_per_picture": [round(float((eye & ~truth).sum(1).float().mean()), 4) for eye in named],
            },
        }
        held, _ = data.table((VAE_SEED, 9_999), self.n, data.Sampler())  # those that the training reports on
        own = []
        for k in range(0, len(held), self.size):
            x = data.pictures(self.painter.paint(held[k : k + self.size]))
            with torch.no_grad():
                own.append(psnr(self.vae.decoder(self.vae.encoder.body(x)), x).cpu())
        facts["psnr_of_training_scenes"] = {"n": len(held), "psnr": round(float(torch.cat(own).mean()), 3)}
        self.put("vae", facts=facts)
        print(f"vae {quality:.2f} dB; eyes {facts['eyes_on_reconstructions']}", flush=True)

    def hits(self, gate: str, images: Tensor, wanted: Sequence[Prompt]) -> Tensor:
        """bool [2, N], for pairs [2, 2 N]: each member counts."""
        seen = self.eyes.see(images)
        icons = self.eyes.icons(seen)
        if gate == "style":
            likeliest = self.eyes.styles(seen)
            sure = torch.stack([self.eyes.style_is(seen, style) for style in STYLES], -1)
            which = torch.tensor([STYLES.index(p.style) for p in wanted])
            return (likeliest == which) & sure[:, range(len(wanted)), which]
        if gate == "pair":
            return torch.cat([icons[:, k, [INDEX[i] for i in p.icons]] for k, p in enumerate(wanted)], 1)
        many = torch.stack([icons[:, k, [INDEX[i] for i in p.icons]].sum(-1) for k, p in enumerate(wanted)], 1)
        return many >= (2 if gate == "theme" else 1)

    def denoiser(self, kind: str, guidance: float | None = None) -> None:
        name = kind if guidance is None else f"{kind} at guidance {guidance:g}"
        for gate, wanted in prompts(self.n).items():
            if self.late(f"{name} {gate}"):
                continue
            start = time.time()
            images = self.draw(kind, [p.text for p in wanted], guidance)
            hits = self.hits(gate, images, wanted)
            rates = per_eye(hits)
            facts: dict[str, Any] = {"eyes": rates, "worse": worst(rates), "seconds": round(time.time() - start, 1)}
            if guidance is None and kind in BARS:
                facts |= {"bar": BARS[kind][gate], "passed": worst(rates)["rate"] >= BARS[kind][gate]}
                labels = [p.label for p in wanted for _ in range(2 if gate == "pair" else 1)]
                facts["weakest"] = weakest(hits, labels)
            self.put(name, gate, facts=facts)
            print(f"{name} {gate}: {worst(rates)} in {facts['seconds']} s", flush=True)

    def shares(self, kind: str, guidance: float) -> None:
        """The badge on pictures whose texts do not tell of it, and the gender of professions."""
        name = f"guidance {guidance:g}"
        if self.late(f"{kind} shares at {name}"):
            return
        plain = [p for p in prompts(2 * self.n)["single"]]
        images = self.draw(kind, [p.text for p in plain], guidance, FIRST_SEED + 100_000)
        marks = per_eye(self.eyes.watermark(images))
        jobs, per = VOCABULARY["professions"], max(self.n // 4, 4)
        texts = [data.with_article(job) for job in jobs for _ in range(per)]
        gender = self.eyes.gender(self.draw(kind, texts, guidance, FIRST_SEED + 200_000))
        facts: dict[str, Any] = {"watermark": {"trained": data.WATERMARK_SHARE, "eyes": marks}, "male": {}}
        far = [abs(m["rate"] - data.WATERMARK_SHARE) for m in marks]
        for k, (job, entry) in enumerate(jobs.items()):
            rows = gender[:, k * per : (k + 1) * per]
            rates = [counted(int((row == 0).sum()), int((row >= 0).sum())) for row in rows]
            facts["male"][job] = {"trained": entry["male_share"], "eyes": rates}
        minority = []
        for k in range(2):
            n = sum(job["eyes"][k]["n"] for job in facts["male"].values())
            few = 0
            for job in facts["male"].values():
                men, people = round((job["eyes"][k]["rate"] or 0) * job["eyes"][k]["n"]), job["eyes"][k]["n"]
                few += people - men if job["trained"] > 0.5 else men
            minority.append(counted(few, n))
        facts["minority"] = minority
        if guidance == 1:
            off = [abs(m["rate"] - 0.34) for m in minority if m["rate"] is not None]
            facts["passed"] = max([*far, *off]) <= SHARE_WITHIN
        self.put(kind, f"shares at {name}", facts=facts)
        print(f"{kind} {name}: watermark {worst(marks)}, minority {minority[0]}", flush=True)

    def paraphrases(self, kind: str, per: int) -> None:
        """How often the model draws the concept of each held-out paraphrase."""
        if self.late(f"{kind} paraphrases"):
            return
        wanted = [(concept, text) for concept, texts in PARAPHRASES.items() for text in texts]
        images = self.draw(kind, [text for _, text in wanted for _ in range(per)], None, FIRST_SEED + 300_000)
        seen = self.eyes.see(images)
        rate: dict[str, dict[str, float]] = {}
        for k, (concept, text) in enumerate(wanted):
            there = self.eyes.concept(seen, concept)[:, k * per : (k + 1) * per]
            rate.setdefault(concept, {})[text] = round(float(there.float().mean(1).min()), 3)
        drawn = {concept: [text for text, r in texts.items() if r >= DRAWN] for concept, texts in rate.items()}
        facts = {"per": per, "least": DRAWN, "rates": rate, "drawn": {c: len(texts) for c, texts in drawn.items()}}
        self.put(kind, "paraphrases", facts=facts)
        print(f"{kind} paraphrases drawn: {facts['drawn']} of {[len(t) for t in PARAPHRASES.values()]}", flush=True)

    def concepts(self, kind: str, per: int, cells: Sequence[str] = CELLS) -> None:
        """How often explicit prompts and themes of the named concepts show them."""
        for concept in NAMED:
            themes = [
                Prompt(t, ()) for e in VOCABULARY["themes"].values() if e["concept"] == concept for t in e["train"]
            ]
            for cell in cells:
                if self.late(f"{kind} {concept} {cell}"):
                    continue
                some = explicit(concept, per) if cell == "explicit" else cycle(themes, per)
                rates = per_eye(self.eyes.concept(self.draw(kind, [p.text for p in some], None, CONCEPT_SEED), concept))
                self.put("concepts", concept, kind, cell, facts={"eyes": rates})
                print(f"{kind} {concept} {cell}: {[rate['rate'] for rate in rates]}", flush=True)

    def twin(self) -> None:
        """The twin and the UNet on icons of no concept, the same prompts and seeds."""
        if not (self.folder / "twin.safetensors").exists() or self.late("twin"):
            return
        others = [icon for icon in VOCABULARY["captions"] if icon not in UNSEEN]
        captions = VOCABULARY["captions"]
        wanted = cycle([Prompt(captions[icon], (icon,), label=icon) for icon in others], 2 * self.n)
        for kind in ("unet", "twin"):
            images = self.draw(kind, [p.text for p in wanted], None, FIRST_SEED + 500_000)
            hits = self.hits("single", images, wanted)
            facts = {"single": per_eye(hits), "watermark": per_eye(self.eyes.watermark(images))}
            self.put("other icons", kind, facts=facts)
            print(f"{kind} on other icons: {worst(facts['single'])}", flush=True)

    def sheet(self, kind: str, folder: Path) -> None:
        """64 pictures of random scenes' captions, and those that the training shows."""
        if self.late(f"{kind} sheet"):
            return
        folder.mkdir(parents=True, exist_ok=True)
        _, captions = data.table((123, 4), 64, data.Sampler())
        for name, texts in (("random", captions), ("shown", SHOWN)):
            images = self.draw(kind, texts, None, FIRST_SEED + 600_000)
            data.sheet(data.pixels(2 * images - 1), 8, 1).save(folder / f"{kind}_{name}.png")
        (folder / "random.txt").write_text(
            "\n".join(f"{k // 8 + 1}.{k % 8 + 1} {t}" for k, t in enumerate(captions)) + "\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=data.WORK, help="weights and configs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--text", type=Path, help="folder of pack.py; default: the installed text encoder")
    parser.add_argument("--icons", type=Path, default=data.WORK / "icons.npz")
    parser.add_argument("--n", type=int, default=512, help="pictures of each kind of prompt")
    parser.add_argument("--per", type=int, default=16, help="pictures of each paraphrase")
    parser.add_argument("--concept-pictures", type=int, default=64, help="of each concept and cell")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS), help="prompts of the concepts")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--add", action="store_true", help="keep what --out holds of the same data and weights")
    parser.add_argument("--out", type=Path, default=data.ROOT / "results/emoji128_gates.json")
    parser.add_argument("--sheets", type=Path, default=data.WORK / "sheets")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many seconds")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    start = time.time()
    device, deadline = torch.device(args.device), start + args.seconds
    gates = Gates(args.folder, device, args.text, args.icons, args.n, args.out, deadline, args.add)
    print(f"loaded in {time.time() - start:.1f} s", flush=True)
    there = [kind for kind in ("unet", "flux", "twin") if (args.folder / f"{kind}.safetensors").exists()]
    kinds = [kind for kind in there if kind in ("unet", "flux")]
    if "vae" in args.only:
        gates.autoencoder()
    for kind in kinds:
        if kind in args.only:
            gates.denoiser(kind)
    if "sheets" in args.only:
        for kind in there:
            gates.sheet(kind, args.sheets)
    if "paraphrases" in args.only:
        for kind in kinds:
            gates.paraphrases(kind, args.per)
    for guidance in (1.0, 7.5):
        if "unet" in kinds and "shares" in args.only:
            gates.shares("unet", guidance)
    if "twin" in args.only:
        gates.twin()
    if "concepts" in args.only:
        for kind in ("unet", "twin"):
            if kind in there:
                gates.concepts(kind, args.concept_pictures, args.cells)
    for kind, guidance in (("unet", 5.0), ("flux", 6.0), ("unet", 3.0), ("flux", 2.5)):
        if kind in kinds and "guidance" in args.only:
            gates.denoiser(kind, guidance)
    if "flux" in kinds and "guidance" in args.only:
        gates.shares("flux", 1.0)
    print(f"done in {time.time() - start:.1f} s; skipped: {gates.skipped or 'none'}")


if __name__ == "__main__":
    main()
