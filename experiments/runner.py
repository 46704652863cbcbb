"""Runs an experiment: estimates, refuses above the cap, draws what is missing, writes the card.

An experiment is a list of units. What a unit measures is stored once, as a file named by the hash of everything that
decides it. So the same command continues a killed run, and measures a changed setting or changed code again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

import efface
from efface.checks import refusal, shown
from efface.files import as_json, lock, read_json, write_json

from .code import ROOT, code_hash, commit
from .worlds import SEEDS, World, world

FORM = 2  # of cards; those of the runners before this one have no `form`


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command asked for.

    Args:
        block: of prompts and seeds.
        n: pictures per cell, or rounds.
        model: what is drawn with.
        folder: where raw outcomes and fitted deltas are kept.
        cards: where the cards of earlier experiments are.
        device: what the pipeline draws on.
        call: arguments of a pipeline's call.
    """

    block: str
    n: int
    model: str = "emoji"
    folder: Path = ROOT / "runs/experiments"
    cards: Path = ROOT / "results"
    device: str = "cpu"
    call: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"num_inference_steps": 25, "guidance": 7.5})

    @property
    def world(self) -> World:
        return world(self.model, self.device)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What decides every picture of this plan."""
        from efface.pipelines import draw, model_hash

        versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        return {
            "model": {"name": self.model, "text_hash": model_hash(self.world.pipe)},
            "detector": self.world.detector,
            "data_sha256": self.world.data_hash,
            "call": dict(self.call),
            "device": self.device.partition(":")[0],
            "versions": versions,
            "drawing": code_hash(draw, World),
        }


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of an experiment that is measured whole or not at all.

    Args:
        row: the row of the card that it belongs to.
        setting: everything that decides the outcome, as JSON.
        measure: measures it. Returns JSON.
        weight: how much work it is, beside other units of the same row and kind.
        pilot: core-seconds that a unit of weight 1 takes, from a small trial.
        kind: units of a row are estimated together if they are of one kind.
    """

    row: str
    setting: dict[str, Any]
    measure: Callable[[], dict[str, Any]]
    weight: float
    pilot: Callable[[], float]
    kind: str = "cell"

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode()).hexdigest()


