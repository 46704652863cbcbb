"""Fits GIE's adapter for the `emoji` model, on tuning seeds, with both eyes as judge.

    python fit_gie.py                                   # the shipped one: weights/gie.safetensors
    python fit_gie.py --prompts 3 --seeds 1 --steps 8 --out work/gie.safetensors     # a trial

Each concept gets prompts that name it, that imply it, that name it beside something else, and that have nothing to do
with it. A picture's loss is what the sharper eye still sees of the concept, plus half of the share of other icons lost.
Killed, the same command goes on with the ladder in `<out>.ladder.json`. Afterwards `python -m
experiments gie_adapter`, in the root, says whether the adapter beats the best fixed strength.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import efface
from efface.erasers.gie.adapter import Adapter
from efface.models import emoji
from efface.models.emoji.eyes import ConceptEyes, load_eyes
from efface.models.emoji.weights import FOLDER, record

CONCEPTS = ("alcohol", "weapon", "cat", "guitar", "vehicle")  # the experiment `gie_adapter` has others
STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
FIRST_SEED = 5_000
console = Console(stderr=True)


def spread(prompts: list[str], most: int) -> list[str]:
    return prompts if len(prompts) <= most else [prompts[k * len(prompts) // most] for k in range(most)]


def prompts(concept: str, each: int) -> list[str]:
    """At most `each` prompts of each cell, and as many captions that have nothing to do with the concept."""
    found = [
        t for cell in ("explicit", "theme", "pair") for t in spread([p for p, _ in emoji.prompts(concept, cell)], each)
    ]
    covered = emoji.truth(concept)
    others = [text for icon, text in emoji.vocabulary()["captions"].items() if icon not in covered]
    return found + spread(others, each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=list(CONCEPTS))
    parser.add_argument("--prompts", type=int, default=4, help="prompts of each kind for each concept, at most")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt and strength")
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=FOLDER / "gie.safetensors")
    args = parser.parse_args()
    start, pipe, eyes = time.time(), efface.load("emoji"), load_eyes()
    pipe.set_progress_bar_config(disable=True)
    judges = {name: ConceptEyes(name, eyes) for name in args.concepts}
    texts = {name: prompts(name, args.prompts) for name in args.concepts}
    total = sum(map(len, texts.values())) * args.seeds * (1 + len(args.strengths))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("ladder", total=total)

        def tell(what: str, pictures: int) -> None:
            bar.update(task, description=what, advance=pictures)

        efface.GIE.fit(
            pipe,
            args.concepts,
            texts,
            detector=judges,
            out=args.out,
            strengths=args.strengths,
            seeds=range(FIRST_SEED, FIRST_SEED + args.seeds),
            faithful={name: judge.faithful for name, judge in judges.items()},
            batch=32,
            progress=tell,
            num_inference_steps=args.steps,
        )
    if args.out.resolve().parent == FOLDER:
        record(FOLDER)  # its sha256, into model.json
    for name, value in Adapter.load(args.out).facts.items():
        console.print(f"{name}: {value}")
    console.print(f"wrote {args.out} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
