"""What UCE and RECE cost, and how exact they are, beside literal implementations, on weights of SD 1.5's size.

    python benchmarks/closed_form.py [--concepts 1 10 100] [--budget 60] [--work DIR] [--out FILE]

Random weights (16 layers, to_k and to_v of widths 320, 640, 1280 from 768) and random texts of 77 rows whose start row
is shared, whose padding rows resemble each other, and whose norms are those of CLIP's (28). No text encoder is timed.

Methods: `uce` and `rece` (3 rounds) of this package; `uce 2023` (outputs of all layers for each layer), `uce 2025`
(outputs once, last token only) and `rece literal`, of literal_editors.py, with explicit float32 inverses. All solve
the same problem; `uce`, `uce 2023` and the start of RECE edit the tail of the text, `uce last` and `uce 2025` the
last token. The reference solves every layer on its own in float64. Error: of the change of the weights, relative, in
the worst layer.

Each (method, concepts) is a process of its own: time is the median of `--repeat` runs in it (literal ones once), memory
what its largest resident size grew by. A literal method that has spent `--budget` seconds leaves out outputs that it
would not use, and adds the average time of those that it did not leave out: such times are marked. Results are kept in
`--work` one by one, and the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import literal_editors as literal
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from efface.delta import dense
from efface.editors._closed_form import changes, step
from efface.editors.rece import rounds, sum_of_squares

ROOT = Path(__file__).parents[1]
WIDTHS = {"sd15": [320] * 10 + [640] * 10 + [1280] * 12, "tiny": [24] * 4 + [48] * 4}
SIZES = {"sd15": (768, 77), "tiny": (32, 16)}
ROUNDS, MU, B, LAM = 3, 0.1, 0.1, 0.1
METHODS = ("uce", "uce 2023", "uce last", "uce 2025", "rece", "rece literal")
AGAINST = {"uce 2023": "uce", "uce 2025": "uce last", "rece literal": "rece"}
TARGETS = {"uce 2023": 20, "rece literal": 20}  # times faster, at 10 concepts


class Problem:
    """Weights in float32, and rows of concepts, anchors and preserved texts in float64."""

    def __init__(self, size: str, concepts: int) -> None:
        width, length = SIZES[size]
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        self.weights = [draw(out, width).float() / width**0.5 for out in WIDTHS[size]]
        start, padding, drift = draw(width), draw(width), draw(length, width)

        def text(own: int) -> Tensor:
            """Start, own tokens, then end and padding that take after the text and the position."""
            meaning = draw(width)
            rows = torch.cat([start[None], draw(own, width), 0.6 * padding + 0.6 * meaning + 0.5 * drift[own + 1 :]])
            return 28 * rows / rows.norm(dim=1, keepdim=True)

        lengths = [1 + k % 3 for k in range(concepts)]
        phrases, blank = [text(own) for own in lengths], text(0)
        self.tail = torch.cat([t[own:] for t, own in zip(phrases, lengths, strict=True)])
        self.tail_anchor = torch.cat([blank[: length - own] for own in lengths])
        self.last = torch.stack([t[own] for t, own in zip(phrases, lengths, strict=True)])
        self.all = torch.cat(phrases)
        self.blank, self.concepts = blank, concepts

    def edit(self, method: str) -> tuple[Tensor, Tensor, Tensor, float, float]:
        """C, G, P, b, lam of UCE, or of the rounds of RECE."""
        if method in ("uce last", "uce 2025"):
            return self.last, self.blank[:1].expand_as(self.last), self.blank[:1], 1.0, 0.5
        if method in ("uce", "uce 2023"):
            return self.tail, self.tail_anchor, self.blank, 1.0, 0.5
        return self.all, self.blank.repeat(self.concepts, 1), self.blank, B * self.concepts, LAM


def ours(problem: Problem, method: str) -> list[Tensor]:
    """The changes, as the package makes them from the rows."""
    names = {str(k): w for k, w in enumerate(problem.weights)}
    concept, anchor, kept, b, lam = problem.edit(method)
    if method != "rece":
        left, right = step(concept, anchor, b * kept.T @ kept, 1.0, lam)
    else:
        gram = problem.blank.T @ problem.blank
        left, right = step(problem.tail, problem.tail_anchor, B * gram, 1.0, LAM)
        steps = rounds(sum_of_squares(problem.weights), left, right, concept, anchor, b * gram, MU, lam)
        for _ in range(ROUNDS):
            left, right, _ = next(steps)
    return list(changes(names, left, right).values())


def theirs(problem: Problem, method: str, clock: literal.Clock) -> list[Tensor]:
    """The edited weights, literally."""
    concept, anchor, kept = (x.float() for x in problem.edit(method)[:3])
    b, lam = problem.edit(method)[3:]
    if method == "rece literal":
        tail, tail_anchor = problem.tail.float(), problem.tail_anchor.float()
        start = literal.uce_quadratic(problem.weights, tail, tail_anchor, kept, 1.0, B, LAM, clock)
        return literal.rece(problem.weights, start, concept, anchor, kept, MU, b, lam, ROUNDS, clock)
    uce = literal.uce_quadratic if method == "uce 2023" else literal.uce_once
    return uce(problem.weights, concept, anchor, kept, 1.0, b, lam, clock)


def reference(problem: Problem, method: str) -> list[Tensor]:
    """The edited weights: every layer solved on its own, in float64, from the sums of the paper."""

    def solve(weights: list[Tensor], c: Tensor, g: Tensor, p: Tensor, b: float, lam: float) -> list[Tensor]:
        ridge = lam * torch.eye(c.shape[1], dtype=torch.float64)
        right, k = g.T @ c + b * p.T @ p + ridge, c.T @ c + b * p.T @ p + ridge
        return [torch.linalg.solve(k, (w @ right).T).T for w in weights]

    weights = [w.double() for w in problem.weights]
    concept, anchor, kept, b, lam = problem.edit(method)
    if method not in ("rece", "rece literal"):
        return solve(weights, concept, anchor, kept, b, lam)
    now = solve(weights, problem.tail, problem.tail_anchor, kept, B, LAM)
    for _ in range(ROUNDS):
        ww = MU * torch.eye(concept.shape[1], dtype=torch.float64) + sum(w.T @ w for w in now)
        wo = sum(w.T @ o for w, o in zip(now, weights, strict=True))
        derived = torch.linalg.solve(ww, wo @ concept.T).T
        now = solve(now, derived, anchor, kept, b, lam)
    return now


def peak() -> float:
    """Largest resident size so far, MiB."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / (2**20 if sys.platform == "darwin" else 2**10)


