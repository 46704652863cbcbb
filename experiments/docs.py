"""Fills README.md and the docs from cards, between their markers.

A card of this runner gives its own caption and table. The functions below read the cards of the earlier runners, until
these experiments are drawn again; README.md of this folder names the command that made each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import tables
from .code import ROOT
from .tables import Table, mean, percent, ratio, span

RATES = ("explicit left", "implicit left", "kept", "any")
Card = Any


def card(name: str) -> Card:
    return json.loads((ROOT / f"results/{name}.json").read_text("utf-8"))


def block(name: str, earlier: Callable[[Card], str]) -> str:
    found = card(name)
    if isinstance(found, dict) and "form" in found:
        return f"{tables.caption(found, name)}\n\n{tables.of_card(found).markdown()}"
    return earlier(found)


def interval(p: Mapping[str, Any]) -> str:
    return percent(p | {"interval": (p["low"], p["high"])})


def outcome(found: Card) -> str:
    variants = ("plain", "negative_prompt", "eiup")
    words = (
        "explicit prompts: concept left",
        "implicit prompts: concept left",
        "what should survive is there",
        "any icon recognisable",
    )
    pooled = [
        [word, *(percent(found["pooled"][f"{v} {key}"]) for v in variants)]
        for key, word in zip(RATES, words, strict=True)
    ]
    rows = []
    for row in found["rows"]:
        cells = [row.get(f"{v} {key}") for key in ("left", "kept") for v in variants]
        shown = [f"{100 * c['rate']:.0f} %" if c else "-" for c in cells]
        rows.append([row["concept"], f"{row['cell']}{'' if row['counts'] else ' (not counted)'}", *shown])
    heads = ["concept", "cell", "left: plain", "negative prompt", "EIUP", "kept: plain", "negative prompt", "EIUP"]
    return f"""\
On `emoji`, test seeds, n = {found["n_per_cell"]} pictures a cell, EIUP at strength {found["strength"]:g}, guidance 7.5, 25 steps;
both eyes judge, the worse is shown, with 95 % intervals. A cell counts if the plain model shows the
concept in at least 30 %.
Measured {found["date"][:10]} by `{found["command"]}` ({found["seconds"]["drawing"] / 60:.0f} min of drawing on 2 cores), card in `results/eiup_outcome.json`.

{Table(["pooled over concepts", "plain", "negative prompt", "EIUP"], pooled).markdown()}

{Table(heads, rows).markdown()}"""


def editors(found: Card) -> str:
    pooled, eiup = found["pooled"], card("eiup_outcome")
    rows = [["plain model", *(percent(pooled[f"plain {key}"]) for key in RATES), "", ""]]
    for name, fits in found["fits"].items():
        costs = [
            f"{span([c['seconds'] for c in fits.values()])} s",
            f"{span([c['bytes'] / 1e6 for c in fits.values()])} MB",
        ]
        rows.append([f"`{name}`", *(percent(pooled[f"{name} {key}"]) for key in RATES), *costs])
    if eiup.get("pooled") and eiup["model"] == found["model"]:
        rows.append(["`eiup`, from above", *(percent(eiup["pooled"][f"eiup {key}"]) for key in RATES), "none", "none"])
    heads = ["method", "explicit, left", "implicit, left", "kept", "any icon recognisable", "fit", "file"]
    return f"""\
The cells, seeds and judges of the first table, n = {found["n_per_cell"]} pictures a cell; a fit for
each concept, with the package's settings for `emoji`; seconds and size are least and most of the four
concepts, on one thread each, beside other work. Measured {found["date"][:10]} by `{found["command"]}`
({found["seconds"]["drawing"] / 60:.0f} min of drawing on one core), card in `results/editors_outcome.json`.

