"""Do the weight editors erase on the `emoji` model, and what else survives? Cells and judges of eiup_outcome.py.

    python benchmarks/editors_outcome.py tune          # tuning seeds: left versus kept of UCE and RECE over settings
    python benchmarks/editors_outcome.py tune-trained  # the same of SDD, ESD and CCRT, on two concepts
    python benchmarks/editors_outcome.py biases        # selection seeds: what ESD and SDD lose without biases
    python benchmarks/editors_outcome.py measure       # test seeds: plain, UCE, RECE, ESD, SDD, CCRT; writes results/

A delta is fitted once for each concept and variant, on the shipped concept or the word itself, with the empty anchor,
and kept in `--work`, with the checkpoints of unfinished fits: the same command goes on where it was interrupted.
`measure --methods esd,sdd` draws these only and writes no card, so that several processes can share the work; the
command without it then makes the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from eiup_outcome import CELLS, CONCEPTS, COUNTS, ROOT, SELECTION, TEST, TUNING, Bench, counted, measure, pool, rate
from rich.console import Console
from rich.table import Table

import efface
from efface.core import config
from efface.editors._training import Training
from efface.intervals import wilson

VARIANTS: dict[str, Any] = {
    "uce": efface.UCE(),
    "rece": efface.RECE(),
    "esd": efface.ESD(),
    "sdd": efface.SDD(),
    "ccrt": efface.CCRT(),
}
GRID: list[Any] = [
    *(efface.UCE(tokens=tokens, lam=lam) for tokens, lam in (("last", 0.5), ("tail", 0.5), ("all", 0.5))),
    *(efface.UCE(lam=lam) for lam in (5.0, 50.0, 100.0)),
    efface.RECE(rounds=1, mu=0.1, lam=0.1),
    *(efface.RECE(rounds=1, mu=mu, lam=lam) for mu, lam in ((1.0, 0.1), (1.0, 100.0), (10.0, 0.1), (10.0, 10.0))),
    *(efface.RECE(rounds=1, mu=mu, lam=lam) for mu, lam in ((10.0, 100.0), (100.0, 1.0), (100.0, 10.0))),
    efface.RECE(rounds=1, mu=10.0, lam=10.0, preserve_scale=10.0),
]


TRAINED: list[Any] = [
    *(efface.SDD(prompt_roles=roles, lr=lr) for lr in (2e-4, 1e-3) for roles in ("code", "readme")),
    efface.SDD(prompt_roles="code", lr=3e-3),
    *(efface.ESD(eta=eta, lr=lr) for eta, lr in ((0.5, 2e-4), (1.0, 1e-4), (0.5, 1e-4), (0.0, 1e-4), (1.0, 5e-5))),
    *(efface.CCRT(eta=eta, lr=lr) for eta, lr in ((1.0, 1e-4), (0.5, 2e-4))),
]
TUNED = ("alcohol", "cat")


def named(concept: str) -> efface.Concept:
    """The shipped concept of that name, or the word itself."""
    return efface.concepts().get(concept, efface.Concept(concept))


def resolved(editor: Any, pipe: Any) -> Any:
    """The editor with the values of the pipeline's family."""
    return editor.resolved(pipe) if hasattr(editor, "resolved") else editor


def stem(name: str, editor: Any, pipe: Any, concept: efface.Concept) -> str:
    """A file's name for what the editor fits: another one for other settings or phrases."""
    settled = json.dumps([config(resolved(editor, pipe)), config(concept)], sort_keys=True)
    return f"{concept.name.replace(' ', '-')}-{name}-{hashlib.sha256(settled.encode()).hexdigest()[:8]}"


class Fits:
    """From a concept's name to the editor's delta, fitted once, and kept with the seconds it took."""

    def __init__(self, bench: Bench, name: str, editor: Any) -> None:
        self.bench, self.name, self.editor = bench, name, editor

    def file(self, concept: str) -> Path:
        found = stem(self.name, self.editor, self.bench.pipe, named(concept))
        return self.bench.work / "deltas" / f"{found}.safetensors"

    def __call__(self, concept: str) -> efface.Delta:
        file = self.file(concept)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            options = {"checkpoint": file.with_suffix("")} if isinstance(self.editor, Training) else {}
            began = time.perf_counter()
            delta = self.editor.fit(self.bench.pipe, named(concept), **options)
            note = {"seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
            delta.save(file)
            file.with_suffix(".json").write_text(json.dumps(note | {"bytes": file.stat().st_size}) + "\n")
        return efface.Delta.load(file)

    def cost(self) -> dict[str, Any]:
        """Seconds and bytes of every concept's fit."""
        return {concept: json.loads(self.file(concept).with_suffix(".json").read_text()) for concept in CONCEPTS}


def tune(bench: Bench, grid: Sequence[Any], concepts: Sequence[str], what: str, out: Path) -> None:
    cells = [cc for cc in counted(bench) if cc[0] in concepts]
    plain = rate(pool([c for cc in cells if (c := bench.cell(*cc, "plain", None))["kept"]], "kept"), "least")[0]
    table = Table("editor", "left", "kept", "any icon", title=f"tuning seeds, plain keeps {plain:.1%}")
    points = []
    for editor in grid:
        fields = config(editor)
        method, default = fields["method"], config(type(editor)())
        shown = {name: value for name, value in fields.items() if value != default[name]}
        name = "-".join([method, *(f"{name}-{value}" for name, value in shown.items())])
        fit = Fits(bench, name, editor)
        made = [bench.cell(*cc, name, fit(cc[0])) for cc in cells]
        found = {
            "left": rate(pool(made, "left"), "most"),
            "kept": rate(pool([c for c in made if c["kept"]], "kept"), "least"),
            "any": rate(pool(made, "any"), "least"),
        }
        points.append({"method": method, **shown, **{k: v[0] for k, v in found.items()}, "n": found["left"][2]})
        table.add_row(name, *(f"{v[0]:.1%}" for v in found.values()))
        Console().print(name, *(f"{k} {v[0]:.1%}" for k, v in found.items()))
    Console().print(table)
    card = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "model": bench.hash, "plain_kept": plain}
    card["command"] = f"python benchmarks/editors_outcome.py {what} --n {bench.n}"
    out.with_suffix(".json").write_text(json.dumps(card | {"cells": cells, "points": points}, indent=1) + "\n")


