"""What UCE and RECE cost, and how exact they are, beside literal implementations of the published code.

Random weights (16 layers, to_k and to_v of widths 320, 640, 1280 from 768) and random texts of 77 rows. Their start row
is shared, their padding rows resemble each other, and their norms are those of CLIP's (28). No text encoder is timed.

All methods solve the same problem. `uce`, `uce 2023` and the start of RECE edit the tail of the text, `uce last` and
`uce 2025` the last token. The reference solves every layer on its own in float64. The error is that of the change of
the weights, relative, in the worst layer.

Each (method, concepts) has a process of its own. Its time is the median of `n` runs (literal methods: one run). Its
memory is the growth of the largest resident size. A literal method that has spent `budget` seconds leaves out outputs
that it would not use, and adds the average time of those that it did not leave out.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from efface.delta import dense
from efface.editors._closed_form import changes, step
from efface.editors.rece import rounds, sum_of_products

from .code import code_hash
from .literal import editors as literal
from .runner import Experiment, Plan, Unit, machine, timed
from .timing import fresh

WIDTHS = {"sd15": [320] * 10 + [640] * 10 + [1280] * 12, "tiny": [24] * 4 + [48] * 4}
SIZES = {"sd15": (768, 77), "tiny": (32, 16)}
ROUNDS, MU, B, LAM = 3, 0.1, 0.1, 0.1
AGAINST = {"uce 2023": "uce", "uce 2025": "uce last", "rece literal": "rece"}
METHODS = ("uce", "uce 2023", "uce last", "uce 2025", "rece", "rece literal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClosedForm(Experiment):
    """Methods x numbers of concepts."""

    name: str
    question: str
    cap: float
    n: int = 3
    model: str = "emoji"
    block: str = "none"
    size: str = "sd15"
    concepts: tuple[int, ...] = (1, 10, 100)
    budget: float = 15.0
    columns: ClassVar = {"seconds": "seconds", "memory MiB": "MiB", "error": "error", "times slower": "times slower"}
    blocks: ClassVar[tuple[str, ...]] = ("none",)
    same: ClassVar[tuple[str, ...]] = ("experiment", "n", "machine", "size")

    def units(self, plan: Plan) -> list[Unit]:
        facts = {"machine": machine(), "code": code_hash(ClosedForm), "versions": plan.facts["versions"]}
        least = {"concepts": self.concepts[0], "size": self.size, "n": 1, "budget": self.budget}

        def pilot(method: str) -> float:
            """Of a process with the fewest concepts; a literal method may spend its budget twice over."""
            took = timed(lambda: fresh(self, least | {"method": method}))[1]
            return took + (2 * self.budget * torch.get_num_threads() if method in AGAINST else 0)

        found = []
        for method in METHODS:
            for concepts in self.concepts:
                given = least | {"method": method, "concepts": concepts, "n": plan.n}
                measure = partial(fresh, self, given)
                found.append(Unit(method, facts | given, measure, 1.0, partial(pilot, method)))
        return found

    def one(self, given: dict[str, Any]) -> dict[str, Any]:
        method, problem = given["method"], Problem(given["size"], given["concepts"])
        torch.linalg.inv(torch.eye(64) + 0.1)  # the first call of each library is slow
        before, seconds, clock = peak(), [], literal.Clock(given["budget"])
        for _ in range(1 if method in AGAINST else given["n"]):
            start = time.perf_counter()
            made = theirs(problem, method, clock) if method in AGAINST else ours(problem, method)
            seconds.append(time.perf_counter() - start + clock.added)
        memory, error = peak() - before, 0.0
        for w, change, want in zip(problem.weights, made, reference(problem, method), strict=True):
            moved = change.double() - w if method in AGAINST else dense(change).double()
            error = max(error, float((moved - (want - w)).norm() / (want - w).norm()))
        found = {"seconds": statistics.median(seconds), "runs": len(seconds), "memory MiB": memory, "error": error}
        return found | {"layers": clock.layers, "layers left out": clock.skipped}

    def rows(self, plan: Plan, found: Sequence[tuple[Unit, dict[str, Any]]]) -> dict[str, Any]:
        rows: dict[str, dict[str, Any]] = {}
        for unit, each in found:
            cells = rows.setdefault(unit.row, {"row": unit.row, "concepts": {}})["concepts"]
            cells[str(unit.setting["concepts"])] = each["raw"]
        return {"size": self.size, "rows": list(rows.values())}

    def derived(self, card: dict[str, Any]) -> dict[str, Any]:
        rows, compared = {row["row"]: row["concepts"] for row in card["rows"]}, []
        for theirs_, ours_ in AGAINST.items():
            for concepts in rows[theirs_].keys() & rows[ours_].keys():
                a, b = rows[theirs_][concepts], rows[ours_][concepts]
                times, worse = a["seconds"] / b["seconds"], a["error"] >= b["error"]
                note = {"row": theirs_, "against": ours_, "concepts": int(concepts)}
                compared.append(note | {"times slower": times, "less accurate": worse})
        return {"comparisons": sorted(compared, key=lambda each: (each["row"], each["concepts"]))}


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
        steps = rounds(
            sum_of_products(problem.weights, problem.weights), left, right, concept, anchor, b * gram, MU, lam
        )
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