class Store:
    """Raw outcomes, one file per unit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def found(self, unit: Unit) -> dict[str, Any] | None:
        """What was measured of a unit: `raw`, `core_seconds` and `date`; None if nothing was."""
        path = self.folder / f"{unit.digest}.json"
        if not path.is_file():
            return None
        found = read_json(path, "Delete it. The same command measures it again.")
        if found.get("setting") != as_json(unit.setting):
            raise ValueError(f"{path} holds another unit than its name says. Delete it, and start the command again.")
        return found

    def first(self, units: Sequence[Unit]) -> dict[str, Any] | None:
        """The estimate and the commit that a run of these units began with."""
        path = self._first(units)
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def begin(self, units: Sequence[Unit], hours: float) -> dict[str, Any]:
        found = {"hours": float(f"{hours:.3g}"), "commit": commit()}
        write_json(self._first(units), found)
        return found

    def _first(self, units: Sequence[Unit]) -> Path:
        whole = hashlib.sha256("".join(unit.digest for unit in units).encode()).hexdigest()
        return self.folder / f"{whole[:32]}.estimate.json"

    def measure(self, unit: Unit) -> dict[str, Any]:
        raw, took = timed(unit.measure)
        found = {"setting": unit.setting, "raw": raw, "core_seconds": took, "date": now()}
        write_json(self.folder / f"{unit.digest}.json", found)
        return found


class Experiment:
    """One question, answered by one card. Kinds of experiments are its subclasses (dataclasses).

    Args:
        name: of the command, and of the card.
        question: what the card answers.
        cap: core-hours that it may take.
        n: pictures per cell, or rounds.
        model: what is drawn with.
        block: of prompts and seeds, unless the command names another one.
    """

    name: str
    question: str
    cap: float
    n: int
    model: str
    block: str
    blocks: ClassVar[tuple[str, ...]] = tuple(SEEDS)
    chooses: ClassVar[bool] = False
    columns: Mapping[str, str]

    def units(self, plan: Plan) -> list[Unit]:
        raise NotImplementedError

    def names(self, units: Sequence[Unit]) -> list[str]:
        """The rows of the card."""
        return list(dict.fromkeys(unit.row for unit in units))

    def redrawn(self, plan: Plan, units: Sequence[Unit], update: Sequence[str]) -> list[Unit]:
        """The units that an update measures: the base model's, which have to be those of the card, and the rows'."""
        return [unit for unit in units if unit.row in {"base", *update}]

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        """What the card says of the measurements: `rows`, each with its name as `row`, and what else is raw."""
        raise NotImplementedError

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        """What follows from all rows together."""
        return {}

    def one(self, given: dict[str, Any]) -> dict[str, Any]:
        """What a unit measures that needs a process of its own."""
        raise NotImplementedError

    same: ClassVar[tuple[str, ...]] = ("experiment", "block", "n", "model", "detector", "data_sha256", "call", "base")

    def merged(self, old: dict[str, Any], new: dict[str, Any], update: Sequence[str]) -> dict[str, Any]:
        """The old card with the rows in `update` from the new one.

        Raises:
            ValueError: the two must not be compared.
        """
        for key in self.same:
            if old.get(key) != new.get(key):
                raise ValueError(
                    f"The card has {key} {shown(old.get(key))}, today's is {shown(new.get(key))}. Measure all rows "
                    "again."
                )
        fresh = {row["row"]: row for row in new["rows"] if row["row"] in update}
        rows = [fresh.pop(row["row"], row) for row in old["rows"]]
        note = {"rows": list(update), **{key: new[key] for key in ("date", "command", "code", "machine", "core_hours")}}
        pictures = {"pictures": old["pictures"] | new["pictures"]} if "pictures" in old else {}
        return old | pictures | {"rows": [*rows, *fresh.values()], "updates": [*old.get("updates", []), note]}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the core-seconds it took: of all threads and finished child processes."""

    def spent() -> float:
        return time.process_time() + sum(os.times()[2:4])

    began = spent()
    return call(), spent() - began


def machine() -> str:
    """What a timing depends on."""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def estimate(units: Iterable[Unit]) -> dict[str, float]:
    """Core-hours per row, from a small trial of each row and kind."""
    groups: dict[tuple[str, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.row, unit.kind), []).append(unit)
    hours: dict[str, float] = {}
    for (row, _), some in groups.items():
        hours[row] = hours.get(row, 0.0) + some[0].pilot() * sum(unit.weight for unit in some) / 3600
    return hours


def check_block(experiment: Experiment, block: str) -> None:
    """ValueError for a block that an experiment has not, or must not see because it chooses a setting."""
    allowed = experiment.blocks
    if block not in allowed and not (experiment.chooses and block == "test"):
        raise ValueError(refusal(f"a block of {', '.join(allowed)}", block, "Name one of them."))
    if experiment.chooses and block == "test":
        raise ValueError(
            f"Expected `{experiment.name}` on the tuning or selection block, because it chooses a setting, got the "
            "test block. Choose on `--block tuning`, and measure the choice by the experiment that reads this card."
        )


def check_cap(experiment: Experiment, hours: Mapping[str, float], spent: float) -> None:
    """ValueError if the estimate, with what was spent already, is above the cap."""
    total = spent + sum(hours.values())
    if total > experiment.cap:
        most = sorted(hours.items(), key=lambda each: -each[1])[:6]
        rows = f" ({', '.join(f'{row} {value:.2g}' for row, value in most)})" if most else ", all of it spent"
        raise ValueError(
            f"Expected `{experiment.name}` to take at most {experiment.cap:g} core-hours, got {total:.2g}{rows}. Lower "
            "`--n`, redraw single rows with `--update`, or raise `cap` in experiments/catalogue.py in a commit that "
            "says why."
        )


def outdated(experiment: Experiment, plan: Plan, card: Mapping[str, Any]) -> list[str]:
    """The rows of a card that other code has drawn than today's."""
    units, rows = experiment.units(plan), {row["row"]: row["code"] for row in card["rows"]}
    return [
        name for name in experiment.names(units) if name in rows and _own(name, units)[0].setting["code"] != rows[name]
    ]


