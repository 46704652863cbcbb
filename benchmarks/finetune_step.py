"""What an update of ESD and SDD and a round of CCRT cost, beside the three-chain step of the published code.

    python benchmarks/finetune_step.py [--model emoji|tiny] [--rounds 7] [--updates 8] [--ccrt-steps 20] [--out FILE]

`naive` is written here from the description of the published code: for each update a trajectory of its own, with
separate calls of the denoiser for the conditional and the unconditional row, and separate calls for each branch of the
loss; one picture at a time. `efface` is the package: `reuse` updates share a trajectory (1 and 4 are timed), the two
rows of guidance and the teacher's two branches are one call. Both train the same weights with AdamW, at the same
batch, sampler and guidance. The variants take turns; ratios are taken within a round, median and range.

CCRT is counted, not timed against anything: denoiser rows of one round (with its distances, which the published code
does not report), and what the search, probe and fit would take if every individual were scored in every generation on
two guided trajectories of its own, and every update of the fit drew three, up to a random step.

Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor
from torch.func import functional_call

import efface
from efface import CCRT, ESD, SDD, Concept
from efface.core import config
from efface.editors import _round, _search
from efface.editors._denoiser import Denoiser

CONCEPT = Concept("cat", ("a cat",))
K, GUIDANCE, BATCH, LR = 20, 3.0, 2, 1e-5


def load(model: str) -> Any:
    if model == "emoji":
        return efface.load("emoji")
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import tiny

    return tiny.pipeline("sd1")


# ---------------------------------------------------------------- the naive step


class Naive:
    """Three chains: a trajectory for each update and picture, a call for each row and each branch."""

    def __init__(self, pipe: Any, method: str) -> None:
        self.pipe, self.method = pipe, method
        net = Denoiser(pipe, CONCEPT.phrases, "x", K)
        self.texts = net.condition.text
        self.student = {n.removeprefix("unet."): w for n, w in net.student().items()}
        self.average = {n: w.detach().clone() for n, w in self.student.items()}
        self.adam = torch.optim.AdamW(self.student.values(), lr=LR, weight_decay=0)
        self.frozen = {n: p.detach() for n, p in pipe.unet.named_parameters()}
        self.rng, self.rows = Generator().manual_seed(0), 0

    def predict(self, x: Tensor, t: Tensor, row: int, weights: dict[str, Tensor]) -> Tensor:
        self.rows += 1
        text = self.texts[row : row + 1]
        return functional_call(self.pipe.unet, self.frozen | weights, (x, t, text), {"return_dict": False})[0]

    @torch.no_grad()
    def point(self, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(K)
        stop = int(torch.randint(K, (1,), generator=self.rng))
        shape = (1, self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
        x = torch.randn(shape, generator=self.rng)
        for t in scheduler.timesteps[:stop]:
            null, own = self.predict(x, t, 0, weights), self.predict(x, t, 1, weights)
            x = scheduler.step(null + GUIDANCE * (own - null), t, x).prev_sample
        return x, scheduler.timesteps[stop]

    def update(self) -> None:
        self.adam.zero_grad()
        for _ in range(BATCH):
            x, t = self.point(self.student if self.method == "esd" else self.average)
            with torch.no_grad():
                if self.method == "esd":
                    null, own = self.predict(x, t, 0, {}), self.predict(x, t, 1, {})
                    target = null - (own - null)
                else:
                    target = self.predict(x, t, 0, self.student)
            ((self.predict(x, t, 1, self.student) - target).square().mean() / BATCH).backward()
        self.adam.step()
        if self.method == "sdd":
            with torch.no_grad():
                for name, average in self.average.items():
                    average.lerp_(self.student[name], 0.01)


# ---------------------------------------------------------------- timing


def variants(pipe: Any, method: str, updates: int) -> dict[str, Callable[[], int]]:
    """Name to a call that does `updates` updates and says how many denoiser rows that took."""

    def naive() -> int:
        step = Naive(pipe, method)
        for _ in range(updates):
            step.update()
        return step.rows

    def ours(reuse: int) -> int:
        rows, call = 0, Denoiser.__call__

        def count(self: Denoiser, x: Tensor, *args: Any) -> Tensor:
            nonlocal rows
            rows += len(x)
            return call(self, x, *args)

        cls: Any = {"esd": ESD, "sdd": SDD}[method]
        fields = {"steps": updates, "lr": LR, "batch": BATCH, "reuse": reuse, "sampler_steps": K, "guidance": GUIDANCE}
        Denoiser.__call__ = count  # type: ignore[method-assign]
        try:
            cls(**fields).fit(pipe, CONCEPT)
        finally:
            Denoiser.__call__ = call  # type: ignore[method-assign]
        return rows

    return {"naive": naive, "efface, reuse 1": lambda: ours(1), "efface, reuse 4": lambda: ours(4)}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def timed(pipe: Any, method: str, rounds: int, updates: int) -> list[dict[str, Any]]:
    calls = variants(pipe, method, updates)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    rows: dict[str, int] = {}
    for turn in range(rounds + 1):  # the first warms up
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            rows[name] = calls[name]()
            if turn:
                seconds[name].append((time.perf_counter() - began) / updates)
    return [
        {
            "method": method,
            "variant": name,
            "seconds_per_update": spread(taken),
            "speedup": spread([a / b for a, b in zip(seconds["naive"], taken, strict=True)]),
            "rows_per_update": rows[name] / updates,
        }
        for name, taken in seconds.items()
    ]


# ---------------------------------------------------------------- CCRT


def counted(pipe: Any, steps: int) -> dict[str, Any]:
    """Denoiser rows of one round of CCRT, with and without shared trajectories."""
    individuals, nets = 0, []
    search, fit = _search.search, _round.Round.fit

    def see_search(entities: Any, fitness: Any, **options: Any) -> Any:
        def see(new: Any) -> Any:
            nonlocal individuals
            individuals += len(new)
            return fitness(new)

        return search(entities, see, **options)

    def see_fit(self: Any, *args: Any) -> Any:
        nets.append(self.net)
        return fit(self, *args)

    method = CCRT(steps=steps).resolved(pipe)
    _search.search, _round.Round.fit = see_search, see_fit  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        method.sequence(pipe, CONCEPT)
    finally:
        _search.search, _round.Round.fit = search, fit  # type: ignore[method-assign]
    seconds = time.perf_counter() - began
    batch, k = method.batch or 1, method.sampler_steps or 1
    evaluations = individuals + method.generations * method.keep  # survivors are scored again
    chain = k  # rows of a guided trajectory up to a random step, on average
    unshared = {
        "search": evaluations * 2 * (chain + 1),
        "probe": steps * batch * (chain + 3),
        "fit": steps * batch * (3 * chain + 5),
    }
    return {
        "rows": nets[0].rows,
        "rows_unshared": unshared,
        "saved": 1 - nets[0].rows / sum(unshared.values()),
        "individuals": individuals,
        "seconds": seconds,
        "method": config(method),
    }


# ---------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("emoji", "tiny"), default="emoji")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--updates", type=int, default=8, help="timed at once; a multiple of 4")
    parser.add_argument("--ccrt-steps", type=int, default=20, help="updates of a probe and of a fit")
    parser.add_argument("--out", type=Path, default=Path("results/finetune_step.json"))
    args = parser.parse_args(arguments)
    pipe = load(args.model)
    results = [row for method in ("esd", "sdd") for row in timed(pipe, method, args.rounds, args.updates)]
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {m.__name__: m.__version__ for m in (efface, torch, diffusers)},
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "updates": args.updates,
        "sampler": {"steps": K, "guidance": GUIDANCE, "batch": BATCH},
        "results": results,
        "ccrt": counted(pipe, args.ccrt_steps),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else {}
    args.out.write_text(json.dumps({**kept, args.model: record}, indent=2) + "\n", "utf-8")
    table = Table("method", "variant", "s / update", "naive / this", "rows / update", title=args.model)
    for row in results:
        ratio = row["speedup"]
        table.add_row(
            row["method"],
            row["variant"],
            f"{row['seconds_per_update']['median']:.3f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            f"{row['rows_per_update']:.1f}",
        )
    Console().print(table)
    ccrt = record["ccrt"]
    Console().print(
        f"CCRT: {ccrt['rows']} rows, {sum(ccrt['rows_unshared'].values())} unshared: {ccrt['saved']:.0%} saved"
    )


if __name__ == "__main__":
    main()
