"""Does GIE's adapter beat the best fixed strength on `emoji`? On test seeds, judged by two eyes, resumable.

    python benchmarks/gie_adapter.py [--n 48] [--adapter FILE]

Variants: plain, GIE at each fixed strength of the adapter's ladder, and GIE with the adapter. Concepts: those that it
was fitted on, and `UNSEEN`. The best fixed strength is chosen on the tuning seeds of the ladder, by the mean of the
adapter's own loss, `seen + fidelity (1 - faithful)` for each picture. On test seeds the same loss is compared picture
by picture: the answer is "yes" or "no" if the bootstrap interval of the mean difference leaves out 0, else "undecided".
`left` and `kept` are the rates of the worse eye, as everywhere, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import efface
from efface.core import config
from efface.erasers.gie.adapter import Adapter
from efface.intervals import Rate
from efface.models import emoji
from efface.models.emoji.eyes import ConceptEyes, load_eyes
from efface.models.emoji.weights import FOLDER, sha256
from efface.pipelines import draw, model_hash

ROOT = Path(__file__).parents[1]
UNSEEN = ("dog", "food")
CELLS = ("explicit", "theme", "pair")
FIRST_SEED = 1_200_000


def spread(prompts: list[str], n: int) -> list[str]:
    """`n` of the prompts, in turn or evenly spread."""
    return [prompts[k % len(prompts)] if len(prompts) < n else prompts[k * len(prompts) // n] for k in range(n)]


class Bench:
    """One JSON file for each concept and variant, made once."""

    def __init__(self, work: Path, n: int, call: dict[str, Any]) -> None:
        self.work, self.n, self.call = work, n, call
        work.mkdir(parents=True, exist_ok=True)
        self.pipe, self.eyes = efface.load("emoji"), load_eyes()
        self.pipe.set_progress_bar_config(disable=True)
        self.hash = model_hash(self.pipe)
        self.plain: dict[str, Any] = {}

    def pictures(self, concept: str, eraser: Any, number: int) -> Any:
        texts = [
            t for c in CELLS if (found := emoji.prompts(concept, c)) for t in spread([p for p, _ in found], self.n)
        ]
        seeds = [FIRST_SEED + 10_000 * number + k for k in range(len(texts))]
        handle = eraser.apply(self.pipe) if eraser else None
        try:
            return draw(self.pipe, texts, seeds, **self.call)
        finally:
            if handle:
                handle.remove()

    def judge(self, concept: str, name: str, eraser: Any, number: int) -> dict[str, Any]:
        path = self.work / f"{concept.replace(' ', '-')}-{name}.json"
        setting: dict[str, Any] = {"model": self.hash, "n": self.n, "call": self.call, "number": number}
        if eraser:
            setting["eraser"] = config(eraser)
            if eraser.adapter:
                setting["adapter"] = sha256(Path(eraser.adapter))
        if path.exists():
            found = json.loads(path.read_text())
            if found["setting"] == setting:
                return found
        if concept not in self.plain:
            self.plain = {concept: self.pictures(concept, None, number)}
        images = self.pictures(concept, eraser, number) if eraser else self.plain[concept]
        eyes = ConceptEyes(concept, self.eyes)
        found = {
            "setting": setting,
            "left": eyes(images).tolist(),
            "kept": eyes.kept(images, self.plain[concept]).tolist(),
            "faithful": eyes.faithful(images, self.plain[concept]).tolist(),
        }
        path.write_text(json.dumps(found))
        return found


def loss(found: dict[str, Any], fidelity: float) -> torch.Tensor:
    seen = torch.tensor(found["left"]).any(0).float()
    return seen + fidelity * (1 - torch.tensor(found["faithful"]))


def best_fixed(ladder: dict[str, Any], strengths: list[float], fidelity: float) -> float:
    """The fixed strength with the least mean loss over all tuning pictures."""

    def mean(strength: float) -> float:
        pairs = [entry[f"{strength:g}"] for entry in ladder["judged"].values()]
        return sum(seen + fidelity * (1 - faithful) for seen, faithful in pairs) / len(pairs)

    return min(strengths, key=mean)


def difference(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Mean of a - b over pictures, with its 95 % bootstrap interval."""
    d, random = a - b, torch.Generator().manual_seed(0)
    means = d[torch.randint(len(d), (10_000, len(d)), generator=random)].mean(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return {"mean": float(d.mean()), "interval": [low, high], "n": len(d)}


def worse(rows: list[list[int]], pick: Any) -> Rate:
    rates = [Rate(sum(x for x in row if x > 0), sum(x >= 0 for x in row)) for row in rows]
    return pick(rates, key=lambda r: r.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=FOLDER / "gie.safetensors")
    parser.add_argument("--n", type=int, default=48, help="pictures for each concept and cell")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--concepts", nargs="+", help="those of the adapter and the unseen ones, if left out")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/gie_adapter")
    parser.add_argument("--out", type=Path, default=ROOT / "results/gie_adapter.json")
    args = parser.parse_args()
    start, adapter = time.time(), Adapter.load(args.adapter)
    fidelity, strengths = adapter.facts["fidelity"], adapter.facts["strengths"]
    ladder = json.loads(Path(f"{args.adapter}.ladder.json").read_text())
    fitted = [c["name"] for c in ladder["setting"]["concepts"]]
    fixed = best_fixed(ladder, strengths, fidelity)
    bench = Bench(args.work, args.n, {"num_inference_steps": args.steps})
    table = Table("concept", "variant", "left", "kept", "loss")
    groups: dict[str, list[dict[str, torch.Tensor]]] = {"fitted": [], "unseen": []}
    rows = []
    for number, concept in enumerate(args.concepts or [*fitted, *(c for c in UNSEEN if c not in fitted)]):
        variants = {"plain": None} | {f"fixed-{s:g}": efface.GIE(concept, s) for s in strengths}
        variants["adapter"] = efface.GIE(concept, adapter=args.adapter)
        found = {name: bench.judge(concept, name, eraser, number) for name, eraser in variants.items()}
        losses = {name: loss(f, fidelity) for name, f in found.items()}
        groups["fitted" if concept in fitted else "unseen"].append(losses)
        for name, f in found.items():
            left, kept = worse(f["left"], min if name == "plain" else max), worse(f["kept"], min)
            row = {"concept": concept, "variant": name, "left": left.record(), "kept": kept.record()}
            rows.append(row | {"loss": float(losses[name].mean())})
            table.add_row(concept, name, str(left), str(kept), f"{losses[name].mean():.3f}")
    answers: dict[str, Any] = {}
    for group, each in groups.items():
        if each:
            pooled = {name: torch.cat([losses[name] for losses in each]) for name in each[0]}
            against = {
                name: difference(pooled["adapter"], values) for name, values in pooled.items() if name != "adapter"
            }
            low, high = against[f"fixed-{fixed:g}"]["interval"]
            answers[group] = {
                "adapter beats the best fixed strength": "yes" if high < 0 else "no" if low > 0 else "undecided",
                "loss of the adapter less that of": against,
            }
    console = Console(width=120)
    console.print(table)
    console.print(f"best fixed strength, on tuning seeds: {fixed:g}")
    for group, answer in answers.items():
        d = answer["loss of the adapter less that of"][f"fixed-{fixed:g}"]
        verdict = answer["adapter beats the best fixed strength"]
        low, high = d["interval"]
        console.print(
            f"{group} concepts: {verdict}; loss differs by {d['mean']:+.3f} [{low:+.3f}, {high:+.3f}], n = {d['n']}"
        )
    card = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/gie_adapter.py --n {args.n}",
        "model": {"name": "emoji", "text_hash": bench.hash},
        "detector": {"name": "emoji eyes, the worse of two", "sha256": bench.eyes.facts.get("sha256")},
        "adapter": {"sha256": sha256(args.adapter), **adapter.facts},
        "best_fixed": fixed,
        "n_per_cell": args.n,
        "steps": args.steps,
        "answers": answers,
        "rows": rows,
        "seconds": time.time() - start,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
