"""The table of a card, and what stands above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from efface.tables import Format, render


def percent(p: Mapping[str, Any], digits: int = 1) -> str:
    """A rate with its interval."""
    low, high = p["interval"]
    return f"{100 * p['rate']:.{digits}f} % [{100 * low:.{digits}f}, {100 * high:.{digits}f}]"


def ratio(spread: Mapping[str, float]) -> str:
    """A median with its range."""
    return "{median:.2f} ({min:.2f}-{max:.2f})".format(**spread)


def mean(rates: Mapping[str, Any]) -> str:
    return f"{100 * sum(r['rate'] for r in rates.values()) / len(rates):.0f} %"


def of_card(card: Mapping[str, Any], form: Format = "md") -> str:
    """The table of a card."""
    if "form" not in card:
        raise ValueError("Expected a card of `python -m experiments`, got one of an earlier runner. Use `docs` for it.")
    rows, columns = card["rows"], card["columns"]
    names = [row["row"].replace(" | ", ": ") for row in rows]  # a table's own sign
    names = [f"`{name}`" for name in names] if form == "md" else names
    if card.get("experiment") == "judge":
        return render(["method", *columns.values()], [[n, *looked(r)] for n, r in zip(names, rows, strict=True)], form)
    if "scenes" in rows[0]:
        head = ["variant", *rows[0]["scenes"]]
        lines = [[ratio(row["scenes"][s]["ratio"]) if s in row["scenes"] else "-" for s in head[1:]] for row in rows]
        return render(head, [[name, *cells] for name, cells in zip(names, lines, strict=True)], form)
    if "rounds" in rows[0]:
        of, (base, *others) = ("removed", "kept"), rows
        head = ["after removing", *(f"{row['row']}: {w}" for row in others for w in ("residual", "retention"))]
        lines = [["nothing", *(mean(base["rounds"][0][key]) for _ in others for key in of)]]
        for each in zip(*(row["rounds"] for row in others), strict=True):
            lines.append([each[0]["concept"], *(mean(r[key]) for r in each for key in of)])
        return render(head, lines, form)
    if "figures" in rows[0]:
        keys = list(dict.fromkeys(key for row in rows for key in row["figures"]))
        lines = [[key, *(figure(row["figures"].get(key)) for row in rows)] for key in keys]
        return render(["", *names], lines, form)
    if "concepts" in rows[0]:
        lines = []
        for name, row in zip(names, rows, strict=True):
            for n, c in row["concepts"].items():
                seconds = f"{c['seconds']:.3g}{'*' * bool(c['layers left out'])}"
                lines.append([name, n, seconds, f"{c['memory MiB']:.0f}", f"{c['error']:.0e}"])
        return render(["method", "concepts", "seconds", "MiB", "error"], lines, form)
    lines = [[name, *(cell(row.get(column)) for column in columns)] for name, row in zip(names, rows, strict=True)]
    return render(["method", *columns.values()], lines, form)


def cell(found: Any) -> str:
    """A rate, a paired difference in points, a distance or a median, with its interval or range; counts; a number."""
    if not isinstance(found, Mapping):
        return "-" if found is None else f"{found:,}" if isinstance(found, int) else f"{found:,.3g}"
    if not found.get("judged", True):
        return "not judged"
    if "counts" in found:
        return ", ".join(map(str, found["counts"]))
    if "kid" in found:
        return "{:.2f} [{:.2f}, {:.2f}], n = {}".format(found["kid"], *found["interval"], found["n"])
    if "difference" in found:
        return "{:+.1f} [{:.1f}, {:.1f}]".format(*(100 * each for each in (found["difference"], *found["interval"])))
    return ratio(found) if "median" in found else percent(found)


def looked(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row of the card `judge`."""
    residual, nothing = row.get("residual", {}), row.get("nothing", {})
    rates = [residual.get("detector"), residual.get("looking"), row["misses"], row["precision"], nothing.get("looking")]
    return ["-" if each is None or each["rate"] is None else percent(each) for each in rates]


def figure(value: Any) -> str:
    """A number, a rate with its interval, or several figures."""
    if isinstance(value, list):
        return "; ".join(map(figure, value))
    if isinstance(value, dict) and "hits" in value:
        low, high = value["interval"]
        return f"{value['hits']} / {value['n']} ({low:.1%} to {high:.1%})"
    if isinstance(value, dict):
        return ", ".join(f"{name} {each:g}" for name, each in value.items())
    return "-" if value is None else f"{value:g}"


def caption(card: Mapping[str, Any], name: str) -> str:
    """What stands above a card's table in the docs."""
    hours = card["core_hours"]
    facts = [
        f"{card['question']} `{card['model']['name']}`, {card['block']} block, n = {card['n']} per cell or rounds."
    ]
    if "cells" in card:
        prompts = sum(len(cell["prompts"]) for cell in card["cells"].values())
        facts.append(f"{prompts} prompts; 95 % intervals, clustered by prompt. Judges: {card['detector']['name']}.")
    facts += card.get("verdict", [])
    facts.append(
        f"Measured {card['date'][:10]} by `{card['command']}`, code {card['code']['commit'][:7]}, on {card['machine']}."
    )
    facts.append(
        f"It took {hours['spent']:.2g} core-hours (estimate {hours['estimate']:.2g}, cap {hours['cap']:g}); card in "
        f"`results/{name}.json`."
    )
    for note in card.get("updates", []):
        facts.append(f"Redrawn {note['date'][:10]} by `{note['command']}`: {', '.join(note['rows'])}.")
    return "\n".join(facts)
