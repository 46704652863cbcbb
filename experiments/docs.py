"""Fills README.md and the docs from cards, between their markers.

The block of a card of an earlier runner is kept in `earlier/`, as that runner rendered it, with the hash of its cards:
it goes into the docs while the cards are those. A card of this runner gives a caption and a table.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import judge, tables
from .code import ROOT
from .heat import heat
from .shares import points
from .tables import percent


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown with all columns left, as the pages have it."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, *rows)).replace("\n", f"\n|{'---|' * len(head)}\n", 1)


def card(name: str, root: Path = ROOT) -> Any:
    return json.loads((root / f"results/{name}.json").read_text("utf-8"))


def block(marker: str, root: Path = ROOT) -> str:
    """The text of a block.

    Raises:
        ValueError: a card of an earlier runner is not the one that its block was rendered from.
    """
    note, _, text = (Path(__file__).parent / f"earlier/{marker}.md").read_text("utf-8").partition("\n")
    *names, digest = note.removeprefix("<!-- ").removesuffix(" -->").split()
    found = [(name, card(name, root)) for name in names]
    new = [(name, each) for name, each in found if isinstance(each, dict) and "form" in each]
    if new:
        return "\n\n".join(shown(each, name) for name, each in new)
    content = b"".join((root / f"results/{name}.json").read_bytes() for name in names)
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(
            f"Expected the cards {', '.join(names)} as an earlier runner left them, got others. Restore them from the "
            "repository, or draw the experiment again."
        )
    return text.removesuffix("\n")


def figure(found: Any) -> str:
    """Removed against kept, or attacks against guards, as an SVG that can be read on white and on black."""
    if any("attacked" in row for row in found["rows"]):
        return heat(found)
    import efface
    from efface.report.plot import pareto

    def score(name: str, s: Mapping[str, Any], value: float, low: float, high: float) -> efface.Score:
        return efface.Score(name, value, s["n"], low, high, "share")

    points = []
    for row in found["rows"]:
        left, kept = row["residual"], row["retention"]
        low, high = left["interval"]
        removed = score("removal.absolute", left, 1 - left["rate"], 1 - high, 1 - low)
        points.append((row["row"], removed, score("retention", kept, kept["rate"], *kept["interval"])))
    return pareto(points, "removal.absolute", "retention").replace("currentColor", "#6e7781")


def gates(found: Any) -> str:
    yes = {True: "yes", False: "no", None: ""}
    first = [
        [kind, _interval(s["all"]["worse"]), f"{100 * s['all']['bar']:.0f} %", yes[s["all"]["passed"]]]
        for kind, s in found["a"]["kinds"].items()
    ]
    drawn = [
        [name, _interval(p["worse"]), "" if p.get("bar") is None else f"{100 * p['bar']:.0f} %", yes[p.get("passed")]]
        for name, p in found["c"]["kinds"].items()
    ]
    rates = {f"{job}: male": p for job, p in found["c"]["gender"]["jobs"].items()} | {
        "watermark": found["c"]["watermark"]
    }
    drawn += [
        [name, _interval(p["worse"]), f"{100 * p['trained']:.0f} ± 5 %", yes[p["passed"]]] for name, p in rates.items()
    ]
    return f"""\
Gate A, {found["a"]["n"]} held-out scenes after the autoencoder ({found["a"]["date"]}):

{table(["what", "named", "bar", "passed"], first)}

Gate C, what the model draws ({found["c"]["date"]}):

{table(["what", "rate", "bar", "passed"], drawn)}"""


def _interval(p: Mapping[str, Any]) -> str:
    return percent(p | {"interval": (p["low"], p["high"])})


def families() -> str:
    """Which method works on which family."""
    from efface.families import FAMILIES, matrix

    names, notes, rows = [each.name for each in FAMILIES], [], []
    for (method, form), cells in matrix().items():
        shown = []
        for name in names:
            if (cell := cells[name]) not in ("", "yes"):
                notes += [cell] * (cell not in notes)
                cell = f"yes ({'abcdefgh'[notes.index(cell)]})"
            shown.append(cell or "-")
        rows.append([f"`{method}`{f' with {form}' if form else ''}", *shown])
    under = [f"\n({'abcdefgh'[k]}) with {note} in the call" for k, note in enumerate(notes)]
    return "\n".join([table(["method", *names], rows), *under])


def costs() -> str:
    """What a step and a fit cost, for every method; `experiments/costs.py`."""
    found, lines = card("method_costs"), []
    for row in found["rows"]:
        fit = "-" if "fit" not in row else f"{row['fit']:.2g}{'*' * bool(row['updates'])}"
        lines.append([f"`{row['row']}`", tables.ratio(row["step"]), f"{row['memory']['times']:.2f}", fit])
    head = ["method", "a step, times the base model's", "its memory, times the base model's", "fit, core-seconds"]
    return f"""\
