"""What every method costs on `emoji`: a denoiser call, and the fit. `python -m experiments.costs`.

Core-seconds of one process with one thread, so that other work on the machine disturbs little. The variants take turns
in rounds; a step is a denoiser call with guidance in a batch of 4, as a ratio to the base model's of the same round.
Trained methods are fitted for few updates, twice, and their time is extrapolated to the updates of their defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import efface
from efface import registry

from .code import ROOT
from .literal import denoiser_calls as calls
from .runner import machine

FILE = ROOT / "results/method_costs.json"
CONCEPT = efface.Concept("alcohol", efface.concept("alcohol").phrases, anchor="a glass of milk")
# they learn from pictures with boxes or with judgements; a round of CCRT searches for minutes (see `ccrt_sequence`)
LEFT_OUT = ("geom_erasing", "hfi", "ccrt")
BATCH = 4
KEEP = ("a glass of milk", "a teacup", "a dog", "a house")
GIVEN: dict[str, dict[str, Any]] = {"gloce": {"preserve": KEEP}, "speed": {"preserve": ("", *KEEP)}}
COMMAND = "python -m experiments.costs"
FEW = (4, 12)  # updates of the two short fits; one trajectory serves four of them


def measured(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the core-seconds."""
    began = time.process_time()
    made = call()
    return made, time.process_time() - began


def fitted(name: str, pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The artefact of a short or whole fit at the defaults, and what the whole fit costs."""
    cls = registry.resolve(name)
    editor = cls(**GIVEN.get(name, {}))
    settled = editor.resolved(pipe) if hasattr(editor, "resolved") else editor
    steps = getattr(settled, "steps", None)
    if steps is None:
        delta, seconds = measured(lambda: editor.fit(pipe, CONCEPT))
        return delta, {"fit": seconds, "updates": None}
    few = [dataclasses.replace(settled, steps=k) for k in FEW]
    found = [measured(lambda each=each: each.fit(pipe, CONCEPT)) for each in few]
    update = max(found[1][1] - found[0][1], 0.0) / (FEW[1] - FEW[0])
    seconds = found[1][1] + (steps - FEW[1]) * update
    return found[1][0], {"fit": seconds, "updates": steps}


def variants(pipe: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What draws with each method, and the costs of the fits."""
    made: dict[str, Any] = {"base": calls.base}
    facts: dict[str, dict[str, Any]] = {}
    for name in registry.methods("erasers"):
        made[name] = lambda scene, name=name: applied(registry.resolve(name)(CONCEPT), scene)
    for name in registry.methods("editors"):
        if name not in LEFT_OUT:
            delta, facts[name] = fitted(name, pipe)
            print(name, facts[name], file=sys.stderr, flush=True)
            made[name] = lambda scene, delta=delta: applied(delta, scene)
    return made, facts


def applied(eraser: Any, scene: calls.Scene) -> Any:
    return calls.applied(lambda _: eraser, scene)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scene = calls.scene("emoji", BATCH)
    scene.pipe.set_progress_bar_config(disable=True)
    made, facts = variants(scene.pipe)
    ratios: dict[str, list[float]] = {name: [] for name in made}
    for number in range(given.rounds + 1):  # the first one warms up
        seconds: dict[str, float] = {}
        for name in random.Random(number).sample(list(made), len(made)):
            with made[name](scene) as call:
                _, seconds[name] = measured(call)
        for name in made if number else ():
            ratios[name].append(seconds[name] / seconds["base"])
    rows = [
        {
            "row": name,
            "step": {"median": statistics.median(each), "min": min(each), "max": max(each)},
            **facts.get(name, {}),
        }
        for name, each in ratios.items()
    ]
    card = {
        "rounds": given.rounds,
        "batch": BATCH,
        "few": FEW,
        "about": "the updates of the defaults",
        "command": COMMAND,
    }
    card |= {"machine": machine(), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    card |= {"load": Path("/proc/loadavg").read_text("utf-8").split()[0], "phrases": len(CONCEPT.phrases)}
    card |= {"versions": {"torch": torch.__version__, "efface": efface.__version__}, "rows": rows}
    given.out.write_text(json.dumps(card, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
