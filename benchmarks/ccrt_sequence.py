"""Five removals in sequence on `emoji`: CCRT beside plain ESD round by round, after every round.

    python benchmarks/ccrt_sequence.py [--n 32] [--steps 200] [--concepts 5] [--work DIR] [--out FILE]

Both train the same weights for the same updates; ESD round by round is CCRT with `reg` 0. After each round every
removed concept and six bystanders, which are no entities of the search, are drawn `n` times with test seeds, the same
ones for all; the plain model is drawn first. The eyes of `emoji` judge and the worse counts: the one that still sees
more of a removed concept, or less of the bystanders. The record has the rates with 95 % intervals, and the misalignment
distances and calibration prompts of CCRT's rounds.

Deltas are kept in `--work` round by round, with the checkpoints of unfinished ones: the same command goes on where it
was interrupted. `--n 2 --steps 4 --concepts 2` tries the script.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table

import efface
from efface import CCRT, Concept, Delta
from efface.core import config
from efface.intervals import wilson
from efface.models.emoji.eyes import load_eyes
from efface.pipelines import draw, model_hash

REMOVED = ("cat", "guitar", "beer mug", "rocket", "rose")
KEPT = ("octopus", "robot", "helicopter", "strawberry", "sunglasses", "trophy")
SEED = 1_000_000


class Sequence:
    """One way of removing, and what it leaves after each round."""

    def __init__(self, editor: CCRT, concepts: list[Concept], work: Path, n: int) -> None:
        self.editor, self.concepts, self.work, self.n = editor, concepts, work, n
        self.pipe, self.eyes = efface.load("emoji"), load_eyes()
        self.pipe.set_progress_bar_config(disable=True)

    def rates(self, names: tuple[str, ...], keep: bool) -> dict[str, Any]:
        """The share of pictures with the thing, by the eye that is less favourable."""
        found = {}
        for name in names:
            first = SEED + 10_000 * (*REMOVED, *KEPT).index(name)
            prompt = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
            images = draw(self.pipe, [prompt] * self.n, range(first, first + self.n))
            counts = self.eyes.concept(images, name).sum(-1).tolist()
            hits = min(counts) if keep else max(counts)
            found[name] = {"rate": hits / self.n, "hits": hits, "n": self.n, "interval": wilson(hits, self.n)}
        return found

    def rounds(self) -> list[dict[str, Any]]:
        self.work.mkdir(parents=True, exist_ok=True)
        names, report = tuple(concept.name for concept in self.concepts), []
        with ExitStack() as on:
            for k, concept in enumerate(self.concepts):
                file, began = self.work / f"{k + 1}.safetensors", time.perf_counter()
                if file.exists():
                    delta = Delta.load(file)
                    if {"method": "ccrt", **delta.fields} != config(self.editor.resolved(self.pipe)):
                        raise SystemExit(f"{file} was fitted with other settings: name another folder with --work.")
                else:
                    (delta,) = self.editor.sequence(self.pipe, concept, seed=100 * k, checkpoint=self.work / f"{k + 1}")
                    delta.save(file)
                seconds = time.perf_counter() - began
                on.enter_context(delta.apply(self.pipe))
                judged = {"removed": self.rates(names[: k + 1], keep=False), "kept": self.rates(KEPT, keep=True)}
                report.append({"concept": concept.name, "seconds": seconds, "info": dict(delta.info), **judged})
        return report


def mean(rates: dict[str, Any]) -> float:
    return sum(r["rate"] for r in rates.values()) / len(rates)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=32, help="pictures of each thing")
    parser.add_argument("--steps", type=int, help="updates of a fit; default: the method's own")
    parser.add_argument("--concepts", type=int, default=len(REMOVED), help="how many of the removals")
    parser.add_argument("--work", type=Path, default=Path("efface-out/ccrt_sequence"))
    parser.add_argument("--out", type=Path, default=Path("results/ccrt_sequence.json"))
    args = parser.parse_args(arguments)
    concepts = [Concept(name, (f"a {name}",)) for name in REMOVED[: args.concepts]]
    editors = {"ccrt": CCRT(steps=args.steps), "esd in sequence": CCRT(steps=args.steps, reg=0.0)}
    plain = Sequence(editors["ccrt"], concepts, args.work, args.n)
    base = {
        "removed": plain.rates(tuple(concept.name for concept in concepts), keep=True),
        "kept": plain.rates(KEPT, keep=True),
    }
    results = {
        name: Sequence(editor, concepts, args.work / name.replace(" ", "-"), args.n).rounds()
        for name, editor in editors.items()
    }
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/ccrt_sequence.py --n {args.n}",
        "versions": {m.__name__: m.__version__ for m in (efface, torch, diffusers)},
        "model": {"name": "emoji", "text_hash": model_hash(plain.pipe)},
        "detector": {"name": "emoji eyes, the worse of two", "sha256": plain.eyes.facts.get("sha256")},
        "entities": "efface.editors._search.ENTITIES",
        "methods": {name: config(editor.resolved(plain.pipe)) for name, editor in editors.items()},
        "plain": base,
        "results": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    table = Table("after removing", *(f"{name}: {what}" for name in results for what in ("left", "kept")))
    table.add_row("nothing", *(f"{mean(base[of]):.0%}" for _ in results for of in ("removed", "kept")))
    for k, concept in enumerate(concepts):
        shown = [f"{mean(rounds[k][of]):.0%}" for rounds in results.values() for of in ("removed", "kept")]
        table.add_row(concept.name, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