On `emoji`, concept "alcohol" with {found["phrases"]} phrases, in a batch of {found["batch"]}: median (range) of
{found["rounds"]} rounds, measured {found["date"]} by `{found["command"]}` on {found["machine"]},
under a load of {found["load"]} from other work. Times are core-seconds of one thread. A star: extrapolated from
{found["few"][1]} updates to {found["about"]}. Deltas of weights (`uce`, `rece`, `speed`, `mace`, `esd`, `sdd`) add no
arithmetic to a step. Their ratios hold the check of the weights, which a drawing makes seldom, and the error of this
measurement; [what a step costs](#what-a-step-costs) has closer figures. `ccrt`, `geom_erasing` and `hfi` are left
out. Memory is the peak of the tensors that a step makes, weights left out, measured {found["memory"]["date"]} by
`{found["memory"]["command"]}`: methods that edit attention make theirs where the UNet does not need its peak, and those
that predict a further row pay for it. Card in `results/method_costs.json`.

{table(head, lines)}"""


def load() -> str:
    """The service under load; `experiments/load.py`."""
    parts = []
    for name in ("load", "load_deltas", "load_memory"):
        if not (ROOT / f"results/{name}.json").is_file():
            continue
        found = card(name)
        parts += [" ".join(found["verdict"]), tables.of_card(found).removesuffix("\n")]
        made = f"Measured {found['date'][:10]} by `{found['command']}` on {found['machine']}"
        parts.append(f"{made}; card in `results/{name}.json`.")
    return "\n\n".join(parts)


def shown(found: Mapping[str, Any], name: str) -> str:
    """A card's caption and table."""
    return f"{tables.caption(found, name)}\n\n{tables.of_card(found)}".rstrip()


def judged() -> str:
    """Tokens that were learned from judged pictures, beside the best words; `experiments/feedback.py`."""
    found, lines = card("feedback"), []
    for each in found["comparisons"]:
        cells = [f"{100 * each[what][who]:.0f} %" for what in ("left", "kept") for who in ("token", "words")]
        low, high = (100 * bound for bound in each["left"]["interval"])
        gap = f"{100 * each['left']['difference']:+.0f} [{low:.0f}, {high:.0f}]"
        head = f"{each['concept']}, `{each['method']}`"
        lines.append([head, *cells[:2], gap, *cells[2:], each["better"] or "undecided"])
    head = ["", "members left: token", "best words", "difference, points", "other things retained: token", "best words"]
    by = [line for line in found["verdict"] if "by what the token was learned from" in line]
    caption = tables.caption({**found, "verdict": by}, "feedback")
    return f"{caption}\n\n{table([*head, 'better'], lines)}"


def implicit(root: Path = ROOT) -> str:
    """Geom-Erasing's card; `experiments/geom_erasing.py`."""
    if not (root / "results/geom_erasing.json").is_file():
        return "Without a card so far: `python -m experiments geom_erasing`."
    return shown(card("geom_erasing", root), "geom_erasing")


def many(root: Path = ROOT) -> str:
    """One, ten and a hundred concepts; `experiments/many.py`."""
    if not (root / "results/many_concepts.json").is_file():
        return "Without a card so far: `python -m experiments many_concepts`."
    return shown(card("many_concepts", root), "many_concepts")


ADAPTERS = ("gie_adapter", "gie_adapter-emoji-128")


def adapters(root: Path = ROOT) -> str:
    """GIE's adapter against fixed strengths, on each model; `experiments/adapters.py`."""
    parts, missing = [], []
    for name in ADAPTERS:
        found = card(name, root) if (root / f"results/{name}.json").is_file() else {}
        if "form" in found:
            parts.append(shown(found, name))
        else:
            experiment, _, model = name.partition("-")
            missing.append(f"`python -m experiments {experiment}{f' --model {model}' if model else ''}`")
    return "\n\n".join([*parts, *([f"Without a card so far: {', '.join(missing)}."] if missing else [])])


ATTACKS = ("attacks", "gradient_attacks", "peer_attacks")


def attacks(root: Path = ROOT) -> str:
    """The cards of attacks that there are; `experiments/redteam.py`."""
    found = {name: card(name, root) for name in ATTACKS if (root / f"results/{name}.json").is_file()}
    parts = [shown(each, name) for name, each in found.items()]
    missing = [f"`python -m experiments {name}`" for name in ATTACKS if name not in found]
    return "\n\n".join([*parts, *([f"Without a card so far: {', '.join(missing)}."] if missing else [])])


IN_SHORT = ("base", "eiup", "eiup swap", "negative_prompt", "sld", "safree", "uce", "rece", "esd", "sdd")
COLUMNS = ("residual explicit", "residual implicit", "retention", "nothing")


def summary() -> str:
    """README's few lines: what people use today, from the leaderboard."""
    found = card("leaderboard")
    rows = {row["row"]: row for row in found["rows"]}
    columns = {name: found["columns"][name] for name in COLUMNS}
    return tables.of_card({"form": 2, "columns": columns, "rows": [rows[name] for name in IN_SHORT]}).rstrip()


def ranking(root: Path = ROOT) -> str:
    """Every row of the leaderboard, with the residual by looking where the labels are of its pictures."""
    found, note = with_labels(card("leaderboard", root), root)
    return f"{tables.caption(found, 'leaderboard')}\n{note}\n{tables.of_card(found)}".rstrip()


def with_labels(found: dict[str, Any], root: Path = ROOT) -> tuple[dict[str, Any], str]:
    """The leaderboard's card with a further column from the card `judge`, and a note on it."""
    if not (root / f"results/{judge.OUT}").is_file():
        return found, ""
    of, mine = card("judge", root), judge.hashes(found)
    rates = {
        row["row"]: row["residual"]["looking"]
        for row in of["rows"]
        if mine.get(row["row"], "") == of["of"]["pictures"][row["row"]] != "" and row.get("residual", {}).get("looking")
    }
    if not rates:
        return found, "The labels are of other pictures, so there is no column of residuals by looking.\n"
    rows = [row | ({"looked": rates[row["row"]]} if row["row"] in rates else {}) for row in found["rows"]]
    columns = {}
    for name, heading in found["columns"].items():
        columns[name] = heading
        if name == "residual":
            columns["looked"] = "residual, all prompts, by looking"
    less = [row["row"] for row in rows if "looked" not in row]
    note = f"By looking: [labels that ship](judging.md#the-labels-that-ship), card in `results/{judge.OUT}`."
    note += f" Not labelled: {', '.join(less)}." if less else ""
    return found | {"rows": rows, "columns": columns}, f"{note}\n"


def labelled(root: Path = ROOT) -> str:
    """What looking says about the detectors; `experiments/judge.py`."""
    if not (root / f"results/{judge.OUT}").is_file():
        return "Without a card so far: `python -m experiments judge`."
    found = card("judge", root)
    made = f"Made {found['date'][:10]} by `{found['command']}`; labels of {found['labels']['date']} in "
    made += f"`{found['labels']['file']}`, card in `results/{judge.OUT}`."
    names = ("misses", "false alarms", "precision", "sensitivity")
    groups = {"all": (found["agreement"], found["pooled"])}
    groups |= {name: (each, found["pooled"]["concepts"][name]) for name, each in found["agreement"]["concepts"].items()}
    lines = []
    for name, (agreed, errors) in groups.items():
        alpha = (
            "-" if agreed["alpha"] is None else "{:.2f} [{:.2f}, {:.2f}]".format(agreed["alpha"], *agreed["interval"])
        )
        lines.append([name, str(errors["labelled"]), alpha, *(judge.sure(errors[each]) for each in names)])
    head = ["concept", "pictures", "alpha of the passes", "misses", "false alarms", "precision", "sensitivity"]
    icons, prompts = _most(found["missed icons"]), _most(found["missed prompts"])
    return "\n\n".join(
        [
            "\n".join([*found["verdict"], made]),
            tables.of_card(found).rstrip(),
            table(head, lines),
            f"Of pictures that show the concept, the worse detector misses most: {icons}. By prompt: {prompts}.",
        ]
    )


def _most(groups: Sequence[Mapping[str, Any]]) -> str:
    found = [f"{each['name']} ({each['hits']} of {each['n']})" for each in groups[:6] if each["hits"]]
    return "; ".join(found) or "none"


def directed(root: Path = ROOT) -> str:
    """Ways to balance men and women beside each other, and ways to avoid alcohol; `experiments/directions.py`."""
    if not (root / "results/directions.json").is_file():
        return "Without a card so far: `python -m experiments directions`."
    found = card("directions", root)
    kept = {each["row"]: points(each) for each in found["comparisons"] if each["metric"] == "kept"}
    parts = [tables.caption(found, "directions")]
    for first in ("deviation", "residual explicit"):
        rows = [row for row in found["rows"] if first in row]
        names = [name for name in found["columns"] if any(name in row for row in rows[1:])]
        lines = [[percent(row[name]) if name in row else "-" for name in names] for row in rows]
        head = ["", *(found["columns"][name] for name in names), "other icons against the base model"]
        named = [(f"`{row['row']}`", kept.get(row["row"], "-")) for row in rows]
        parts.append(table(head, [[name, *line, lost] for (name, lost), line in zip(named, lines, strict=True)]))
    shares = {row["row"]: row["deviation"]["professions"] for row in found["rows"] if "deviation" in row}
    jobs = list(dict.fromkeys(job for of in shares.values() for job in of))
    women = [[f"`{row}`", *(f"{of[job]['women']} of {of[job]['n']}" for job in jobs)] for row, of in shares.items()]
    return "\n\n".join([*parts, "Women among the pictures that show the profession:", table(["", *jobs], women)])


SWEEPS = ("run_time_sweep", "editors_sweep", "peers_sweep")


def settings(root: Path = ROOT) -> str:
    """What the tuning block chose for each method; the sweeps are in `catalogue.py`."""
    lines, captions = [], []
    for name in (name for name in SWEEPS if (root / f"results/{name}.json").is_file()):
        found = card(name, root)
        captions.append(tables.caption(found, name))
        rows = {row["row"]: row for row in found["rows"]}
        for method, chosen in found["chosen"].items():
            cells = []
            for row in (rows[key] for key in tried(found, method)):
                setting = row["row"].removeprefix(f"{method} ")
                shown = f"{setting}: {100 * row['residual']['rate']:.0f} / {100 * row['retention']['rate']:.0f}"
                cells.append(f"**{shown}**" if setting == chosen else shown)
            lines.append([f"`{method}`", *cells])
    head = ["method", *(f"setting {k}: residual / retention, %" for k in (1, 2, 3))]
    return "\n\n".join([*captions, table(head, lines)])


def tried(found: Any, method: str) -> list[str]:
    """The rows of a method in a sweep's card; no other method's whose name begins alike."""
    longer = [each for each in found["chosen"] if each != method and each.startswith(f"{method} ")]
    names = [row["row"] for row in found["rows"] if row["row"].startswith(f"{method} ")]
    return [name for name in names if not any(name.startswith(f"{each} ") for each in longer)]


EARLIER = ("measured", "negatives", "pareto", "editors", "sequence", "speed", "fits")
BLOCKS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "families": families,
    "costs": costs,
    "load": load,
    "directions": directed,
    "judged": judged,
    "implicit": implicit,
    "drawings": lambda: shown(card("eiup_cost"), "eiup_cost"),
    "attacks": attacks,
    "leaderboard": ranking,
    "judge": labelled,
    "settings": settings,
    "many": many,
    "adapters": adapters,
    **{marker: partial(block, marker) for marker in EARLIER},
    "gates": lambda: gates(card("emoji_gates")),
}
FIGURES = ("leaderboard", "attacks")
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
MODEL_CARD = "src/efface/models/emoji/MODEL_CARD.md"


def filled(text: str) -> str:
    """A page with the blocks between its markers."""
    for marker, make in BLOCKS.items():
        pattern = re.compile(f"(<!-- {marker}:begin -->).*?(<!-- {marker}:end -->)", re.DOTALL)
        if pattern.search(text):
            content = make()
            text = pattern.sub(lambda m, content=content: f"{m[1]}\n{content}\n{m[2]}", text)
    return text


def fill_all(root: Path = ROOT) -> None:
    for name in (*PAGES, MODEL_CARD):
        (root / name).write_text(filled((root / name).read_text("utf-8")), "utf-8")
    for name in FIGURES:
        (root / f"docs/{name}.svg").write_text(figure(card(name)), "utf-8")
