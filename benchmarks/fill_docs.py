"""Copies measured figures from `results/*.json` into README.md, docs and the model card, between their markers.

python benchmarks/fill_docs.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "src/efface/models/emoji/MODEL_CARD.md")


def card(name: str) -> dict[str, Any] | None:
    path = ROOT / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def percent(p: dict[str, Any]) -> str:
    low, high = p["interval"]
    return f"{100 * p['rate']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def outcome() -> str:
    found = card("eiup_outcome")
    if not found:
        return "Not measured yet."
    pooled, variants = found["pooled"], ("plain", "negative_prompt", "eiup")
    lines = ["| pooled over concepts | plain | negative prompt | EIUP |", "|---|---|---|---|"]
    for key, name in (
        ("explicit left", "explicit prompts: concept left"),
        ("implicit left", "implicit prompts: concept left"),
        ("kept", "what should survive is there"),
        ("any", "any icon recognisable"),
    ):
        lines.append(f"| {name} | " + " | ".join(percent(pooled[f"{v} {key}"]) for v in variants) + " |")
    lines += ["", "| concept | cell | left: plain | negative prompt | EIUP | kept: plain | negative prompt | EIUP |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        cells = [row.get(f"{v} {key}") for key in ("left", "kept") for v in variants]
        shown = " | ".join(f"{100 * c['rate']:.0f} %" if c else "-" for c in cells)
        lines.append(f"| {row['concept']} | {row['cell']}{'' if row['counts'] else ' (not counted)'} | {shown} |")
    drawing = found["seconds"]["drawing"] / 60
    return "\n".join(
        [
            f"On `emoji`, test seeds, n = {found['n_per_cell']} pictures a cell, EIUP at strength "
            f"{found['strength']:g}, guidance 7.5, 25 steps;",
            "both eyes judge, the worse is shown, with 95 % intervals. A cell counts if the plain model shows the",
            "concept in at least 30 %.",
            f"Measured {found['date'][:10]} by `{found['command']}` ({drawing:.0f} min of drawing on 2 cores), card in "
            "`results/eiup_outcome.json`.",
            "",
            *lines,
        ]
    )


def editors() -> str:
    found, eiup = card("editors_outcome"), card("eiup_outcome")
    if not found:
        return "Not measured yet."
    pooled, fits = found["pooled"], found["fits"]
    lines = [
        "| method | explicit, left | implicit, left | kept | any icon recognisable | fit | file |",
        "|---" * 7 + "|",
    ]
    for name in ("plain", *fits):
        shown = [percent(pooled[f"{name} {key}"]) for key in ("explicit left", "implicit left", "kept", "any")]
        costs = fits.get(name, {}).values()
        if costs:
            shown += [f"{span([c['seconds'] for c in costs])} s", f"{span([c['bytes'] / 1e6 for c in costs])} MB"]
        lines.append(f"| {f'`{name}`' if costs else 'plain model'} | {' | '.join(shown)} |{'' if costs else ' | |'}")
    if eiup and eiup["model"] == found["model"]:
        keys = ("explicit left", "implicit left", "kept", "any")
        shown = [percent(eiup["pooled"][f"eiup {key}"]) for key in keys]
        lines.append(f"| `eiup`, from above | {' | '.join(shown)} | none | none |")
    return "\n".join(
        [
            f"The cells, seeds and judges of the first table, n = {found['n_per_cell']} pictures a cell; a fit for",
            "each concept, with the package's settings for `emoji`; seconds and size are least and most of the four",
            f"concepts, on one thread each, beside other work. Measured {found['date'][:10]} by `{found['command']}`",
            f"({found['seconds']['drawing'] / 60:.0f} min of drawing on one core), card in "
            "`results/editors_outcome.json`.",
            "",
            *lines,
        ]
    )


def negatives() -> str:
    found = card("negative_prompts")
    if not found:
        return "Not measured yet."
    rows = {(r["method"], r["variant"]): r for r in found["rows"] if r["complete"]}
    methods = list(dict.fromkeys(method for method, _ in rows))
    variants = list(dict.fromkeys(variant for _, variant in rows))
    of_n: dict[int, list[str]] = {}
    for method in methods:
        n = max(row["pooled"]["residual"]["n"] for (of, _), row in rows.items() if of == method)
        of_n.setdefault(n, []).append(f"`{method}`")
    sizes = "; ".join(f"n = {n}: {', '.join(names)}" for n, names in sorted(of_n.items(), reverse=True))
    lines = ["| negative prompt | base model: residual | `eiup`: residual | base model: any icon | `eiup`: any icon |"]
    lines.append("|---" * 5 + "|")
    for variant in variants:
        cells = [rows.get((m, variant)) for m in ("base", "eiup")]
        shown = [percent(c["pooled"][key]) if c else "-" for key in ("residual", "any") for c in cells]
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    lines += ["", f"| residual, % | {' | '.join(f'`{m}`' for m in methods)} |", "|---" * (1 + len(methods)) + "|"]
    for variant in variants:
        cells = [rows.get((m, variant)) for m in methods]
        shown = [f"{100 * c['pooled']['residual']['rate']:.1f}" if c else "-" for c in cells]
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    heads = [f"{whose}: {what}" for what in ("retention", "the object") for whose in ("base model", "`eiup`")]
    lines += ["", f"| ordinary negative prompt | {' | '.join(heads)} |"]
    lines.append("|---" * 5 + "|")
    for variant in ("none", "blur", "object"):
        pooled = [c["pooled"] if (c := rows.get((m, variant))) else {} for m in ("base", "eiup")]
        shown = [percent(c["kept"]) if "kept" in c else "-" for c in pooled]
        shown += [f"{100 * c['pushed']['rate']:.1f} %" if "pushed" in c else "-" for c in pooled]
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    return "\n".join(
        [
            "On `emoji`, test seeds: explicit, implicit and pair prompts of alcohol, weapon, cat and neon sign,",
            "pooled, with 95 % intervals; the worse of two detectors.",
            f"Pictures for each negative prompt: {sizes}.",
            "The last table says how many pictures that have something to retain show it, and how many show the",
            "object that the negative prompt `object` names for them.",
            "`stacked`: `NegativePrompt` on the same pipeline, without and with a strength.",
            f"Measured {found['date'][:10]} by `{found['command']}` ({found['device']}), card in",
            f"`results/negative_prompts.json`, drawn by the code of {found['commit'][:7]}.",
            "",
            *lines,
        ]
    )


def span(values: list[float]) -> str:
    low, high = (f"{v:.0f}" if v >= 10 else f"{v:.1f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def sequence() -> str:
    found = card("ccrt_sequence")
    if not found:
        return "Not measured yet."
    heads = [f"{name}: {what}" for name in found["results"] for what in ("left", "kept")]
    lines = [f"| after removing | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]

    def mean(rates: dict[str, Any]) -> str:
        return f"{100 * sum(r['rate'] for r in rates.values()) / len(rates):.0f} %"

    def row(name: str, cells: list[dict[str, Any]]) -> str:
        return f"| {name} | {' | '.join(mean(c[of]) for c in cells for of in ('removed', 'kept'))} |"

    rounds = list(found["results"].values())
    lines.append(row("nothing", [found["plain"]] * len(rounds)))
    lines += [row(of[0]["concept"], list(of)) for of in zip(*rounds, strict=True)]
    seconds = {name: span([r["seconds"] for r in of]) for name, of in found["results"].items()}
    n = next(iter(found["plain"]["kept"].values()))["n"]
    return "\n".join(
        [
            f"Five concepts in a row, {n} pictures of each thing on test seeds, the worse of two eyes; `kept` is",
            f"the mean over {', '.join(found['plain']['kept'])}, which the search does not know. A round took",
            " and ".join(f"{took} s ({name})" for name, took in seconds.items()) + " on one core, beside other work.",
            f"Measured {found['date'][:10]} by `{found['command']}`, card in `results/ccrt_sequence.json`.",
            "",
            *lines,
        ]
    )


def fits() -> str:
    closed, step = card("closed_form"), (card("finetune_step") or {}).get("emoji")
    lines = []
    if closed:
        lines += [
            f"UCE and RECE (3 rounds) on random weights of Stable Diffusion 1.5's size, {closed['threads']} threads, "
            f"{closed['date'][:10]}, by",
            f"`{closed['command']}`, beside literal implementations with explicit float32 inverses. Error: of the",
            "change, relative to a float64 solution of each layer, in the worst layer. A time with a star is in part",
            "the average of the outputs that were measured. Card in `results/closed_form.json`.",
            "",
            "| concepts | literal | seconds | MiB | error | Efface | seconds | MiB | error | times faster |",
            "|---" * 10 + "|",
        ]
        cells = {(c["method"], c["concepts"]): c for c in closed["cells"]}
        for literal, ours in (("uce 2023", "uce"), ("uce 2025", "uce last"), ("rece literal", "rece")):
            for n in sorted({n for _, n in cells}):
                shown = [
                    f"{name} | {c['seconds']:.3g}{'*' if c['layers left out'] else ''} | {c['memory MiB']:.0f} | "
                    f"{c['error']:.0e}"
                    for name in (literal, ours)
                    for c in [cells[name, n]]
                ]
                lines.append(f"| {n} | {' | '.join(shown)} | {cells[literal, n]['times slower']:.1f} |")
    if step:
        lines += [
            "",
            f"An update of ESD and SDD on `emoji`, {step['rounds']} rounds, {step['threads']} threads, "
            f"{step['date'][:10]}, by",
            "`python benchmarks/finetune_step.py`: median (range) of the times that a naive three-chain step takes "
            "longer.",
            "Card in `results/finetune_step.json`.",
            "",
            "| method | variant | seconds an update | denoiser rows an update | naive / this |",
            "|---|---|---|---|---|",
        ]
        for r in step["results"]:
            ratio = "{median:.2f} ({min:.2f}-{max:.2f})".format(**r["speedup"])
            seconds, rows = r["seconds_per_update"]["median"], r["rows_per_update"]
            lines.append(f"| {r['method']} | {r['variant']} | {seconds:.2f} | {rows:.0f} | {ratio} |")
        ccrt = step["ccrt"]
        unshared = sum(ccrt["rows_unshared"].values())
        lines += [
            "",
            f"A round of CCRT of {ccrt['method']['steps']} updates ran the denoiser on {ccrt['rows']:,} rows; with no "
            f"trajectory shared it would have been {unshared:,} ({ccrt['saved']:.0%} saved).",
        ]
    return "\n".join(lines) or "Not measured yet."


def gates() -> str:
    found = card("emoji_gates")
    if not found:
        return "Not measured yet."
    lines = []
    if "a" in found:
        lines += [f"Gate A, {found['a']['n']} held-out scenes after the autoencoder ({found['a']['date']}):", ""]
        lines += ["| what | named | bar | passed |", "|---|---|---|---|"]
        for kind, styles in found["a"]["kinds"].items():
            whole = styles["all"]
            passed = "yes" if whole["passed"] else "no"
            lines.append(f"| {kind} | {interval(whole['worse'])} | {100 * whole['bar']:.0f} % | {passed} |")
        lines.append("")
    if "c" in found:
        lines += [f"Gate C, what the model draws ({found['c']['date']}):", ""]
        lines += ["| what | rate | bar | passed |", "|---|---|---|---|"]
        for name, p in found["c"]["kinds"].items():
            bar = "" if p.get("bar") is None else f"{100 * p['bar']:.0f} %"
            passed = {True: "yes", False: "no", None: ""}[p.get("passed")]
            lines.append(f"| {name} | {interval(p['worse'])} | {bar} | {passed} |")
        rates = {f"{job}: male": p for job, p in found["c"]["gender"]["jobs"].items()}
        for name, p in (rates | {"watermark": found["c"]["watermark"]}).items():
            passed = "yes" if p["passed"] else "no"
            lines.append(f"| {name} | {interval(p['worse'])} | {100 * p['trained']:.0f} ± 5 % | {passed} |")
    return "\n".join(lines)


def speed() -> str:
    found = card("eiup_overhead")
    if not found:
        return "Not measured yet."
    columns = [(name, batch) for name in ("emoji", "sd15") for batch in found.get(name, {})]
    ratios = {(n, b): {r["variant"]: r["ratio"] for r in found[n][b]["results"]} for n, b in columns}
    heads = " | ".join(f"{name}, batch {batch}" for name, batch in columns)
    lines = [f"| one step, times plain | {heads} |", "|---" * (1 + len(columns)) + "|"]
    for variant in ratios[columns[0]]:
        cells = [ratios[column].get(variant) for column in columns]
        shown = [f"{c['median']:.2f} ({c['min']:.2f}-{c['max']:.2f})" if c else "-" for c in cells]
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    facts = []
    for name, batch in columns:
        r = found[name][batch]
        earlier = ", ".join(f"{row['variant']} {row['date'][:10]}" for row in r["results"] if "date" in row)
        facts.append(
            f"`{name}`, batch {batch}: {r['rounds']} rounds, {r['threads']} threads, {r['date'][:10]}"
            + (f" ({earlier})" if earlier else "")
        )
    return "\n".join(
        [
            "Median (range) of the ratios in one run of `python benchmarks/eiup_overhead.py --model NAME --batch N`,",
            "for a part of the variants with `--variants`.",
            f"{'; '.join(facts)}.",
            "Card in `results/eiup_overhead.json`. `sd15` has the sizes of Stable Diffusion 1.5 and random weights.",
            'The concept is "alcohol" with seven phrases, each taken out on its own by `projected`; `sld` and',
            "`negative, own strength` predict them in one text on `emoji` (a row more), in two on `sd15`, whose random",
            "tokenizer splits words into letters (two rows more).",
            "",
            *lines,
        ]
    )


def families() -> str:
    """Which method works on which family."""
    from efface.families import FAMILIES, matrix

    names, notes = [each.name for each in FAMILIES], []
    lines = [f"| method | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for (method, form), cells in matrix().items():
        shown = []
        for name in names:
            if (cell := cells[name]) not in ("", "yes"):
                notes += [cell] * (cell not in notes)
                cell = f"yes ({'abcdefgh'[notes.index(cell)]})"
            shown.append(cell or "-")
        lines.append(f"| `{method}`{f' with {form}' if form else ''} | {' | '.join(shown)} |")
    return "\n".join([*lines, *(f"\n({'abcdefgh'[k]}) with {note} in the call" for k, note in enumerate(notes))])


def interval(p: dict[str, Any]) -> str:
    return f"{100 * p['rate']:.1f} % [{100 * p['low']:.1f}, {100 * p['high']:.1f}]"


def summary() -> str:
    """README's few lines: what the base model and each method leave, and what else is there."""
    run_time, edits = card("pareto"), card("editors_outcome")
    if not run_time or not edits:
        return "Not measured yet."
    lines = ["| | residual rate, implied prompts | retention | any object recognisable |", "|---|---|---|---|"]
    for p in run_time["test"]:
        name = "base model" if p["method"] == "plain" else f"`{p['method']}`"
        lines.append(f"| {name} | {' | '.join(percent(p[key]) for key in ('implicit', 'kept', 'any'))} |")
    for name in edits["fits"]:
        rates = (percent(edits["pooled"][f"{name} {key}"]) for key in ("implicit left", "kept", "any"))
        lines.append(f"| `{name}`, weights edited | {' | '.join(rates)} |")
    by = f"`results/pareto.json` ({run_time['date'][:10]}) and `results/editors_outcome.json` ({edits['date'][:10]})"
    return "\n".join(
        [
            *lines,
            "",
            f"{edits['n_per_cell']} pictures per cell, 95 % intervals, settings chosen on tuning seeds; cards {by}.",
        ]
    )


def fill(marker: str, text: str) -> None:
    """Puts text between the markers on every page that has them.

    Raises:
        SystemExit: no page has them.
    """
    pattern = re.compile(f"(<!-- {marker}:begin -->).*?(<!-- {marker}:end -->)", re.DOTALL)
    pages = [page for page in PAGES if pattern.search(page.read_text("utf-8"))]
    if not pages:
        raise SystemExit(f"No page has the markers {marker!r}: put them where the text should stand.")
    for page in pages:
        page.write_text(pattern.sub(lambda m: f"{m[1]}\n{text}\n{m[2]}", page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    for name, block in (
        ("summary", summary),
        ("families", families),
        ("measured", outcome),
        ("negatives", negatives),
        ("speed", speed),
        ("editors", editors),
        ("sequence", sequence),
        ("fits", fits),
        ("gates", gates),
    ):
        fill(name, block())
