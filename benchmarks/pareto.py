"""Which run-time method erases most and loses least, on the `emoji` model? Cells and judges of eiup_outcome.py.

    python benchmarks/pareto.py                     # the curves on tuning seeds, then the chosen points on test seeds
    python benchmarks/pareto.py --methods sld       # only draws; the same command without it goes on from there
    python benchmarks/pareto.py --update eiup       # draws these anew, and takes the others from results/pareto.json

Every method gets four strengths on tuning seeds (the plain negative prompt has none). The point that goes on to test
seeds is chosen by one rule for all, the one at the head of eiup_outcome.py. Plain pictures are drawn once for all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fill_docs
from eiup_outcome import ROOT, RULE, TEST, TUNING, Bench, best, counted, pool, rate
from rich.console import Console
from rich.table import Table

import efface
from efface.intervals import wilson


def sld(concept: str, preset: str) -> efface.SLD:
    return getattr(efface.SLD, preset)(concept)


# A method's points: how it is shown, and from a concept to the eraser.
METHODS: dict[str, dict[str, Callable[[str], Any]]] = {
    "eiup": {f"{s:g}": lambda c, s=s: efface.EIUP(c, strength=s) for s in (0.5, 1.5, 2.25, 3.0)},
    "gie": {f"{s:g}": lambda c, s=s: efface.GIE(c, strength=s) for s in (0.25, 0.5, 1.0, 2.0)},
    "sld": {p: lambda c, p=p: sld(c, p) for p in ("weak_paper", "medium", "strong", "max")},
    "safree": {f"{s:g}": lambda c, s=s: efface.SAFREE(c, strength=s) for s in (0.5, 1.0, 2.0, 4.0)},
    "negative_prompt": {"plain": efface.NegativePrompt}
    | {f"{s:g}": lambda c, s=s: efface.NegativePrompt(c, strength=s) for s in (1.875, 3.75, 7.5, 15.0)},
}


@dataclass(frozen=True)
class Point:
    """What one setting of a method leaves and keeps, pooled over cells; rates of the worse eye."""

    method: str
    setting: str
    left: tuple[float, int, int]
    implicit: tuple[float, int, int]
    kept: tuple[float, int, int]
    any: tuple[float, int, int]

    def record(self) -> dict[str, Any]:
        rates = {
            name: {"rate": value, "n": n, "interval": wilson(k, n)}
            for name in ("left", "implicit", "kept", "any")
            for value, k, n in [getattr(self, name)]
        }
        return {"method": self.method, "setting": self.setting, **rates}

    @classmethod
    def of(cls, record: dict[str, Any]) -> Point:
        """The point of a card's record."""
        rates = (record[name] for name in ("left", "implicit", "kept", "any"))
        return cls(
            record["method"], record["setting"], *((r["rate"], round(r["rate"] * r["n"]), r["n"]) for r in rates)
        )


def point(bench: Bench, cells: list[tuple[str, str]], method: str, setting: str) -> Point:
    """Draws what is not drawn yet."""
    plain = method == "plain"
    make = (lambda concept: None) if plain else METHODS[method][setting]
    name = method if plain else f"{method}-{setting}"
    made = {cc: bench.cell(*cc, name, make(cc[0])) for cc in cells}
    every = list(made.values())
    implicit = [m for cc, m in made.items() if cc[1] in ("theme", "paraphrase")]
    most = "least" if plain else "most"  # of the two eyes, the one that is worse for us
    return Point(
        method,
        setting,
        rate(pool(every, "left"), most),
        rate(pool(implicit, "left"), most),
        rate(pool([m for m in every if m["kept"]], "kept"), "least"),
        rate(pool(every, "any"), "least"),
    )


def choose(points: list[Point], plain: Point) -> Point:
    """The rule at the head of eiup_outcome.py."""
    return points[best([(p.left[0], p.kept[0]) for p in points], plain.kept[0])]


def dominated(a: Point, points: list[Point]) -> list[str]:
    """The methods with a point that leaves no more than `a` and keeps no less, and is better in one."""
    return sorted(
        {
            b.method
            for b in points
            if b.method != a.method
            and b.left[0] <= a.left[0]
            and b.kept[0] >= a.kept[0]
            and (b.left[0], b.kept[0]) != (a.left[0], a.kept[0])
        }
    )