def biases(bench: Bench, out: Path) -> None:
    """ESD and SDD with biases and without, on the concepts and cells of `tune-trained` that the plain model draws."""
    plain = {cc: bench.cell(*cc, "plain", None) for cc in CELLS if cc[0] in TUNED}
    cells = [cc for cc, made in plain.items() if rate(made["left"], "least")[0] >= COUNTS]
    editors = {
        f"{name}, {'with' if also else 'without'} biases": cls(biases=also)
        for name, cls in (("esd", efface.ESD), ("sdd", efface.SDD))
        for also in (True, False)
    }
    made = {"plain": [plain[cc] for cc in cells]}
    for name, editor in editors.items():
        stem = name.replace(", ", "-").replace(" ", "-")
        fit = Fits(bench, stem, editor)
        made[name] = [bench.cell(*cc, stem, fit(cc[0])) for cc in cells]
    found: dict[str, Any] = {}
    for name, some in made.items():
        of = {
            "explicit left": [c for cc, c in zip(cells, some, strict=True) if cc[1] == "explicit"],
            "implicit left": [c for cc, c in zip(cells, some, strict=True) if cc[1] in ("theme", "paraphrase")],
            "kept": [c for c in some if c["kept"]],
        }
        for what, chosen in of.items():
            value, hits, n = rate(pool(chosen, what.split()[-1]), "most" if "left" in what else "least")
            low, high = wilson(hits, n)
            found[f"{name}: {what}"] = {"rate": value, "n": n, "interval": [low, high]}
            Console().print(f"{name}: {what} {value:.1%} [{low:.1%}, {high:.1%}], n = {n}")
    card = bench.facts("", {name: config(resolved(editor, bench.pipe)) for name, editor in editors.items()})
    card["command"] = f"python benchmarks/editors_outcome.py biases --n {bench.n}"
    out.with_suffix(".json").write_text(json.dumps(card | {"cells": cells, "found": found}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "tune-trained", "biases", "measure"])
    parser.add_argument("--n", type=int, help="pictures per cell (tune 8, tune-trained 16, biases 32, measure 128)")
    parser.add_argument("--methods", help="measure: fit and draw these only, and write no card")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/editors_outcome")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the card")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "tune":
        tune(Bench(args.work / "tune", TUNING, args.n or 8), GRID, CONCEPTS, args.what, args.out / "editors_tuning")
        return
    if args.what == "tune-trained":
        bench = Bench(args.work / args.what, TUNING, args.n or 16)
        tune(bench, TRAINED, TUNED, args.what, args.out / "editors_tuning_trained")
        return
    if args.what == "biases":
        biases(Bench(args.work / args.what, SELECTION, args.n or 32), args.out / "editors_biases")
        return
    bench = Bench(args.work / "measure", TEST, args.n or 128)
    fits = {name: Fits(bench, name, editor) for name, editor in VARIANTS.items()}
    variants: dict[str, Any] = {"plain": lambda concept: None, **fits}
    if args.methods:
        chosen = args.methods.split(",")
        if unknown := set(chosen) - variants.keys():
            parser.error(f"unknown methods {', '.join(sorted(unknown))}: give some of {', '.join(variants)}")
        for name in chosen:
            for concept in CONCEPTS:
                variants[name](concept)
        for name in chosen:
            for concept, cell in counted(bench):
                bench.cell(concept, cell, name, variants[name](concept))
                Console().print(f"{name}: {concept}, {cell}")
        return
    about = {
        "command": f"python benchmarks/editors_outcome.py measure --n {bench.n}",
        "editors": {name: config(resolved(editor, bench.pipe)) for name, editor in VARIANTS.items()},
        "fits": {name: fit.cost() for name, fit in fits.items()},
    }
    measure(bench, variants, args.out / "editors_outcome", about, counted_only=True)


if __name__ == "__main__":
    main()
