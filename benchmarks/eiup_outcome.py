"""Does EIUP erase on the `emoji` model, and what else survives? One command, resumable, judged by two eyes.

    python benchmarks/eiup_outcome.py sweep      # tuning seeds: left versus kept over strengths; names one by a rule
    python benchmarks/eiup_outcome.py measure    # test seeds: plain, EIUP, negative prompt; writes results/
    python benchmarks/eiup_outcome.py bystanders # test seeds: every other icon on its own; writes results/

Cells: explicit, theme (implicit, trained), paraphrase (implicit, never seen), pair. `left`: the concept is still seen;
`kept`: the named other icon (pair), any icon of the theme outside the concept (implicit), the drawn icon (style) is
seen; `any`: any icon is recognisable. Both eyes judge, the worse is reported. A cell counts if the plain model shows
the concept in at least 30 % of its pictures.

The rule of `sweep`, as in `efface.calibrate`: the smallest strength that leaves at most 5 % of the concept in explicit
and 3 % in implicit prompts, and keeps within 5 points of what the plain model keeps, pooled over the counted cells; if
there is none, the one that the rule of pareto.py chooses. It is the default of `EIUP`.

The rule of pareto.py: of the points that keep within 5 points of what the plain model keeps, the one that leaves least
of the concept, pooled over the counted cells, and of equal ones the one that keeps most; if there is none, the one that
keeps most.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import efface
from efface import checks
from efface.core import config
from efface.intervals import wilson
from efface.models import emoji
from efface.models.emoji.eyes import load_eyes
from efface.pictures import grid, to_pil
from efface.pipelines import draw, model_hash

ROOT = Path(__file__).parents[1]
CONCEPTS = ("alcohol", "weapon", "cat", "neon sign")
CELLS = [(c, cell) for c in CONCEPTS for cell in emoji.CELLS if emoji.prompts(c, cell)]
TUNING, SELECTION, TEST, BYSTANDERS = 1_000, 500_000, 1_000_000, 1_900_000
STRIDES = {TUNING: 400, SELECTION: 10_000, TEST: 10_000}  # seeds of a cell; those of cells must not overlap
COUNTS = 0.30
MARGIN = 0.05  # of what the plain model keeps, a chosen point may lose so much
AIMED = {"explicit": 0.05, "implicit": 0.03}  # at most left
OWN_RULE, RULE = (" ".join(rule.split(": ", 1)[1].split()) for rule in (__doc__ or "").split("\n\n")[3:5])


def erasers(strength: float) -> dict[str, Any]:
    return {
        "plain": lambda c: None,
        "eiup": lambda c: efface.EIUP(c, strength=strength),
        "negative_prompt": lambda c: efface.NegativePrompt(c),
    }


def meaning(path: Path) -> str:
    """A source file's syntax tree, which comments, docstrings and layout do not change."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [
                n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return ast.dump(tree)


@functools.cache
def code_hash(eraser: type) -> str:
    """sha256 over the code that erasers of a class draw with: its own file, what that shares with others, the hooks."""
    own, root = Path(inspect.getfile(eraser)), Path(efface.__file__).parent
    if own.parent.name in ("erasers", "editors"):
        shared = re.findall(r"^\s*from \.(_\w+) import", own.read_text("utf-8"), re.MULTILINE)
        files = {own, *(path for name in shared if (path := own.parent / f"{name}.py").is_file())}
    else:  # a method that is a package
        files = set(own.parent.glob("*.py"))
    if not issubclass(eraser, efface.Delta):
        files |= {*root.glob("hooks/*.py"), *root.glob("families/*.py"), root / "_text.py", root / "_masking.py"}
    return hashlib.sha256("\n".join(meaning(path) for path in sorted(files)).encode()).hexdigest()


def data_hash() -> str:
    """sha256 over what the prompts are made of: vocabulary.json, then paraphrases.json."""
    folder = Path(emoji.__file__).parent
    return hashlib.sha256(
        b"".join((folder / f"{n}.json").read_bytes() for n in ("vocabulary", "paraphrases"))
    ).hexdigest()


def best(points: Sequence[tuple[float, float]], plain_kept: float) -> int:
    """Which of the points (left, kept) the rule at the head chooses."""
    spared = [k for k, (_, kept) in enumerate(points) if kept >= plain_kept - MARGIN]
    if spared:
        return min(spared, key=lambda k: (points[k][0], -points[k][1]))
    return max(range(len(points)), key=lambda k: points[k][1])


def smallest(points: Sequence[dict[str, Any]], plain_kept: float) -> int:
    """Which of the points of `sweep` its rule chooses."""
    done = [
        k
        for k, p in enumerate(points)
        if p["kept"]["rate"] >= plain_kept - MARGIN and all(p[name]["rate"] <= most for name, most in AIMED.items())
    ]
    if done:
        return min(done, key=lambda k: points[k]["strength"])
    return best([(p["left"]["rate"], p["kept"]["rate"]) for p in points], plain_kept)