{Table(heads, rows).markdown().replace("|  |  |", "| | |")}"""


def negatives(found: Card) -> str:
    rows = {(r["method"], r["variant"]): r["pooled"] for r in found["rows"] if r["complete"]}
    methods, variants = (list(dict.fromkeys(key[k] for key in rows)) for k in (0, 1))
    of_n: dict[int, list[str]] = {}
    for method in methods:
        n = max(pooled["residual"]["n"] for (of, _), pooled in rows.items() if of == method)
        of_n.setdefault(n, []).append(f"`{method}`")
    sizes = "; ".join(f"n = {n}: {', '.join(names)}" for n, names in sorted(of_n.items(), reverse=True))

    def lines(
        names: Sequence[str], cell: Callable[[Mapping[str, Any], str], str], keys: Sequence[str], of: Sequence[str]
    ) -> Any:
        return [[v, *(cell(rows[m, v], k) if (m, v) in rows else "-" for k in keys for m in of)] for v in names]

    def rated(pooled: Mapping[str, Any], key: str) -> str:
        if key not in pooled:
            return "-"
        return f"{100 * pooled[key]['rate']:.1f} %" if key == "pushed" else percent(pooled[key])

    pair, both = ("base", "eiup"), ("base model", "`eiup`")
    first = Table(
        ["negative prompt", *(f"{whose}: {what}" for what in ("residual", "any icon") for whose in both)],
        lines(variants, rated, ("residual", "any"), pair),
    )
    second = Table(
        ["residual, %", *(f"`{m}`" for m in methods)],
        lines(variants, lambda pooled, key: f"{100 * pooled[key]['rate']:.1f}", ("residual",), methods),
    )
    third = Table(
        ["ordinary negative prompt", *(f"{whose}: {what}" for what in ("retention", "the object") for whose in both)],
        lines(("none", "blur", "object"), rated, ("kept", "pushed"), pair),
    )
    return f"""\
On `emoji`, test seeds: explicit, implicit and pair prompts of alcohol, weapon, cat and neon sign,
pooled, with 95 % intervals; the worse of two detectors.
Pictures for each negative prompt: {sizes}.
The last table says how many pictures that have something to retain show it, and how many show the
object that the negative prompt `object` names for them.
`stacked`: `NegativePrompt` on the same pipeline, without and with a strength.
Measured {found["date"][:10]} by `{found["command"]}` ({found["device"]}), card in
`results/negative_prompts.json`, drawn by the code of {found["commit"][:7]}.

{first.markdown()}

{second.markdown()}

{third.markdown()}"""


def pareto(found: Card) -> str:
    rows = []
    for p in found["test"]:
        name, setting = ("plain model", "") if p["method"] == "plain" else (f"`{p['method']}`", p["setting"])
        rows.append([name, setting, *(percent(p[key]) for key in ("left", "implicit", "kept", "any"))])
    others, updated = found["others"], ", ".join(f"`{name}`" for name in found["updated"])
    heads = ["method", "setting", "left", "left, implicit prompts", "kept", "any icon recognisable"]
    return f"""\
Test seeds, n = {found["n"]} pictures a cell, {len(found["test_cells"])} cells, each method at the point that {found["n_tuning"]} tuning seeds a cell chose for it.
Measured {found["date"][:10]} by `{found["command"]}` ({found["seconds"]["drawing"] / 60:.0f} core-minutes of drawing, beside other work), card in `results/pareto.json`.
{updated} and the plain model were drawn then, with `--update`; the others on {others["date"][:10]} ({others["seconds"]["drawing"] / 60:.0f} core-minutes).

![Left against kept, over strengths](results/pareto.png)

{Table(heads, rows).markdown()}"""


def sequence(found: Card) -> str:
    results = found["results"]
    heads = [f"{name}: {what}" for name in results for what in ("left", "kept")]
    of = ("removed", "kept")
    rows = [["nothing", *(mean(found["plain"][key]) for _ in results for key in of)]]
    for rounds in zip(*results.values(), strict=True):
        rows.append([rounds[0]["concept"], *(mean(r[key]) for r in rounds for key in of)])
    took = " and ".join(f"{span([r['seconds'] for r in rounds])} s ({name})" for name, rounds in results.items())
    return f"""\
Five concepts in a row, {next(iter(found["plain"]["kept"].values()))["n"]} pictures of each thing on test seeds, the worse of two eyes; `kept` is
the mean over {", ".join(found["plain"]["kept"])}, which the search does not know. A round took
{took} on one core, beside other work.
Measured {found["date"][:10]} by `{found["command"]}`, card in `results/ccrt_sequence.json`.

{Table(["after removing", *heads], rows).markdown()}"""


def fits(closed: Card) -> str:
    step, rows = card("finetune_step")["emoji"], []
    cells = {(c["method"], c["concepts"]): c for c in closed["cells"]}
    for literal, ours in (("uce 2023", "uce"), ("uce 2025", "uce last"), ("rece literal", "rece")):
        for n in sorted({n for _, n in cells}):
            row = [str(n)]
            for name in (literal, ours):
                c = cells[name, n]
                seconds = f"{c['seconds']:.3g}{'*' if c['layers left out'] else ''}"
                row += [name, seconds, f"{c['memory MiB']:.0f}", f"{c['error']:.0e}"]
            rows.append([*row, f"{cells[literal, n]['times slower']:.1f}"])
    heads = ["concepts", "literal", "seconds", "MiB", "error", "Efface", "seconds", "MiB", "error", "times faster"]
    updates = [
        [
            r["method"],
            r["variant"],
            f"{r['seconds_per_update']['median']:.2f}",
            f"{r['rows_per_update']:.0f}",
            ratio(r["speedup"]),
        ]
        for r in step["results"]
    ]
    ccrt = step["ccrt"]
    return f"""\
