"""Every method on the same rows: runs all erasers and editors over the `emoji` suite, and writes table and figure.

python benchmarks/leaderboard.py                # all, then docs/leaderboard.* and results/leaderboard.json
python benchmarks/leaderboard.py --limit 12     # a trial: the same, but written into --out only
python benchmarks/leaderboard.py --methods uce,esd  # a share of the work, for one of several processes; into --out only
python benchmarks/leaderboard.py --update eiup  # these and the plain model anew, the rest from the card

Each method erases one concept at a time, as it comes, without tuning: erasers by their defaults, editors by what they
fit with seed 0. The scores are those of the suite, over the rows of all concepts together. Stop it whenever you like:
the same command continues. A method that cannot work on `emoji` is listed with its reason.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fill_docs
from editors_outcome import stem

import efface
from efface import api, pipelines, registry
from efface.report import number, pareto, span
from efface.runs import Run, run

ROOT = Path(__file__).parents[1]
CONCEPTS = ("alcohol", "weapon", "smoking")
COLUMNS = {
    "removal.absolute": "removed",
    "retention": "kept",
    "retention/dual": "kept, concept in the prompt",
    "kid_eye": "KID to the plain model",
    "detection.any_icon": "anything recognisable",
}


def erasers(name: str, room: str, pipe: Any, concept: efface.Concept, folder: Path) -> Any:
    """What erases `concept` by a method; an editor's delta is fitted once."""
    if room == "erasers":
        return api.build(name, concept)
    editor = api.editor(name)
    file = folder / f"{stem(name, editor, pipe, concept)}.safetensors"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        editor.fit(pipe, [concept], seed=0).save(file)
    return api.load_delta(file)


def scores(runs: Sequence[Run], metrics: Sequence[Any], plain: bool = False) -> list[efface.Score]:
    """The suite's scores over the rows of several runs; of their plain pictures if `plain`."""
    base = [s for each in runs for s in (each.base or each).samples()]
    samples = base if plain else [s for each in runs for s in each.samples()]
    return [score for metric in metrics for score in metric(samples, base)]


def seconds(runs: Sequence[Run]) -> float:
    """Drawing time per picture."""
    times = [e["seconds"] for each in runs for e in each.entries()]
    return sum(times) / len(times)


def row(label: str, found: Sequence[efface.Score], each: float) -> dict[str, Any]:
    shown = {}
    for s in found:
        if s.metric in COLUMNS:
            values = {
                k: None if math.isnan(v) else v for k, v in (("value", s.value), ("low", s.low), ("high", s.high))
            }
            shown[s.metric] = values | {"n": s.n, "unit": s.unit, "protocol": s.protocol}
    return {"method": label, "scores": shown, "seconds_per_picture": each}