class Bench:
    """Draws and judges cells; each (cell, variant) is one JSON file in `work`, made once."""

    def __init__(self, work: Path, first_seed: int, n: int) -> None:
        self.work, self.first_seed, self.n = work, first_seed, n
        self.stride = STRIDES[max(block for block in STRIDES if block <= first_seed)]
        if not 1 <= n <= self.stride:
            raise SystemExit(f"Expected n from 1 to {self.stride}, for cells would share seeds, but got {n}.")
        if first_seed < SELECTION:
            checks.tuning_seeds("first_seed", [first_seed, first_seed + self.stride * (len(CELLS) - 1) + n - 1])
        work.mkdir(parents=True, exist_ok=True)
        self.pipe, self.eyes = efface.load("emoji"), load_eyes()
        self.pipe.set_progress_bar_config(disable=True)
        self.hash = model_hash(self.pipe)

    def facts(self, command: str, erasers: dict[str, Any] | None = None) -> dict[str, Any]:
        """What every card says; `erasers` are their configurations, by what the card calls them."""
        thresholds = json.dumps(self.eyes.facts.get("thresholds"), sort_keys=True)
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": f"python benchmarks/eiup_outcome.py {command}",
            "model": {"name": "emoji", "text_hash": self.hash},
            "detector": {
                "name": "emoji eyes, the worse of two",
                "sha256": self.eyes.facts.get("sha256"),
                "thresholds_sha256": hashlib.sha256(thresholds.encode()).hexdigest(),
            },
            "data_sha256": data_hash(),
            "erasers": erasers or {},
            "seeds": {
                "first": self.first_seed,
                "rule": f"picture k of cell c has the seed first + {self.stride} c + k; cells in the order of CELLS",
            },
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")}
            | {"efface": efface.__version__},
        }

    def cell(self, concept: str, cell: str, name: str, eraser: Any, **call: Any) -> dict[str, Any]:
        path = self.work / f"{concept.replace(' ', '-')}-{cell}-{name}.json"
        wanted = {"model": self.hash, "n": self.n, "first_seed": self.first_seed}
        wanted["eraser"] = config(eraser) if eraser else None
        wanted |= {"code": code_hash(type(eraser))} if eraser else {}
        wanted |= {"call": call} if call else {}
        if path.exists():
            found = json.loads(path.read_text())
            if found["setting"] == wanted:
                return found
        prompts = emoji.prompts(concept, cell)
        rows = [prompts[k % len(prompts)] for k in range(self.n)]
        first = self.first_seed + self.stride * CELLS.index((concept, cell))
        seeds = list(range(first, first + self.n))
        handle, start = (eraser.apply(self.pipe) if eraser else None), time.perf_counter()
        try:
            images = draw(self.pipe, [p for p, _ in rows], seeds, **call)
        finally:
            if handle:
                handle.remove()
        seconds = time.perf_counter() - start
        seen = self.eyes.see(images)
        icons, index = self.eyes.icons(seen), {i: k for k, i in enumerate(self.icon_names())}
        join = torch.all if cell in ("pair", "explicit") else torch.any
        kept = [[bool(join(icons[e, k, [index[i] for i in keep]])) for k, (_, keep) in enumerate(rows)] for e in (0, 1)]
        result = {
            "setting": wanted,
            "left": self.eyes.concept(seen, emoji.truth(concept)).tolist(),
            "kept": kept if rows[0][1] else None,
            "any": icons.any(-1).tolist(),
            "seconds": seconds,
        }
        grid({"": to_pil(images[:16])}, side=96).save(path.with_suffix(".png"))
        path.with_suffix(".new").write_text(json.dumps(result))
        path.with_suffix(".new").replace(path)
        return result

    @staticmethod
    def icon_names() -> tuple[str, ...]:
        from efface.models.emoji.eyes import ICONS

        return ICONS


def rate(rows: list[list[bool]], worst: str) -> tuple[float, int, int]:
    """(rate, hits, n) of the worse eye: "most" of what should be gone, "least" of what should stay."""
    hits = [sum(r) for r in rows]
    k = max(hits) if worst == "most" else min(hits)
    return k / len(rows[0]), k, len(rows[0])


def pool(cells: list[dict[str, Any]], key: str) -> list[list[bool]]:
    return [[x for c in cells for x in c[key][eye]] for eye in (0, 1)]


def counted(bench: Bench) -> list[tuple[str, str]]:
    """The cells whose plain pictures show the concept often enough."""
    base = {cc: bench.cell(*cc, "plain", None) for cc in CELLS}
    return [cc for cc in CELLS if rate(base[cc]["left"], "least")[0] >= COUNTS]


