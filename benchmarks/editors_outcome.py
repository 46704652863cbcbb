"""Do closed-form editors erase on the `emoji` model, and what else survives? Cells and judges of eiup_outcome.py.

    python benchmarks/editors_outcome.py tokens     # tuning seeds: left versus kept over `tokens` and `lam`
    python benchmarks/editors_outcome.py measure    # test seeds: plain, UCE, RECE, EIUP; writes results/

A delta is fitted once for each concept and variant, on the shipped concept or the word itself, with the empty anchor.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from eiup_outcome import ROOT, TEST, TUNING, Bench, counted, measure, pool, rate
from rich.console import Console
from rich.table import Table

import efface
from efface.core import config

VARIANTS: dict[str, Any] = {"uce": efface.UCE(), "rece": efface.RECE(rounds=1)}


def fitting(bench: Bench, editor: Any) -> Callable[[str], efface.Delta]:
    """From a concept's name to the editor's delta, fitted once."""
    return functools.cache(lambda name: editor.fit(bench.pipe, efface.concepts().get(name, efface.Concept(name))))


def tokens(bench: Bench, ridges: list[float], out: Path) -> None:
    cells = counted(bench)
    plain = rate(pool([c for cc in cells if (c := bench.cell(*cc, "plain", None))["kept"]], "kept"), "least")[0]
    table = Table("tokens", "lam", "left", "kept", "any icon", title=f"tuning seeds, plain keeps {plain:.1%}")
    points = []
    for which, lam in product(("last", "tail", "all"), ridges):
        delta = fitting(bench, efface.UCE(tokens=which, lam=lam))
        made = [bench.cell(*cc, f"uce-{which}-{lam:g}", delta(cc[0])) for cc in cells]
        left = rate(pool(made, "left"), "most")
        kept = rate(pool([c for c in made if c["kept"]], "kept"), "least")
        anything = rate(pool(made, "any"), "least")
        points.append({"tokens": which, "lam": lam, "left": left[0], "kept": kept[0], "any": anything[0], "n": left[2]})
        table.add_row(which, f"{lam:g}", f"{left[0]:.1%}", f"{kept[0]:.1%}", f"{anything[0]:.1%}")
    Console().print(table)
    card = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "model": bench.hash, "plain_kept": plain}
    out.with_suffix(".json").write_text(json.dumps(card | {"cells": cells, "points": points}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "measure"])
    parser.add_argument("--n", type=int, help="pictures per cell (tokens 32, measure 128)")
    parser.add_argument("--lam", type=float, nargs="+", default=[0.05, 0.5, 5.0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/editors_outcome")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the card")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "tokens":
        tokens(Bench(args.work / "tokens", TUNING, args.n or 32), args.lam, args.out / "editors_tokens")
        return
    bench = Bench(args.work / "measure", TEST, args.n or 128)
    erasers: dict[str, Any] = {"plain": lambda concept: None}
    erasers |= {name: fitting(bench, editor) for name, editor in VARIANTS.items()}
    erasers["eiup"] = efface.EIUP
    about = {
        "command": f"python benchmarks/editors_outcome.py measure --n {bench.n}",
        "editors": {name: config(editor) for name, editor in VARIANTS.items()},
    }
    measure(bench, erasers, args.out / "editors_outcome", about)


if __name__ == "__main__":
    main()
