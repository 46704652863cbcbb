"""`python -m experiments.check CARD`: checks a card that somebody sends, and draws some of its pictures again.

1. Form: every entry is there, with a digit per picture and detector.
2. Rows: the catalogue has the experiment and each row; model, detector, data, call and block are those of this version.
3. Seeds and prompts of each cell.
4. Code: each row was drawn by the code that is here.
5. Figures: rates, intervals, comparisons and verdict, again from the digits.
6. Pictures: some, chosen at random, are drawn again, and both detectors must see in them what the card says.

A card holds what detectors saw, not pictures, so the last part compares outcomes. `efface verify RUN --redraw 16` does
the same with run folders, to the bit. Exit codes: 0 all holds, 1 something differs, 2 no card, 4 a row was not redrawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import secrets
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, StringConstraints

import efface
from efface.checks import shown
from efface.files import as_json
from efface.pipelines import draw
from efface.schema import Facts, Form, Sha, Short, Size, Text, read

from .catalogue import CATALOGUE
from .code import ROOT
from .outcome import IMPLICIT, SOURCES, Arm, Outcome, delta_file, erasers_of, packed
from .runner import FORM, Plan, Unit, check_block, outdated

CURE = "Send the card as `python -m experiments NAME` wrote it."
SAME = ("model", "detector", "data_sha256", "call")
STAMPS = ("code", "commit", "date")  # of a row
MOST = 64 * 2**20
NOT_REDRAWN = 4
Eyes = Annotated[list[Annotated[str, StringConstraints(pattern="^[0-2-]*$")]], Field(min_length=2, max_length=2)]


class Digits(Form):
    """What both detectors saw in the pictures of a cell."""

    outcome: Eyes
    retained: Eyes
    object: Eyes
    sha256: Sha | None = None  # of the pictures that were kept for labels


class RowFacts(Form):
    row: Short
    code: Sha


class Card(Form):
    """A card of an experiment on outcomes."""

    form: Annotated[int, Field(ge=FORM, le=FORM)]
    experiment: Short
    block: Short
    n: Size
    model: Facts
    detector: Facts
    data_sha256: Sha
    call: Facts
    command: Text
    cells: dict[Short, Facts]
    rows: Annotated[list[RowFacts], Field(min_length=1, max_length=10_000)]
    pictures: dict[Short, dict[Short, Digits]]
    base: dict[Short, Digits]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture that is drawn again: picture `k` of a unit."""

    unit: Unit
    k: int


def checked(card: Mapping[str, Any], rows: Sequence[str], work: Path) -> tuple[list[str], Outcome, Plan, list[Unit]]:
    """What differs in a card, without drawing; and its experiment, plan, and the units of `rows`."""
    experiment = CATALOGUE.get(card["experiment"])
    if not isinstance(experiment, Outcome):
        raise ValueError(f"Expected a card of an experiment on outcomes, got {shown(card['experiment'])}. {CURE}")
    check_block(experiment, card["block"])
    plan = Plan(card["block"], card["n"], card["model"].get("name", ""), work / experiment.name)
    known = experiment.rows_of(plan)
    if strange := [row["row"] for row in card["rows"] if row["row"] not in known]:
        raise ValueError(
            f"Expected rows of `{experiment.name}`, got {', '.join(map(shown, strange))}. Add the method to "
            "experiments/catalogue.py in the same commit."
        )
    of_card = [row["row"] for row in card["rows"]]
    if lost := [row for row in ("base", *rows) if row not in of_card]:
        raise ValueError(f"Expected a row {shown(lost[0])} in the card, got {', '.join(of_card)}. {CURE}")
    problems = [
        f"{name}: expected {shown(plan.facts[name])}, as in this version, got {shown(card[name])}."
        for name in SAME
        if as_json(plan.facts[name]) != card[name]
    ]
    units = [unit for unit in experiment.units(plan) if unit.row in of_card]
    other = outdated(experiment, plan, card)
    problems += [f"row {row}: other code drew it than this version's. Redraw it with `--update`." for row in other]
    problems += _figures(card, experiment, plan, units, other)
    return problems, experiment, plan, [unit for unit in units if unit.row in (rows or of_card)]


def _figures(
    card: Mapping[str, Any], experiment: Outcome, plan: Plan, units: Sequence[Unit], other: Sequence[str]
) -> Iterator[str]:
    """What differs from what the digits of the card give. Rows of `other` code may have had other fields."""
    given, found = {row["row"]: row for row in card["rows"]}, []
    for unit in units:
        if unit.kind == "fit":
            fits = given[unit.row].get("fits", {})
            raw = dict(fits.get(unit.setting["concept"]["name"], {}))
            found.append((unit, {"raw": {name: value for name, value in raw.items() if name != "settings"}}))
            continue
        cell, expected = f"{unit.setting['concept']}, {unit.setting['cell']}", unit.setting["seeds"][1]
        digits = card["pictures"].get(unit.row, {}).get(cell)
        sizes = [len(eye) for source in SOURCES for eye in digits[source]] if digits else [0]
        if any(size != expected for size in sizes):
            yield f"row {unit.row}: expected {expected} pictures of {cell}, got {min(sizes)}."
            return
        found.append((unit, {"raw": {source: [_unpacked(eye) for eye in digits[source]] for source in SOURCES}}))
    made = as_json(experiment.rows(plan, found))
    for name, cell in made["cells"].items():
        there = card["cells"].get(name, {})
        yield from (
            f"cell {name}: expected {key} {shown(value)}, got {shown(there.get(key))}."
            for key, value in cell.items()
            if not _same(value, there.get(key))
        )
    for row in made["rows"]:
        there = given[row["row"]]
        names = (row.keys() | there.keys()) - {*STAMPS, *(("erasers", "fits") if row["row"] in other else ())}
        yield from (
            f"row {row['row']}: expected {name} {shown(row.get(name))} from its pictures, got {shown(there.get(name))}."
            for name in sorted(names)
            if not _same(row.get(name), there.get(name))
        )
    digits = {name: {source: raw[source] for source in SOURCES} for name, raw in card["base"].items()}
    if not _same(made["base"], digits):
        yield "base differs from the pictures of the base row."
    again = as_json(experiment.derived(dict(card) | made))
    yield from (f"{name} differs from what the rows give." for name in again if not _same(again[name], card.get(name)))


