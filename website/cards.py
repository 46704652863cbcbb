"""What the cards in `results` say of a method or a concept, in the words of the docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from experiments.docs import card, table
from experiments.tables import percent

COLUMNS = ("residual explicit", "residual implicit", "retention", "nothing")
"""The metrics of the leaderboard that the pages of methods show."""
CELLS = {
    "explicit": "prompts that name it",
    "theme": "prompts that imply it, trained",
    "paraphrase": "prompts that imply it, unseen",
    "pair": "prompts with another thing",
}
BASE = "base model"
UNKNOWN = "not measured"
SETTING = "the setting is the one that the tuning block chose among three."


def rate(found: Mapping[str, Any] | None) -> str:
    """A rate with interval and n."""
    return f"{percent(found)}, n = {found['n']:,}" if found else UNKNOWN


def rows() -> dict[str, dict[str, Any]]:
    """The leaderboard's rates, by method."""
    return {BASE if row["row"] == "base" else row["row"]: row for row in card("leaderboard")["rows"]}


def of_method(method: str) -> str:
    """The figures of a method on the leaderboard's model, beside the base model's."""
    found, shown = card("leaderboard"), rows()
    if method not in shown:
        return "Not measured: no card has figures for this method yet."
    head = ["", *(found["columns"][column] for column in COLUMNS)]
    lines = [
        [f"`{each}`" if each == method else each, *(rate(shown[each].get(column)) for column in COLUMNS)]
        for each in (BASE, method)
    ]
    return (
        f"{table(head, lines)}\n\nOn `{found['model']['name']}`, {len(ranked(found))} concepts, test block, 95 % "
        f"intervals; {SETTING} Measured {found['date'][:10]} by `{found['command']}`; card [`results/leaderboard.json`]"
        "(../files/results/leaderboard.json). The [leaderboard](../leaderboard.md) has all methods."
    )


def ranked(found: Mapping[str, Any]) -> set[str]:
    """The concepts of a leaderboard's card."""
    return {cell["concept"] for cell in found["cells"].values()}


def of_concept(concept: str) -> Iterator[str]:
    """The paragraphs and tables on a concept."""
    yield from _outcomes(concept)
    yield from _neighbours(concept)
    if concept in ranked(card("leaderboard")):
        yield "The [leaderboard](../leaderboard.md) has this concept pooled with others."


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
