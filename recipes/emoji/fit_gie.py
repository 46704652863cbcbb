"""Fits GIE's adapter for `emoji` or `emoji-128`, on tuning prompts and seeds, with both eyes as judge.

    python fit_gie.py --model emoji-128 --estimate      # how many pictures, and how long they take
    python fit_gie.py --model emoji-128                 # into the package: weights/gie.safetensors
    python fit_gie.py --prompts 3 --seeds 1 --steps 8 --out work/gie.safetensors     # a trial

Each concept gets prompts of all cells of the tuning block: those that name it, that imply it, that name it beside
something else, and that have nothing to do with it. A picture's loss is what the sharper eye still sees of the concept,
plus half of the share of other icons lost. Killed, the same command goes on with the ladder in `<out>.ladder.json`.

Exit code 3: the best fixed strength is at an end of the ladder, so it may not be the best. The same command with more
`--strengths` draws only these. Afterwards `python -m experiments gie_adapter --model emoji-128`, in the root, says
whether the adapter beats the best fixed strength.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import efface
from efface.erasers.gie.adapter import SHIPPED, Adapter, best_fixed
from efface.models import emoji128
from efface.models.emoji import weights
from efface.models.emoji.eyes import ConceptEyes
from efface.pipelines import draw

sys.path.append(str(Path(__file__).parents[2]))  # the blocks of prompts are those of the experiments

from experiments.worlds import CELLS, TUNED, World, named, world

STRENGTHS = (0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
FIRST_SEED = 5_000
OPEN = 3  # exit code
console = Console(stderr=True)


def spread(prompts: list[str], most: int) -> list[str]:
    return prompts if len(prompts) <= most else [prompts[k * len(prompts) // most] for k in range(most)]


def prompts(of: World, concept: str, each: int) -> list[str]:
    """At most `each` prompts of each cell of the tuning block; the cell "bystander" is of other things alone."""
    return [t for cell in CELLS for t in spread([p for p, _ in of.prompts(concept, cell, "tuning")], each)]


def record(model: str) -> None:
    """The adapter's SHA-256, into model.json."""
    weights.record(weights.FOLDER) if model == "emoji" else emoji128.record(emoji128.FOLDER)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SHIPPED), default="emoji")
    parser.add_argument("--concepts", nargs="+", default=list(TUNED), choices=TUNED)
    parser.add_argument("--prompts", type=int, default=6, help="prompts of each cell for each concept, at most")
    parser.add_argument("--seeds", type=int, default=4, help="pictures of each prompt and strength")
    parser.add_argument("--strengths", type=float, nargs="+", default=list(STRENGTHS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--estimate", action="store_true", help="draw two pictures, say how long the fit takes, stop")
    parser.add_argument("--out", type=Path, help="the adapter. Default: into the package")
    args = parser.parse_args(arguments)
    args.out = args.out or SHIPPED[args.model]
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parsed(arguments)
    start, of = time.time(), world(args.model)
    texts = {name: prompts(of, name, args.prompts) for name in args.concepts}
    total = sum(map(len, texts.values())) * args.seeds * (1 + len(args.strengths))
    if args.estimate:
        of.pipe  # noqa: B018 - loads it, outside of the clock
        began = time.process_time()
        draw(of.pipe, ["a dog", "a house"], [FIRST_SEED, FIRST_SEED + 1], num_inference_steps=args.steps)
        hours = (time.process_time() - began) / 2 * total / 3600
        console.print(f"{sum(map(len, texts.values()))} prompts, {total} pictures, about {hours:.2g} core-hours")
        return 0
    judges = {name: ConceptEyes(name, of.eyes) for name in args.concepts}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("ladder", total=total)

        def tell(what: str, pictures: int) -> None:
            bar.update(task, description=what, advance=pictures)

        efface.GIE.fit(
            of.pipe,
            [named(name) for name in args.concepts],
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
    if args.out.resolve() == SHIPPED[args.model].resolve():
        record(args.model)
    facts = Adapter.load(args.out).facts
    for name, value in facts.items():
        console.print(f"{name}: {value}")
    console.print(f"wrote {args.out} in {time.time() - start:.0f} s")
    try:
        console.print(f"best fixed strength: {best_fixed(facts['losses']):g}")
    except ValueError as error:
        console.print(str(error))
        return OPEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