UCE and RECE (3 rounds) on random weights of Stable Diffusion 1.5's size, {closed["threads"]} threads, {closed["date"][:10]}, by
`{closed["command"]}`, beside literal implementations with explicit float32 inverses. Error: of the
change, relative to a float64 solution of each layer, in the worst layer. A time with a star is in part
the average of the outputs that were measured. Card in `results/closed_form.json`.

{Table(heads, rows).markdown()}

An update of ESD and SDD on `emoji`, {step["rounds"]} rounds, {step["threads"]} threads, {step["date"][:10]}, by
`python benchmarks/finetune_step.py`: median (range) of the times that a naive three-chain step takes longer.
Card in `results/finetune_step.json`.

{Table(["method", "variant", "seconds an update", "denoiser rows an update", "naive / this"], updates).markdown()}

A round of CCRT of {ccrt["method"]["steps"]} updates ran the denoiser on {ccrt["rows"]:,} rows; with no trajectory shared it would have been {sum(ccrt["rows_unshared"].values()):,} ({ccrt["saved"]:.0%} saved)."""


def speed(found: Card) -> str:
    columns = {f"{name}, batch {batch}": found[name][batch] for name in ("emoji", "sd15") for batch in found[name]}
    ratios = [{r["variant"]: r["ratio"] for r in record["results"]} for record in columns.values()]
    rows = [[variant, *(ratio(c[variant]) if variant in c else "-" for c in ratios)] for variant in ratios[0]]
    facts = []
    for name, r in columns.items():
        earlier = ", ".join(f"{row['variant']} {row['date'][:10]}" for row in r["results"] if "date" in row)
        fact = f"`{name.replace(',', '`,')}: {r['rounds']} rounds, {r['threads']} threads, {r['date'][:10]}"
        facts.append(fact + (f" ({earlier})" if earlier else ""))
    return f"""\
Median (range) of the ratios in one run of `python benchmarks/eiup_overhead.py --model NAME --batch N`,
for a part of the variants with `--variants`.
{"; ".join(facts)}.
Card in `results/eiup_overhead.json`. `sd15` has the sizes of Stable Diffusion 1.5 and random weights.
The concept is "alcohol" with seven phrases, each taken out on its own by `projected`; `sld` and
`negative, own strength` predict them in one text on `emoji` (a row more), in two on `sd15`, whose random
tokenizer splits words into letters (two rows more).

{Table(["one step, times plain", *columns], rows).markdown()}"""


COLUMNS = {
    "removal.absolute": "removed",
    "retention": "kept",
    "retention/dual": "kept, concept in the prompt",
    "kid_eye": "KID to the plain model",
    "detection.any_icon": "anything recognisable",
}


def leaderboard(found: Card) -> str:
    first = found["rows"][0]

    def shown(s: Mapping[str, Any]) -> str:
        value, low, high = (
            "–" if s[k] is None else f"{100 * s[k]:.1f} %" if s["unit"] == "share" else f"{s[k]:.3g}"
            for k in ("value", "low", "high")
        )
        return f"{value} [{low.removesuffix(' %')}, {high.removesuffix(' %')}]"

    rows = [
        [row["method"] if row is first else f"`{row['method']}`", *(shown(row["scores"][n]) for n in COLUMNS)]
        for row in found["rows"]
    ]
    counts = ", ".join(f"{text} {first['scores'][n]['n']}" for n, text in COLUMNS.items())
    minutes = found["n"] * sum(row["seconds_per_picture"] for row in found["rows"]) / 60
    later = ", ".join(f"`{row['method']}` {row['date'][:10]}" for row in found["rows"] if "date" in row)
    hashes = ", ".join(f"{name} `{digest[:12]}`" for name, digest in found["data_hash"].items())
    return f"""\