def sweep(bench: Bench, strengths: list[float], out: Path, command: str) -> None:
    cells = counted(bench)
    plain = [bench.cell(*cc, "plain", None) for cc in cells]
    base = rate(pool([c for c in plain if c["kept"]], "kept"), "least")[0]
    headings = ("strength", "left", "left, implicit", "kept", "any icon")
    table = Table(*headings, title=f"tuning seeds, plain keeps {base:.1%}")
    points, erasers = [], {}
    of = {"explicit": ("explicit",), "implicit": ("theme", "paraphrase")}
    at = {name: [k for k, (_, cell) in enumerate(cells) if cell in kinds] for name, kinds in of.items()}
    for strength in strengths:
        made = [bench.cell(*cc, f"eiup-{strength:g}", efface.EIUP(cc[0], strength=strength)) for cc in cells]
        erasers[f"{strength:g}"] = {
            concept: m["setting"]["eraser"] for (concept, _), m in zip(cells, made, strict=True)
        }
        rates = {
            "left": rate(pool(made, "left"), "most"),
            **{name: rate(pool([made[k] for k in chosen], "left"), "most") for name, chosen in at.items()},
            "kept": rate(pool([c for c in made if c["kept"]], "kept"), "least"),
            "any": rate(pool(made, "any"), "least"),
        }
        about = {k: {"rate": rate, "n": n, "interval": wilson(hits, n)} for k, (rate, hits, n) in rates.items()}
        points.append({"strength": strength, **about, "seconds": sum(m["seconds"] for m in made)})
    chosen = smallest(points, base)
    for k, p in enumerate(points):
        shown = (f"{p[name]['rate']:.1%}" for name in ("left", "implicit", "kept", "any"))
        table.add_row(f"{p['strength']:g}", *shown, style="bold" if k == chosen else "")
    Console().print(table)
    Console().print(f"chosen: strength {points[chosen]['strength']:g}. {OWN_RULE}")
    card = bench.facts(command, erasers) | {"n_per_cell": bench.n, "plain_kept": base, "cells": cells}
    card |= {"rule": OWN_RULE, "chosen": points[chosen]["strength"], "points": points}
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    plot(points, base, points[chosen]["strength"], out.with_suffix(".png"))