def cell(size: str, method: str, concepts: int, repeat: int, budget: float) -> dict[str, Any]:
    problem = Problem(size, concepts)
    torch.linalg.inv(torch.eye(64) + 0.1)  # the first call of each library is slow
    before, seconds, clock = peak(), [], literal.Clock(budget)
    for _ in range(1 if method in AGAINST else repeat):
        start = time.perf_counter()
        made = theirs(problem, method, clock) if method in AGAINST else ours(problem, method)
        seconds.append(time.perf_counter() - start + clock.added)
    memory = peak() - before
    error = 0.0
    for w, change, want in zip(problem.weights, made, reference(problem, method), strict=True):
        moved = change.double() - w if method in AGAINST else dense(change).double()
        error = max(error, float((moved - (want - w)).norm() / (want - w).norm()))
    return {
        "method": method,
        "concepts": concepts,
        "seconds": statistics.median(seconds),
        "runs": len(seconds),
        "layers left out": clock.skipped,
        "layers": clock.layers,
        "memory MiB": memory,
        "error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*WIDTHS], default="sd15")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/closed_form")
    parser.add_argument("--out", type=Path, default=ROOT / "results/closed_form.json")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(args.size, args.cell[0], int(args.cell[1]), args.repeat, args.budget)))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    options = ["--size", args.size, "--repeat", str(args.repeat), "--budget", str(args.budget)]
    setting = {"options": options, "torch": version("torch"), "threads": torch.get_num_threads()}
    for concepts in args.concepts:
        for method in METHODS:
            path = args.work / f"{args.size}-{method.replace(' ', '-')}-{concepts}.json"
            if not path.exists() or json.loads(path.read_text())["setting"] != setting:
                command = [sys.executable, __file__, "--cell", method, str(concepts), *options]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                path.write_text(json.dumps(json.loads(done.stdout.splitlines()[-1]) | {"setting": setting}))
            cells[method, concepts] = json.loads(path.read_text())
    report(cells, args, setting)


def report(cells: dict[tuple[str, int], dict[str, Any]], args: argparse.Namespace, setting: dict[str, Any]) -> None:
    table = Table("concepts", "method", "seconds", "times slower", "memory MiB", "error")
    targets = []
    for (method, concepts), c in cells.items():
        against = cells.get((AGAINST.get(method, ""), concepts))
        c["times slower"] = c["seconds"] / against["seconds"] if against else None
        c["less accurate"] = c["error"] >= against["error"] if against else None
        if against:
            targets.append({"less accurate than ours": method, "concepts": concepts, "met": c["less accurate"]})
            if concepts == 10 and method in TARGETS:
                met = c["times slower"] >= TARGETS[method]
                targets.append({"times slower than ours": method, "at least": TARGETS[method], "met": met})
        mark = "*" if c["layers left out"] else ""
        times = f"{c['times slower']:.1f}{mark}" if against else ""
        table.add_row(
            str(concepts), method, f"{c['seconds']:.2f}{mark}", times, f"{c['memory MiB']:.0f}", f"{c['error']:.1e}"
        )
    console = Console()
    console.print(table)
    console.print("* in part from the average of the layers measured")
    for target in targets:
        if not target["met"]:
            console.print(f"missed: {target}", style="yellow")
    card = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(
            ["python benchmarks/closed_form.py --concepts", *map(str, args.concepts), *setting["options"]]
        ),
        "size": args.size,
        **{k: setting[k] for k in ("torch", "threads")},
        "cells": [{k: v for k, v in c.items() if k != "setting"} for c in cells.values()],
        "targets": targets,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