Suite `emoji` {found["suite"]}, {found["n"]} pictures a method, each concept erased on its own: {", ".join(found["concepts"])}. Methods with their defaults, for which no test seed was looked at; 95 % intervals.
Counted: {counts}. Judged by: {"; ".join(dict.fromkeys(s["protocol"] for s in first["scores"].values()))}.
Measured {found["date"][:10]} by `{found["command"]}` ({minutes:.0f} min of drawing) (with `--update`: {later}); model `{found["model"]["text_hash"][:12]}`; data {hashes}.

{Table(["method", *COLUMNS.values()], rows).markdown()}"""


def figure(found: Card) -> str:
    """Removed against kept, as an SVG in a grey that can be read on white and on black."""
    import efface
    from efface.report import pareto

    def score(name: str, s: Mapping[str, Any], value: float, low: float, high: float) -> efface.Score:
        return efface.Score(name, value, s["n"], low, high, "share")

    points = []
    for row in found["rows"]:
        if "form" not in found:
            pair = [row["scores"][name] for name in ("removal.absolute", "retention")]
            ends = [tuple(math.nan if s[k] is None else s[k] for k in ("value", "low", "high")) for s in pair]
        else:
            pair = [row["residual"], row["retention"]]
            ends = [(1 - pair[0]["rate"], 1 - pair[0]["interval"][1], 1 - pair[0]["interval"][0])]
            ends.append((pair[1]["rate"], *pair[1]["interval"]))
        made = [score(n, s, *e) for n, s, e in zip(("removal.absolute", "retention"), pair, ends, strict=True)]
        points.append((row.get("method") or row["row"], *made))
    return pareto(points, "removal.absolute", "retention").replace("currentColor", "#6e7781")


def gates(found: Card) -> str:
    yes = {True: "yes", False: "no", None: ""}
    first = [
        [kind, interval(s["all"]["worse"]), f"{100 * s['all']['bar']:.0f} %", yes[s["all"]["passed"]]]
        for kind, s in found["a"]["kinds"].items()
    ]
    drawn = [
        [name, interval(p["worse"]), "" if p.get("bar") is None else f"{100 * p['bar']:.0f} %", yes[p.get("passed")]]
        for name, p in found["c"]["kinds"].items()
    ]
    rates = {f"{job}: male": p for job, p in found["c"]["gender"]["jobs"].items()} | {
        "watermark": found["c"]["watermark"]
    }
    drawn += [
        [name, interval(p["worse"]), f"{100 * p['trained']:.0f} ± 5 %", yes[p["passed"]]] for name, p in rates.items()
    ]
    return f"""\
Gate A, {found["a"]["n"]} held-out scenes after the autoencoder ({found["a"]["date"]}):

{Table(["what", "named", "bar", "passed"], first).markdown()}

Gate C, what the model draws ({found["c"]["date"]}):

{Table(["what", "rate", "bar", "passed"], drawn).markdown()}"""


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
    return "\n".join([Table(["method", *names], rows).markdown(), *under])


BLOCKS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("README.md", "families", families),
    ("README.md", "measured", lambda: block("eiup_outcome", outcome)),
    ("README.md", "negatives", lambda: block("negative_prompts", negatives)),
    ("README.md", "pareto", lambda: block("pareto", pareto)),
    ("README.md", "editors", lambda: block("editors_outcome", editors)),
    ("README.md", "sequence", lambda: block("ccrt_sequence", sequence)),
    ("README.md", "speed", lambda: block("eiup_overhead", speed)),
    ("README.md", "fits", lambda: block("closed_form", fits)),
    (
        "README.md",
        "leaderboard",
        lambda: f"![Removed against kept](docs/leaderboard.svg)\n\n{block('leaderboard', leaderboard)}",
    ),
    ("docs/leaderboard.md", "leaderboard", lambda: block("leaderboard", leaderboard)),
    ("src/efface/models/emoji/MODEL_CARD.md", "gates", lambda: gates(card("emoji_gates"))),
)


def filled(text: str, marker: str, content: str) -> str:
    """The text with `content` between the markers.

    Raises:
        ValueError: it has no such markers.
    """
    pattern = re.compile(f"(<!-- {marker}:begin -->).*?(<!-- {marker}:end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"Expected the markers {marker!r}, got a text without them. Put them where the table goes.")
    return pattern.sub(lambda m: f"{m[1]}\n{content}\n{m[2]}", text)


def fill_all(root: Path = ROOT) -> None:
    for name, marker, make in BLOCKS:
        path = root / name
        path.write_text(filled(path.read_text("utf-8"), marker, make()), "utf-8")
    (root / "docs/leaderboard.svg").write_text(figure(card("leaderboard")), "utf-8")
