"""What every method costs on `emoji`: a denoiser call, and the fit. `python -m experiments.costs`.

Core-seconds of one process with one thread, so that other work on the machine disturbs little. The variants take turns
in rounds; a step is a denoiser call with guidance in a batch of 4, as a ratio to the base model's of the same round.
Trained methods are fitted for few updates, twice, and their time is extrapolated to the updates of their defaults.

Memory is the largest sum of bytes of tensors that a step makes and has not freed, weights left out. It is the same in
each run, so `--memory` measures it alone, on a machine with other work too, and adds it to the card.
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
from efface.files import read_json, write_json

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


def peak(call: Callable[[], Any]) -> int:
    """How many bytes the tensors of a call hold at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    found = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted((each for each in found if each.name() == "[memory]"), key=lambda each: each.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    if most == 0:
        raise RuntimeError("The profiler saw no memory of tensors. Use the torch version of constraints.txt.")
    return most


def memory(made: dict[str, Any], scene: calls.Scene) -> dict[str, dict[str, Any]]:
    """The peak of a step for each variant, and as a ratio to the base model's."""
    found = {}
    for name, make in made.items():
        with make(scene) as call:
            call()  # what is made once stays out
            found[name] = peak(call)
    return {name: {"bytes": each, "times": each / found["base"]} for name, each in found.items()}


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
    parser.add_argument("--memory", action="store_true", help="measure memory alone, and add it to the card")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scene = calls.scene("emoji", BATCH)
    scene.pipe.set_progress_bar_config(disable=True)
    made, facts = variants(scene.pipe)
    held = memory(made, scene)
    if given.memory:
        card = read_json(given.out, f"Run `{COMMAND}` first.")
        rows = [row | {"memory": held[row["row"]]} for row in card["rows"]]
        new = [{"row": name, "memory": each} for name, each in held.items() if name not in {r["row"] for r in rows}]
        about = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "command": f"{COMMAND} --memory"}
        write_json(given.out, card | {"memory": about, "rows": rows + new})
        return
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
            "memory": held[name],
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