def plot(curves: dict[str, list[Point]], plain: tuple[Point, Point], chosen: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (all_axes, near) = pyplot.subplots(1, 2, figsize=(11, 4.6))
    for axes in (all_axes, near):
        for name, points in curves.items():
            points = sorted((p for p in points if p.setting != "plain"), key=lambda p: -p.left[0])
            (line,) = axes.plot(
                [100 * p.left[0] for p in points], [100 * p.kept[0] for p in points], "o-", markersize=3, label=name
            )
            for p in (p for p in chosen if p.method == name):
                axes.plot(100 * p.left[0], 100 * p.kept[0], "*", markersize=13, color=line.get_color())
            for p in (p for p in curves[name] if p.setting == "plain"):
                axes.plot(100 * p.left[0], 100 * p.kept[0], "x", color=line.get_color())
        for each, style, seeds in zip(plain, (":", "--"), ("tuning", "test"), strict=True):
            label = f"kept by the plain model, {seeds} seeds"
            axes.axhline(100 * each.kept[0], color="grey", linestyle=style, linewidth=1, label=label)
        axes.set(xlabel="concept left, %", ylabel="others kept, %")
    near.set(xlim=(-1, 25), ylim=(60, 100), title="the same, near the corner")
    all_axes.set(title="lines: tuning seeds; stars: chosen, test seeds", xlim=(-3, 103))
    all_axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def percent(value: tuple[float, int, int]) -> str:
    low, high = wilson(*value[1:])
    return f"{100 * value[0]:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def markdown(card: dict[str, Any], rows: list[Point]) -> str:
    lines = [
        f"Test seeds, n = {card['n']} pictures a cell, {len(card['test_cells'])} cells, each method at the point that "
        f"{card['n_tuning']} tuning seeds a cell chose for it.",
        f"Measured {card['date'][:10]} by `{card['command']}` ({card['seconds']['drawing'] / 60:.0f} core-minutes of "
        "drawing, beside other work), card in `results/pareto.json`.",
        *(
            [
                f"{', '.join(f'`{name}`' for name in card['updated'])} and the plain model were drawn then, with "
                f"`--update`; the others on {card['others']['date'][:10]} "
                f"({card['others']['seconds']['drawing'] / 60:.0f} core-minutes)."
            ]
            if card["updated"]
            else []
        ),
        "",
        "![Left against kept, over strengths](../results/pareto.png)",
        "",
        "| method | setting | left | left, implicit prompts | kept | any icon recognisable |",
        "|---|---|---|---|---|---|",
    ]
    plain = rows[0]
    for p in rows:
        rates = " | ".join(map(percent, (p.left, p.implicit, p.kept, p.any)))
        name, setting = ("plain model", "") if p is plain else (f"`{p.method}`", p.setting)
        lines.append(f"| {name} | {setting} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128, help="pictures per cell, test seeds")
    parser.add_argument("--n-tuning", type=int, default=48, help="pictures per cell and point, tuning seeds")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="draw these only, and write no card")
    parser.add_argument("--update", nargs="+", choices=METHODS, default=[], help="the others stay as the card has them")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/pareto")
    args = parser.parse_args()
    path = ROOT / "results/pareto.json"
    old = json.loads(path.read_text()) if args.update else {"tuning": [], "test": []}
    start, console = time.time(), Console(width=140)
    tuning, test = Bench(args.work / "tuning", TUNING, args.n_tuning), Bench(args.work / "test", TEST, args.n)
    cells = counted(tuning)
    plain = point(tuning, cells, "plain", "")
    before = {seeds: [Point.of(record) for record in old[seeds]] for seeds in ("tuning", "test")}
    if args.update and (before["tuning"][0], cells) != (plain, [tuple(cell) for cell in old["tuning_cells"]]):
        raise SystemExit(f"{path} was measured on another model, other seeds or numbers of pictures: measure all anew.")
    curves = {
        name: [p for p in before["tuning"] if p.method == name]
        if args.update and name not in args.update
        else [point(tuning, cells, name, s) for s in METHODS[name]]
        for name in args.methods or METHODS
    }
    picked = [choose(points, plain) for points in curves.values()]
    table = Table("method", "setting", "left", "implicit", "kept", "any icon", title="tuning seeds")
    for p in [plain, *(p for points in curves.values() for p in points)]:
        shown = (f"{100 * x[0]:.1f} %" for x in (p.left, p.implicit, p.kept, p.any))
        table.add_row(p.method, p.setting, *shown, style="bold" if p in picked else "")
    console.print(table)
    test_cells = counted(test)
    known = {(p.method, p.setting): p for p in before["test"] if p.method not in args.update}
    finals = [known.get((p.method, p.setting)) or point(test, test_cells, p.method, p.setting) for p in picked]
    if args.methods:
        return
    rows = [point(test, test_cells, "plain", ""), *finals]
    if args.update and before["test"][0] != rows[0]:
        raise SystemExit(f"{path} was measured on other test seeds or numbers of pictures: measure all anew.")
    drawn = [json.loads(path.read_text()) for bench in (tuning, test) for path in bench.work.glob("*.json")]
    card = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python benchmarks/pareto.py --n {args.n} --n-tuning {args.n_tuning}",
        "updated": args.update,
        "others": {k: old[k] for k in ("date", "command", "seconds")} if args.update else None,
        "model": {"name": "emoji", "text_hash": test.hash},
        "detector": {"name": "emoji eyes, the worse of two", "sha256": test.eyes.facts.get("sha256")},
        "n": args.n,
        "n_tuning": args.n_tuning,
        "tuning_cells": cells,
        "test_cells": test_cells,
        "rule": RULE,
        "tuning": [p.record() for p in [plain, *(p for points in curves.values() for p in points)]],
        "test": [p.record() | {"dominated_by": dominated(p, finals)} for p in rows],
        "seconds": {"this run": time.time() - start, "drawing": sum(d["seconds"] for d in drawn)},
    }
    path.write_text(json.dumps(card, indent=1) + "\n")
    plot(curves, (plain, rows[0]), finals, ROOT / "results/pareto.png")
    fill_docs.fill("pareto", markdown(card, rows))
    console.print(markdown(card, rows))


if __name__ == "__main__":
    main()