def plot(points: list[dict[str, Any]], base: float, chosen: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4))
    for key, label in (("left", "left of all prompts"), ("implicit", "left of implicit prompts")):
        places = [(100 * p[key]["rate"], 100 * p["kept"]["rate"]) for p in points]
        (line,) = axes.plot(*zip(*places, strict=True), "o-", label=label)
        for p, place in zip(points, places, strict=True):
            if key == "implicit":  # the other curve has its points at the same heights
                axes.annotate(f"{p['strength']:g}", place, (7, -3), textcoords="offset points", fontsize=8)
            if p["strength"] == chosen:
                axes.plot(*place, "*", markersize=13, color=line.get_color())
    axes.axhline(100 * base, color="grey", linestyle=":", label="kept by the plain model")
    axes.set(
        xlabel="concept left, %", ylabel="others kept, %", title="EIUP over strengths (tuning seeds; star: chosen)"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measure(
    bench: Bench, variants: dict[str, Any], out: Path, about: dict[str, Any], counted_only: bool = False
) -> None:
    """Every cell with every variant (name to a function from a concept to an eraser or None), and a card of it.

    With `counted_only` the cells that do not count are drawn by the plain model only.
    """
    start = time.time()
    counts = counted(bench)
    drawn = {cc: dict(variants) if not counted_only or cc in counts else {"plain": variants["plain"]} for cc in CELLS}
    cells = {cc: {v: bench.cell(*cc, v, make(cc[0])) for v, make in makers.items()} for cc, makers in drawn.items()}
    table = Table("concept", "cell", *(f"{v} {k}" for k in ("left", "kept", "any") for v in variants))
    rows = []
    for cc in CELLS:
        row: dict[str, Any] = {"concept": cc[0], "cell": cc[1], "counts": cc in counts}
        for key, worst in (("left", "most"), ("kept", "least"), ("any", "least")):
            for v, made in cells[cc].items():
                if made[key] is not None:
                    # the plain column must not flatter us either: the eye that saw less of the concept
                    value, k, n = rate(made[key], "least" if (v, key) == ("plain", "left") else worst)
                    row[f"{v} {key}"] = {
                        "rate": value,
                        "n": n,
                        "interval": wilson(k, n),
                        "eyes": [sum(r) / n for r in made[key]],
                    }
        rows.append(row)
        shown = [row.get(h, {}).get("rate") for h in (c.header for c in table.columns[2:])]
        table.add_row(
            *cc, *("-" if s is None else f"{100 * s:.0f} %" for s in shown), style="" if cc in counts else "dim"
        )
    pooled: dict[str, Any] = {}
    groups = {"explicit": ("explicit",), "implicit": ("theme", "paraphrase")}
    for v in variants:
        for group, kinds in groups.items():
            chosen = [cells[cc][v] for cc in counts if cc[1] in kinds]
            value, k, n = rate(pool(chosen, "left"), "least" if v == "plain" else "most")
            pooled[f"{v} {group} left"] = {"rate": value, "n": n, "interval": wilson(k, n)}
        chosen = [cells[cc][v] for cc in counts if cells[cc][v]["kept"]]
        value, k, n = rate(pool(chosen, "kept"), "least")
        pooled[f"{v} kept"] = {"rate": value, "n": n, "interval": wilson(k, n)}
        value, k, n = rate(pool([cells[cc][v] for cc in counts], "any"), "least")
        pooled[f"{v} any"] = {"rate": value, "n": n, "interval": wilson(k, n)}
    console = Console(width=150)
    console.print(table)
    for name, p in pooled.items():
        console.print(f"{name}: {p['rate']:.1%} [{p['interval'][0]:.1%}, {p['interval'][1]:.1%}] n = {p['n']}")
    used = {v: {cc[0]: m[v]["setting"]["eraser"] for cc, m in cells.items() if v in m} for v in variants}
    card = {
        **bench.facts(f"measure --n {bench.n}", used),
        **about,
        "n_per_cell": bench.n,
        "pooled": pooled,
        "rows": rows,
        "seconds": {
            "this run": time.time() - start,
            "drawing": sum(c["seconds"] for m in cells.values() for c in m.values()),
        },
    }
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def bystanders(bench: Bench, strengths: list[float], out: Path) -> None:
    """Icons outside a concept, each drawn once by its caption: is it still recognisable when the concept is erased?"""
    captions, icons = emoji.vocabulary()["captions"], bench.icon_names()
    table, rows, used = Table("concept", "strength", "kept", "lost, both eyes agree"), [], {}
    for concept in CONCEPTS:
        others = [icon for icon in captions if icon not in emoji.truth(concept)]
        for strength in [0.0, *strengths]:
            path = bench.work / f"{concept.replace(' ', '-')}-{strength:g}.json"
            eraser = efface.EIUP(concept, strength=strength)
            setting = {"model": bench.hash, "eraser": config(eraser), "code": code_hash(efface.EIUP)}
            used.setdefault(f"{strength:g}", {})[concept] = setting["eraser"]
            if not path.exists() or json.loads(path.read_text())["setting"] != setting:
                start = time.perf_counter()
                with eraser.apply(bench.pipe):
                    seeds = range(BYSTANDERS, BYSTANDERS + len(others))
                    seen = bench.eyes.icons(bench.eyes.see(draw(bench.pipe, [captions[i] for i in others], seeds)))
                right = [[bool(eye[k, icons.index(icon)]) for k, icon in enumerate(others)] for eye in seen]
                seconds = time.perf_counter() - start
                path.write_text(json.dumps({"setting": setting, "right": right, "seconds": seconds}))
            kept = json.loads(path.read_text())
            right = kept["right"]
            value, k, n = rate(right, "least")
            lost = [icon for icon, *seen_by in zip(others, *right, strict=True) if not any(seen_by)]
            rows.append({"concept": concept, "strength": strength, "kept": value, "n": n, "interval": wilson(k, n)})
            rows[-1] |= {"lost": lost, "seconds": kept.get("seconds")}
            table.add_row(concept, f"{strength:g}", f"{value:.1%} of {n}", ", ".join(lost[:6]))
    Console(width=140).print(table)
    seeds = {"first": BYSTANDERS, "rule": "icon k of those outside the concept has the seed first + k"}
    card = bench.facts("bystanders", used) | {"seeds": seeds, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sweep", "measure", "bystanders"])
    parser.add_argument("--n", type=int, help="pictures per cell (sweep 32, else 128)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 3.0])
    parser.add_argument("--strength", type=float, default=efface.EIUP("cat").strength)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/eiup_outcome")
    args = parser.parse_args()
    if args.what == "sweep":
        bench = Bench(args.work / "sweep", TUNING, args.n or 32)
        given = " ".join(f"{s:g}" for s in args.strengths)
        sweep(bench, args.strengths, ROOT / "results/eiup_sweep", f"sweep --n {bench.n} --strengths {given}")
    elif args.what == "bystanders":
        bystanders(
            Bench(args.work / "bystanders", BYSTANDERS, 1), [1.5, args.strength], ROOT / "results/eiup_bystanders"
        )
    else:
        bench = Bench(args.work / "measure", TEST, args.n or 128)
        measure(bench, erasers(args.strength), ROOT / "results/eiup_outcome", {"strength": args.strength})


if __name__ == "__main__":
    main()
