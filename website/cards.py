"""What the cards in `results` say of a method or a concept, in the words of the docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.docs import card, table
from experiments.tables import percent

POOLED = ("pareto", "editors_outcome")
COLUMNS = {"implicit left": "residual rate, implied prompts", "kept": "retention", "any": "any object recognisable"}
CELLS = {
    "explicit": "prompts that name it",
    "theme": "prompts that imply it, trained",
    "paraphrase": "prompts that imply it, unseen",
    "pair": "prompts with another thing",
}
BASE = "base model"
UNKNOWN = "not measured"


def rate(found: Mapping[str, Any] | None) -> str:
    """A rate with interval and n."""
    return f"{percent(found)}, n = {found['n']:,}" if found else UNKNOWN


def pooled(name: str) -> tuple[Any, dict[str, dict[str, Any]]]:
    """A card, and for each of its methods the rates of `COLUMNS`, over all concepts."""
    found = card(name)
    if "form" in found:
        rows = {BASE if row["row"] == "base" else row["row"]: row for row in found["rows"]}
        asked = ("residual implicit", "retention", "nothing")
        return found, {
            key: dict(zip(COLUMNS, (row.get(each) for each in asked), strict=True)) for key, row in rows.items()
        }
    if "test" in found:
        rows = {BASE if row["method"] == "plain" else row["method"]: row for row in found["test"]}
        return found, {
            key: dict(zip(COLUMNS, (row["implicit"], row["kept"], row["any"]), strict=True))
            for key, row in rows.items()
        }
    names = {key.split(" ")[0] for key in found["pooled"]}
    return found, {
        BASE if each == "plain" else each: {column: found["pooled"].get(f"{each} {column}") for column in COLUMNS}
        for each in names
    }


def of_method(method: str) -> str:
    """The figures of a method on the embedded model, beside the base model's."""
    for name in POOLED:
        found, rows = pooled(name)
        if method not in rows:
            continue
        head = ["", *COLUMNS.values()]
        lines = [[f"`{each}`" if each == method else each, *map(rate, rows[each].values())] for each in (BASE, method)]
        return (
            f"{table(head, lines)}\n\nOn `emoji`, four concepts, test seeds, 95 % intervals. "
            f"Measured {found['date'][:10]} by `{found['command']}`; card [`results/{name}.json`]"
            f"(../files/results/{name}.json). [Results](../results.md) has every cell."
        )
    return "Not measured: no card has figures for this method yet."


def of_concept(concept: str) -> Iterator[str]:
    """The paragraphs and tables on a concept."""
    yield from _outcomes(concept)
    yield from _neighbours(concept)
    if concept in {cell["concept"] for cell in card("leaderboard")["cells"].values()}:
        yield (
            "The [leaderboard](../leaderboard.md) has this concept pooled with others."
        )


def _outcomes(concept: str) -> Iterator[str]:
    for name in ("eiup_outcome", "editors_outcome"):
        found = card(name)
        rows = [row for row in found["rows"] if row.get("concept") == concept and "cell" in row]
        if not rows:
            continue
        methods = list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in rows[0] if key.endswith(" left")))
        for what, title in (("left", "Residual rate"), ("kept", "Retention")):
            lines = [
                [CELLS[row["cell"]] + ("" if row["counts"] else " (a)")]
                + [percent(row[f"{m} {what}"], 0) if f"{m} {what}" in row else "-" for m in methods]
                for row in rows
                if any(f"{m} {what}" in row for m in methods)
            ]
            head = [title, *(BASE if m == "plain" else f"`{m}`" for m in methods)]
            if lines:
                yield table(head, lines)
        low = (
            " (a) The base model shows the concept in fewer than 30 % of these."
            if not all(row["counts"] for row in rows)
            else ""
        )
        yield (
            f"{found['n_per_cell']} pictures per cell, 95 % intervals, test seeds on `emoji`.{low} Measured "
            f"{found['date'][:10]} by `{found['command']}`; card [`results/{name}.json`](../files/results/{name}.json)."
        )


def _neighbours(concept: str) -> Iterator[str]:
    found = card("eiup_bystanders")
    rows = {row["strength"]: row for row in found["rows"] if row["concept"] == concept}
    if not rows:
        return
    base, (strength, erased) = rows.pop(0.0), max(rows.items())
    lost = f"Not recognisable any more: {', '.join(erased['lost'])}." if erased["lost"] else "None was lost."
    yield (
        f"**Neighbours that suffer.** Of {erased['n']} other icons, each drawn once with `eiup` at strength "
        f"{strength:g}, "
        f"{percent({'rate': erased['kept']} | erased)} stay recognisable; the base model draws "
        f"{percent({'rate': base['kept']} | base)}. {lost} One picture per icon cannot say how often it is lost. "
        "Card [`results/eiup_bystanders.json`](../files/results/eiup_bystanders.json)."
    )
