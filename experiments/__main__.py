"""`python -m experiments NAME`: measures it, writes its card. Also: `list`, `table CARD`, `docs`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import docs, tables
from .catalogue import CATALOGUE
from .code import ROOT
from .runner import Plan, outdated, run


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    made.add_argument("name", help="an experiment, or: list, table CARD, docs")
    made.add_argument("card", nargs="?", type=Path, help="of `table`")
    made.add_argument("--format", choices=("md", "latex", "csv", "svg"), default="md", help="of `table`")
    made.add_argument("--estimate", action="store_true", help="time a few pictures per row, and stop")
    made.add_argument("--update", nargs="+", default=[], metavar="ROW", help="redraw these rows; the others stay")
    made.add_argument("--block", help="tuning, selection or test")
    made.add_argument("--n", type=int, help="pictures per cell, or rounds; the card then goes to --out")
    made.add_argument("--model", choices=("emoji", "emoji-128", "emoji-flux"))
    made.add_argument("--device", default="cpu")
    made.add_argument("--out", type=Path, help="the card")
    made.add_argument("--work", type=Path, default=ROOT / "runs/experiments", help="folder of raw outcomes")
    made.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    return made


def show() -> None:
    """Every experiment with its cap, its card, and the rows of the card that other code has drawn."""
    for name, each in CATALOGUE.items():
        path, state = ROOT / f"results/{name}.json", "no card"
        if path.is_file():
            card = json.loads(path.read_text("utf-8"))
            state = "a card of an earlier runner"
            if isinstance(card, dict) and "form" in card:
                other = outdated(each, Plan(card["block"], card["n"], card["model"]["name"]), card)
                state = f"card of {card['date'][:10]}" + (f", other code: {', '.join(other)}" if other else "")
        print(f"{name}: {each.question} (cap {each.cap:g} core-hours; {state})")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.name == "list":
        show()
    elif given.name == "docs":
        docs.fill_all()
    elif given.name == "table":
        if given.card is None:
            parser().error("`table` needs the path of a card.")
        card = json.loads(given.card.read_text("utf-8"))
        print(docs.figure(card) if given.format == "svg" else tables.of_card(card, given.format), end="")
    elif given.name not in CATALOGUE:
        parser().error(f"{given.name!r} is not an experiment. There is: {', '.join(CATALOGUE)}.")
    elif given.one:
        print(json.dumps(CATALOGUE[given.name].one(json.loads(given.one))))
    else:
        return measure(given)
    return 0


def measure(given: argparse.Namespace) -> int:
    each = CATALOGUE[given.name]
    block, n, model = given.block or each.block, given.n or each.n, given.model or each.model
    plan = Plan(block, n, model, given.work, device=given.device)
    whole = block == each.block and n == each.n
    card = f"{each.name}.json" if model == each.model else f"{each.name}-{model}.json"
    out = given.out or (ROOT / "results" if whole else given.work) / card
    options = {
        "--block": block != each.block and block,
        "--n": n != each.n and n,
        "--model": model != each.model and model,
    }
    options |= {"--device": given.device != "cpu" and given.device, "--update": shlex.join(given.update)}
    words = [each.name, *(f"{name} {value}" for name, value in options.items() if value)]
    try:
        found = run(each, plan, out, f"python -m experiments {' '.join(words)}", given.update, given.estimate)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    if found:
        print(tables.of_card(found), *found.get("verdict", []), f"Card: {out}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