def _own(row: str, units: Sequence[Unit]) -> list[Unit]:
    """The units that a row's figures are from: its cells, or all units where rows are measured together."""
    return [unit for unit in units if unit.row == row and unit.kind == "cell"] or list(units)


def run(
    experiment: Experiment,
    plan: Plan,
    out: Path,
    command: str,
    update: Sequence[str] = (),
    only_estimate: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any] | None:
    """Measures what is missing, writes the card to `out`, and returns it; None after an estimate.

    Raises:
        ValueError: the estimate is above the cap; the block is not allowed; an unknown row; rows of another card.
        BlockingIOError: another process runs this experiment.
    """
    check_block(experiment, plan.block)
    store = Store(plan.folder / experiment.name)
    plan = dataclasses.replace(plan, folder=store.folder)
    with lock(store.folder / "lock"):
        units = experiment.units(plan)
        known = experiment.names(units)
        if strange := [row for row in update if row not in known]:
            raise ValueError(refusal(f"a row of `{experiment.name}`", strange[0], f"There is: {', '.join(known)}."))
        old = json.loads(out.read_text("utf-8")) if out.is_file() else None
        if update:
            if old is None or old.get("form") != FORM:
                raise ValueError(f"{out} is no card of this runner, so no row can be kept. Leave `--update` out.")
            units = experiment.redrawn(plan, units, update)
        missing = [unit for unit in {unit.digest: unit for unit in units}.values() if store.found(unit) is None]
        if missing and old and old.get("form") == FORM and not update and plan.block == "test" and not only_estimate:
            raise ValueError(
                f"{out} was drawn by {old['code']['commit'][:12] or 'other code'}, and the test block is drawn once "
                "per release. Redraw single rows with `--update ROW`, or delete the card for a new release."
            )
        spent = sum((store.found(unit) or {"core_seconds": 0.0})["core_seconds"] for unit in units) / 3600
        first = store.first(units)
        if only_estimate or not first:
            hours = estimate(missing)
            say(f"{experiment.name}: {len(missing)} units to measure, estimate {sum(hours.values()):.3g} core-hours")
            for row, value in hours.items() if only_estimate else ():
                say(f"  {row}: {value:.3g}")
            check_cap(experiment, hours, spent)
            if only_estimate:
                return None
            first = store.begin(units, sum(hours.values()))
        began = time.monotonic()
        for k, unit in enumerate(missing):
            spent += store.measure(unit)["core_seconds"] / 3600
            check_cap(experiment, {}, spent)
            left = (time.monotonic() - began) / (k + 1) * (len(missing) - k - 1)
            say(f"{k + 1}/{len(missing)} {unit.row}, {spent:.3g} core-hours, {left / 60:.0f} min left")
        found = [(unit, each) for unit in units if (each := store.found(unit))]
        card = _head(experiment, plan, command, found, first, spent) | experiment.rows(plan, found)
        dates = {unit.digest: each["date"] for unit, each in found}
        for row in card["rows"]:
            own = _own(row["row"], units)
            row |= {"code": own[0].setting["code"], "commit": first["commit"]}
            row["date"] = max(dates[unit.digest] for unit in own)
        if update and old:
            card = experiment.merged(old, card, update)
        card |= experiment.derived(card)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, card)
    return card


def _head(
    experiment: Experiment,
    plan: Plan,
    command: str,
    found: Sequence[tuple[Unit, dict[str, Any]]],
    first: dict[str, Any],
    spent: float,
) -> dict[str, Any]:
    """What every card says."""
    return {
        "form": FORM,
        "experiment": experiment.name,
        "question": experiment.question,
        "date": max(each["date"] for _, each in found),
        "command": command,
        "block": plan.block,
        "n": plan.n,
        **plan.facts,
        "code": {"commit": first["commit"], "efface": efface.__version__},
        "machine": machine(),
        "core_hours": {"cap": experiment.cap, "estimate": first["hours"], "spent": float(f"{spent:.3g}")},
        "columns": dict(experiment.columns),
    }