def measure(concepts: Sequence[str], limit: int | None, out: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Draws what is not drawn yet, and returns the card; of the methods `only`, or of all."""
    pipe = efface.load("emoji")
    suites = {name: efface.make_suite("emoji", name, limit=limit) for name in concepts}
    metrics = next(iter(suites.values())).metrics
    rows, refused, plain = [], {}, None

    def told(what: str, done: int, total: int) -> None:
        print(f"\r{label}: {concept}, {what} {done}/{total}    ", end="", file=sys.stderr, flush=True)

    methods = registry.methods("erasers") | registry.methods("editors")
    if strangers := set(only) - set(methods):
        raise SystemExit(f"Unknown methods {', '.join(sorted(strangers))}: there is {', '.join(methods)}.")
    methods = {name: room for name, room in methods.items() if name in only or not only}
    for label, room in methods.items():
        try:
            made = {c: erasers(label, room, pipe, efface.concept(c), out / "deltas") for c in suites}
            for eraser in made.values():
                api.stack(pipe, eraser).remove()
        except (ValueError, TypeError) as error:
            refused[label] = str(error)
            continue
        runs = []
        for concept, suite in suites.items():
            folder, base = out / f"{label}-{concept}", out / f"plain-{concept}"
            runs.append(run(suite, "emoji", eraser=made[concept], out=folder, base=base, progress=told))
        print(file=sys.stderr)
        if plain is None:
            plain = row("plain model", scores(runs, metrics, plain=True), seconds([r.base for r in runs if r.base]))
        rows.append(row(label, scores(runs, metrics), seconds(runs)))
    if plain is None:
        raise SystemExit(f"No method works on emoji: {refused}")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benchmarks/leaderboard.py", *sys.argv[1:]]),
        "concepts": list(concepts),
        "n": sum(len(s.rows) for s in suites.values()),
        "suite": next(iter(suites.values())).version,
        "data_hash": {name: s.data_hash for name, s in suites.items()},
        "model": {"name": "emoji", "text_hash": pipelines.model_hash(pipe)},
        "rows": [plain, *rows],
        "refused": refused,
    }


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old card with the rows of the new one; SystemExit if the two must not be compared."""
    for key in ("concepts", "n", "suite", "data_hash", "model"):
        if old[key] != new[key]:
            raise SystemExit(f"The card was made with {key} {old[key]}, now it is {new[key]}: measure all anew.")
    if old["rows"][0]["scores"] != new["rows"][0]["scores"]:
        raise SystemExit("The plain model's scores are not those of the card: measure all anew.")
    drawn = {row["method"]: row | {"date": new["date"], "command": new["command"]} for row in new["rows"][1:]}
    rows = [drawn.pop(row["method"], row) for row in old["rows"]]
    return old | {"rows": [*rows, *drawn.values()]}


def score(entry: dict[str, Any], name: str) -> efface.Score | None:
    """A score of a card's row."""
    found = entry["scores"].get(name)
    if found is None:
        return None
    low, high, value = (math.nan if found[k] is None else found[k] for k in ("low", "high", "value"))
    return efface.Score(name, value, found["n"], low, high, found["unit"], protocol=found["protocol"])


def table(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    first = card["rows"][0]
    counts = ", ".join(f"{text} {first['scores'][n]['n']}" for n, text in COLUMNS.items() if n in first["scores"])
    protocols = "; ".join(dict.fromkeys(s["protocol"] for s in first["scores"].values()))
    lines = [f"| method | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for entry in card["rows"]:
        found = [score(entry, name) for name in COLUMNS]
        cells = [f"{number(s)} {span(s)}" if s else "-" for s in found]
        name = entry["method"] if entry is first else f"`{entry['method']}`"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    minutes = card["n"] * sum(entry["seconds_per_picture"] for entry in card["rows"]) / 60
    later = [f"`{entry['method']}` {entry['date'][:10]}" for entry in card["rows"] if "date" in entry]
    hashes = ", ".join(f"{name} `{digest[:12]}`" for name, digest in card["data_hash"].items())
    return "\n".join(
        [
            f"Suite `emoji` {card['suite']}, {card['n']} pictures a method, each concept erased on its own: "
            f"{', '.join(card['concepts'])}. Methods with their defaults, "
            "for which no test seed was looked at; 95 % intervals.",
            f"Counted: {counts}. Judged by: {protocols}.",
            f"Measured {card['date'][:10]} by `{card['command']}` ({minutes:.0f} min of drawing)"
            f"{' (with `--update`: ' + ', '.join(later) + ')' if later else ''}; "
            f"model `{card['model']['text_hash'][:12]}`; data {hashes}.",
            "",
            *lines,
            *[f"\n`{name}` does not run on `emoji`: {' '.join(why.split())}" for name, why in card["refused"].items()],
        ]
    )


def figure(card: dict[str, Any]) -> str:
    """Removed against kept, as an SVG in a grey that can be read on white and on black."""
    points = []
    for entry in card["rows"]:
        removed, kept = score(entry, "removal.absolute"), score(entry, "retention")
        if removed and kept:
            points.append((entry["method"], removed, kept))
    return pareto(points, "removal.absolute", "retention").replace("currentColor", "#6e7781")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", default=",".join(CONCEPTS), help="names, separated by commas")
    parser.add_argument("--methods", default="", help="draw only these; docs stay as they are")
    parser.add_argument("--update", default="", help="draw only these; the others stay as the card has them")
    parser.add_argument("--limit", type=int, help="rows a concept; docs stay as they are")
    parser.add_argument("--out", type=Path, default=Path("runs/leaderboard"), help="where the runs go")
    given = parser.parse_args()
    only = [m for m in (given.methods or given.update).split(",") if m]
    card = measure(given.concepts.split(","), given.limit, given.out, only)
    if given.update:
        card = updated(json.loads((ROOT / "results/leaderboard.json").read_text()), card)
    trial = given.limit is not None or bool(given.methods)
    cards, docs = (given.out, given.out) if trial else (ROOT / "results", ROOT / "docs")
    (cards / "leaderboard.json").write_text(json.dumps(card, indent=1) + "\n")
    (docs / "leaderboard.svg").write_text(figure(card))
    if trial:
        print(table(card))
        return
    fill_docs.fill("leaderboard", table(card))


if __name__ == "__main__":
    main()
