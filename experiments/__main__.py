"""`python -m experiments NAME`: measures it, writes its card. Others: list, table CARD, docs, sheets, read, judge."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from efface.files import write_json

from . import docs, judge, labels, legend, tables
from .catalogue import CATALOGUE
from .code import ROOT
from .runner import Plan, outdated, run


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    made.add_argument("name", help="an experiment, or: list, table CARD, docs, sheets, read, judge")
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
    made.add_argument("--third", action="store_true", help="of `sheets`: the pictures in which passes 1 and 2 differ")
    made.add_argument("--batch", type=int, help="of `sheets --third`: only this one")
    made.add_argument("--icons", type=Path, default=legend.ICONS, help="of `sheets`: for the legends")
    made.add_argument("--results", type=Path, default=ROOT / "results", help="of `read` and `judge`: cards and labels")
    made.add_argument("--replace", action="store_true", help="of `read`: corrected answers replace earlier ones")
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
    elif given.name in LOOKING:
        return told(partial(LOOKING[given.name], given))
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
    line = f"python -m experiments {' '.join(words)}"

    def drawn() -> None:
        found = run(each, plan, out, line, given.update, given.estimate)
        if found:
            print(tables.of_card(found), *found.get("verdict", []), f"Card: {out}", sep="\n")

    return told(drawn)


def told(call: Callable[[], object]) -> int:
    """The exit code of a command. What it refuses becomes a message."""
    try:
        call()
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. The same command goes on.", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------- labels by looking


def sheets(given: argparse.Namespace) -> None:
    of = labels.Labelling(given.work / "leaderboard")
    made = of.write_third(given.batch) if given.third else of.write(given.icons)
    for folder in made:
        print(f"{folder}: {len(list(folder.glob('sheet-*.png')))} sheets")
    print("Fill in the answers of each sheet, then run `python -m experiments read`.")


def read(given: argparse.Namespace) -> None:
    of = labels.Labelling(given.work / "leaderboard")
    of.read(given.replace)
    card, file = given.results / judge.CARD, given.results / labels.FILE
    found = json.loads(card.read_text("utf-8")) if card.is_file() else {}
    if "form" not in found:
        print(f"The answers are stored. {file} needs {card} of this runner: run this command again once it is drawn.")
        return
    print(f"{len(labels.ship(found, of, file))} rows and cells with labels in {file}")


def judge_(given: argparse.Namespace) -> None:
    card = judge.judged(given.results)
    write_json(given.results / judge.OUT, card)
    print(tables.of_card(card), *card["verdict"], f"Card: {given.results / judge.OUT}", sep="\n")


LOOKING: dict[str, Callable[[argparse.Namespace], None]] = {"sheets": sheets, "read": read, "judge": judge_}


if __name__ == "__main__":
    sys.exit(main())
