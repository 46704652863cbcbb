"""What things cost: variants that take turns in rounds, as ratios to a named alternative of the same round."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from .code import ROOT, code_hash
from .runner import Experiment, Plan, Unit, machine, timed

Measured = tuple[float, torch.Tensor | None]
"""Seconds, and what the variant predicts where its effect is checked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing(Experiment):
    """Variants x scenes, in rounds.

    Each round times every variant once, in a new order. A ratio is that of a round. The first round of a scene only
    warms up.

    Args:
        scenes: name to what builds it: a moment of a drawing, a model. Built once per process.
        variants: name to what measures it on a scene.
        against: the variant that ratios are taken to; `slower` turns them around.
        effect: the least relative change that a variant must make to the prediction of `against`. A dead hook is cheap.
        targets: (scene, variant) to the largest ratio aimed at.
        memory: the scenes where each variant's memory is measured, in a process of its own.
        count: what is counted once, without timing.
        used: classes and functions whose code decides the figures.
    """

    name: str
    question: str
    cap: float
    scenes: Mapping[str, Callable[[], Any]]
    variants: Mapping[str, Callable[[Any], Measured]]
    against: str
    used: tuple[Any, ...]
    n: int = 11
    model: str = "emoji"
    block: str = "none"
    effect: float = 0.0
    slower: bool = False
    memory: tuple[str, ...] = ()
    targets: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    count: Callable[[], dict[str, Any]] | None = None
    only: tuple[str, ...] = ()
    columns: ClassVar[Mapping[str, str]] = {"ratio": "times the alternative", "seconds": "seconds", "memory": "memory"}
    blocks: ClassVar[tuple[str, ...]] = ("none",)
    same: ClassVar[tuple[str, ...]] = ("experiment", "n", "machine", "against")

    def names(self, units: Sequence[Unit]) -> list[str]:
        return list(self.variants)

    def redrawn(self, plan: Plan, units: Sequence[Unit], update: Sequence[str]) -> list[Unit]:
        """New rounds of the alternative and these variants."""
        return dataclasses.replace(self, only=tuple(update), count=None).units(plan)

    def units(self, plan: Plan) -> list[Unit]:
        facts = {"machine": machine(), "code": code_hash(*self.used), "versions": plan.facts["versions"]}
        names = [name for name in self.variants if not self.only or name in (self.against, *self.only)]
        found = []

        @functools.cache
        def pilot() -> float:
            """Of a process of its own; all take about as long."""
            return timed(lambda: fresh(self, {"scene": next(iter(self.scenes)), "variant": self.against}))[1]

        for scene in self.scenes:
            built: list[Any] = []
            for number in range(plan.n + 1):
                setting = {**facts, "scene": scene, "round": number, "variants": names}

                def measure(scene: str = scene, number: int = number, built: list[Any] = built) -> dict[str, Any]:
                    built[:] = built or [self.scenes[scene]()]
                    return self._round(built[0], names, number)

                found.append(Unit(self.against, setting, measure, 1.0, lambda m=measure: timed(m)[1], f"round {scene}"))
            for name in names if scene in self.memory else ():
                given, setting = {"scene": scene, "variant": name}, {**facts, "scene": scene, "memory of": name}
                found.append(Unit(name, setting, partial(fresh, self, given), 1.0, pilot, "memory"))
        if self.count:
            found.append(Unit("count", {**facts, "count": True}, self.count, 1.0, lambda: 0.0, "count"))
        return found

    def _round(self, scene: Any, names: Sequence[str], number: int) -> dict[str, Any]:
        """Seconds of each variant; RuntimeError for one that hardly changes the prediction."""
        seconds, made = {}, {}
        for name in random.Random(number).sample(list(names), len(names)):
            seconds[name], made[name] = self.variants[name](scene)
        base, effect = made[self.against], {}
        if base is not None:
            effect = {name: float((out - base).norm() / base.norm()) for name, out in made.items() if out is not None}
        for name in effect.keys() - {self.against}:
            if not effect[name] > self.effect:
                raise RuntimeError(f"{name!r} changes the prediction by {effect[name]:.4f}, not by > {self.effect}.")
        return {"seconds": seconds, "effect": effect}

    def one(self, given: dict[str, Any]) -> dict[str, Any]:
        """The largest resident size of this process in bytes: in all, and (Linux) once the scene is built."""
        with torch.no_grad():
            return resident(lambda: self.scenes[given["scene"]](), self.variants[given["variant"]])

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        memory = {(u.setting["scene"], u.row): e["raw"] for u, e in found if u.kind == "memory"}
        for scene in self.scenes:
            of = [e["raw"] for u, e in found if u.setting.get("scene") == scene and u.kind.startswith("round")]
            timed_rounds = of[1:]
            for name in of[0]["seconds"]:
                taken = [each["seconds"][name] for each in timed_rounds]
                ratios = [each["seconds"][name] / each["seconds"][self.against] for each in timed_rounds]
                cell = {
                    "ratio": spread([1 / x for x in ratios] if self.slower else ratios),
                    "seconds": spread(taken),
                    "rounds": len(taken),
                    "effect": of[0]["effect"].get(name),
                }
                if own := memory.get((scene, name)):
                    cell["memory"] = {k: v / memory[scene, self.against][k] for k, v in own.items()}
                if limit := self.targets.get((scene, name)):
                    cell["target"] = {"limit": limit, "met": cell["ratio"]["median"] <= limit}
                rows.setdefault(name, {"row": name, "scenes": {}})["scenes"][scene] = cell
        order = [rows[name] for name in self.variants if name in rows]
        counted = [e["raw"] for u, e in found if u.kind == "count"]
        return {"rows": order, "against": self.against} | ({"counted": counted[0]} if counted else {})


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def fresh(experiment: Experiment, given: dict[str, Any]) -> dict[str, Any]:
    """`experiment.one(given)` in a new process."""
    command = [sys.executable, "-m", "experiments", experiment.name, "--one", json.dumps(given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(build: Callable[[], Any], call: Callable[[Any], Any]) -> dict[str, int]:
    linux = sys.platform == "linux"

    def largest() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if linux else 1)

    scene, built = build(), largest()
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    call(scene)
    if not linux:
        return {"peak": largest()}
    calls = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    return {"peak": max(built, calls), "calls": calls}