def _unpacked(digits: str) -> list[int]:
    return [-1 if digit == "-" else int(digit) for digit in digits]


def _same(a: Any, b: Any) -> bool:
    """Equal, up to the last digits of floats, which depend on the processor."""
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# ---- pictures


def chosen(units: Sequence[Unit], arms: Mapping[str, Arm], count: int, seed: int) -> list[Sample]:
    """Pictures at random, of each row as many."""
    rows = list(dict.fromkeys(unit.row for unit in units if arms[unit.row].negative == "none"))
    found, deal = [], random.Random(seed)
    for row in rows:
        own = [Sample(unit, k) for unit in units if unit.row == row and unit.kind == "cell" for k in _pictures(unit)]
        found += deal.sample(own, min(count, len(own)))
    return found


def _pictures(unit: Unit) -> range:
    return range(unit.setting["seeds"][1])


def redrawn(
    samples: Sequence[Sample], card: Mapping[str, Any], plan: Plan, arms: Mapping[str, Arm], fits: Mapping[str, Unit]
) -> Iterator[str]:
    """What differs between pictures that are drawn again and the card. `fits` has the fit of each delta."""
    for unit in dict.fromkeys(sample.unit.digest for sample in samples):
        some = [sample for sample in samples if sample.unit.digest == unit]
        s, ks = some[0].unit.setting, [sample.k for sample in some]
        concept, cell, row = s["concept"], s["cell"], some[0].unit.row
        if callable(arms[row].make):
            made = erasers_of(arms[row].make, concept)
        else:
            made = (efface.api.load_delta(delta_file(plan, fits[s["erasers"][0]["delta"]])),)
        with efface.stack(plan.world.pipe, *made):
            images = draw(plan.world.pipe, [s["prompts"][k] for k in ks], [s["seeds"][0] + k for k in ks], **plan.call)
        join = torch.any if cell in IMPLICIT else torch.all
        seen = plan.world.judge(images, concept, [s["keep"][k] for k in ks], join)
        for name, eyes in seen.items():
            for eye, digits in enumerate(packed(eyes)):
                for digit, k in zip(digits, ks, strict=True):
                    there = card["pictures"][row][f"{concept}, {cell}"][name][eye][k]
                    if digit != there:
                        yield (
                            f"row {row}, {concept}, {cell}, seed {s['seeds'][0] + k}: expected {name} {there} of "
                            f"detector {eye}, as in the card, got {digit}."
                        )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments.check", description=__doc__.splitlines()[0])
    made.add_argument("card", type=Path)
    made.add_argument("--row", nargs="+", default=[], help="the rows to draw again. Default: all")
    made.add_argument("--redraw", type=int, default=8, help="pictures of each row to draw again; 0: none")
    made.add_argument("--seed", type=int, help="of the choice of pictures. Default: a random one, which is printed")
    made.add_argument("--fit", action="store_true", help="fit the editors of these rows first")
    made.add_argument("--work", type=Path, default=ROOT / "runs/check", help="folder of fitted deltas")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    try:
        card = read(given.card, Card, CURE, MOST)
        problems, experiment, plan, units = checked(card, given.row, given.work)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(
        f"{given.card}: {card['experiment']}, {len(card['rows'])} rows, n = {card['n']}, drawn by {card['command']!r}"
    )
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    arms, skipped = experiment.rows_of(plan), []
    fits = {unit.digest: unit for unit in units if unit.kind == "fit"}
    if problems or given.redraw < 1:
        skipped = ["all"]
    else:
        waiting = [] if given.fit else list(dict.fromkeys(unit.row for unit in fits.values()))
        skipped = waiting + [row for row in dict.fromkeys(u.row for u in units) if arms[row].negative != "none"]
        samples = chosen([unit for unit in units if unit.row not in waiting], arms, given.redraw, seed)
        for fit in fits.values() if given.fit else ():
            print(f"Fitting {fit.row} for {fit.setting['concept']['name']}")
            plan.folder.mkdir(parents=True, exist_ok=True)
            fit.measure()
        problems += redrawn(samples, card, plan, arms, fits)
        print(f"Drew {len(samples)} pictures again (--seed {seed}).")
    print(*problems or ["Nothing differs."], sep="\n")
    if problems:
        return 1
    if skipped:
        print(f"Not drawn again: {', '.join(skipped)}. Use --redraw, and --fit for editors.")
    return NOT_REDRAWN if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
