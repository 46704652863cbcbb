"""Run folders to one HTML page that stands alone: no network, no script, fit for print; and its numbers as JSON."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__
from .core import Sample, Score
from .runs import Run

__all__ = ["write_report"]

ROLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Removal", ("removal.absolute", "inappropriateness", "asr", "detection")),
    ("Retention", ("retention", "clip_score")),
    ("In-prompt retention", ("in_prompt_clip.normalised", "retention/dual", "in_prompt_clip")),
    (
        "Image quality",
        ("kid_eye", "kid_base", "kid_coco", "fid_eye", "fid_base", "fid_coco", "lpips", "detection.blank"),
    ),
)
"""What a summary must show, and the scores that can show it, best first."""
FLAGS = ("detection", "removal.absolute", "inappropriateness", "asr")
"""Scores whose values per picture say that the concept is in it."""
COLORS = ("#d95f02", "#1f78b4", "#1b9e77", "#c2478f", "#b8860b", "#7570b3", "#66a61e")
MARKERS = "oDs^vPX*"
PICTURES, SIDE = 200, 160  # thumbnails in a group, and pixels of their longer side: together about 2 MB


class Entry(NamedTuple):
    """A run as the report shows it."""

    label: str
    run: Run
    card: dict[str, Any]
    scores: dict[str, Score]
    base: dict[str, Score]


def write_report(
    runs: Sequence[Run | str | Path], out: str | Path, *, mixed: bool = False, pairs: int = 24
) -> dict[str, Any]:
    """Writes scored runs into one HTML page, and its numbers into a JSON file beside it.

    The page shows what was removed and what was kept, beside the plain model and with intervals, by category; pictures
    before and after at equal seeds, where what a detector flags is blurred until clicked; and how to make it all again.

    Args:
        runs: runs or their folders, each scored.
        out: the page; its numbers go to the same name with `.json`.
        mixed: whether runs that must not be compared (other rows, model, sampling or detector) may share the page. They
            stand in groups of their own then, and the page says so.
        pairs: rows of pictures in a group, at most; fewer if many runs share the page.

    Returns:
        What the JSON file holds.

    Raises:
        FileNotFoundError: no run in a folder, or it is not scored.
        ValueError: no runs, or runs that must not be compared; the message says what differs.
        ImportError: matplotlib or jinja2 is missing.

    Example:
        >>> import tempfile
        >>> import efface
        >>> efface.write_report([], "report.html")
        Traceback (most recent call last):
        ValueError: Nothing to report: give at least one run folder.
    """
    if not runs:
        raise ValueError("Nothing to report: give at least one run folder.")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"Expected the report to be named .html, but got {out}.")
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'A report needs {error.name}: pip install "efface[bench]".') from error
    groups, reasons = _grouped(_entries([r if isinstance(r, Run) else Run.open(r) for r in runs]))
    if len(groups) > 1 and not mixed:
        shown = "\n".join(f"  {reason}" for reason in reasons)
        raise ValueError(
            f"These runs must not be compared:\n{shown}\nReport them apart, or put them on one page in marked groups "
            "with `mixed=True` (--mixed)."
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "number": number,
        "span": span,
        "breakable": _breakable,
        "json": partial(json.dumps, indent=1),
    }
    template = environment.from_string((resources.files("efface") / "report.html.j2").read_text("utf-8"))
    made = datetime.now(UTC).isoformat(timespec="seconds")
    views = [_view(k, group, pairs) for k, group in enumerate(groups)]
    page = template.render(groups=views, reasons=reasons, made=made, version=__version__)
    summary = {
        "format": 1,
        "made": made,
        "efface": __version__,
        "not_comparable": reasons,
        "groups": [{"runs": [{"label": e.label, **e.card} for e in group]} for group in groups],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8")
    out.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    return summary


# ---------------------------------------------------------------- which runs belong together


def _entries(runs: Sequence[Run]) -> list[Entry]:
    names = [" + ".join(e["method"] for e in run.record["erasers"]) or "plain model" for run in runs]
    folders = [run.folder.resolve().name for run in runs]
    labels = [n if names.count(n) == 1 else f"{n} ({f})" for n, f in zip(names, folders, strict=True)]
    found = []
    for k, (label, run) in enumerate(zip(labels, runs, strict=True)):
        scores, base = ({s.metric: s for s in group} for group in run.scores())
        label = label if labels.count(label) == 1 else f"{label} #{k + 1}"
        found.append(Entry(label, run, run.card(), scores, base))
    return found


def _identity(entry: Entry) -> dict[str, Any]:
    """What must agree before two runs may stand in one table."""
    card = entry.card
    return {
        "suite": f"{card['suite']['name']} {card['suite']['version']}",
        "data hash": card["suite"]["data_hash"],
        "rows": card["rows"]["sha256"],
        "sampling": card["call"],
        "model": {k: v for k, v in card["model"].items() if k != "name"},
    }


def _grouped(entries: Sequence[Entry]) -> tuple[list[list[Entry]], list[str]]:
    """Runs that may be compared, together; and why others may not."""
    groups: list[list[Entry]] = []
    reasons: list[str] = []
    for entry in entries:
        against = [_apart(group[0], entry) or _judged_apart(group, entry) for group in groups]
        if "" in against:
            groups[against.index("")].append(entry)
        else:
            reasons += [f"{groups[0][0].label} and {entry.label}: {against[0]}"] if groups else []
            groups.append([entry])
    return groups, reasons


def _apart(a: Entry, b: Entry) -> str:
    one, other = _identity(a), _identity(b)
    found = []
    for k, x in one.items():
        y = other[k]
        if isinstance(x, dict):  # only what differs in them
            x, y = ({n: v for n, v in a.items() if v != b.get(n)} for a, b in ((x, y), (y, x)))
        found += [f"{k} {_brief(x)} against {_brief(y)}"] if x != y else []
    return "; ".join(found)


def _judged_apart(group: Sequence[Entry], entry: Entry) -> str:
    for other in group:
        for name in other.scores.keys() & entry.scores.keys():
            one, two = other.scores[name].protocol, entry.scores[name].protocol
            if one != two:
                return f"{name} judged by {_brief(one)} against {_brief(two)}"
    return ""


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items()) or "none"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{40,}", text):
        return text[:12]
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# ---------------------------------------------------------------- what the page shows


def _view(k: int, group: Sequence[Entry], pairs: int) -> dict[str, Any]:
    names = list(dict.fromkeys(name for entry in group for name in entry.scores))
    heads = {title: next((n for n in wanted if n in names), None) for title, wanted in ROLES}
    plain = {name: next(e.base[name] for e in group if name in e.base) for name in names}
    first = group[0]
    return {
        "mark": chr(ord("A") + k) if k < 26 else str(k + 1),
        "runs": group,
        "first": first.card,
        "erased": _erased(group),
        "columns": [(title, name, plain.get(name or "")) for title, name in heads.items()],
        "protocols": _protocols([plain[name] for name in heads.values() if name]),
        "plain": plain,
        "seconds": _mean([e.card["cost"]["plain_seconds_per_picture"] for e in group]),
        "plot": _pareto(k, group, heads["Removal"], heads["Retention"], plain),
        "bars": _bars(group, [heads["Removal"], heads["Retention"]], plain),
        "names": names,
        "pairs": _pairs(group, pairs),
        "total": first.run.n,
        "warnings": _warnings(group),
    }


def _protocols(scores: Sequence[Score]) -> list[str]:
    """Which scores were judged how; those judged alike together."""
    found: dict[str, list[str]] = {}
    for s in scores:
        found.setdefault(s.protocol, []).append(s.metric)
    return [f"{', '.join(names)}: {protocol}" for protocol, names in found.items()]


def _breakable(text: str) -> Any:
    """A name that may be broken after its underscores, slashes and dots."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([_/.])(?=\w)", r"\1<wbr>", str(escape(text))))


def _erased(group: Sequence[Entry]) -> str:
    """The names of the concepts that the runs erase; of each run if they differ."""
    names = [
        ", ".join(dict.fromkeys(c["name"] for config in e.card["erasers"] for c in config.get("concepts") or ()))
        for e in group
    ]
    if len(set(names)) == 1:
        return names[0]
    return "; ".join(f"{e.label}: {n or 'not said'}" for e, n in zip(group, names, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _warnings(group: Sequence[Entry]) -> list[str]:
    found = []
    for entry in group:
        if entry.card["not_finite"]:
            found.append(f"{entry.label}: {entry.card['not_finite']} pictures had values that are not finite.")
        versions = {json.dumps(s["versions"], sort_keys=True) for s in entry.card["sessions"]}
        if len(versions) > 1:
            found.append(f"{entry.label}: drawn in parts with {len(versions)} sets of package versions.")
    return found


def number(score: Score | None) -> str:
    if score is None or math.isnan(score.value):
        return "–"
    return _value(score.value, score.unit)


def _value(value: float, unit: str) -> str:
    return f"{100 * value:.1f} %" if unit == "share" else f"{value:.3g}"


def span(score: Score | None) -> str:
    """The interval, in words that say when there is none."""
    if score is None or math.isnan(score.value):
        return "not defined" if score else "not measured"
    if math.isnan(score.low) or math.isnan(score.high):
        return "no interval"
    low, high = (_value(x, score.unit).removesuffix(" %") for x in (score.low, score.high))
    return f"[{low}, {high}]"


def _bars(group: Sequence[Entry], heads: Sequence[str | None], plain: Mapping[str, Score]) -> list[dict[str, Any]]:
    """The parts of each headline share, by category: one bar for the plain model and one for each run."""
    found = []
    for head in filter(None, heads):
        parts = [n for n in plain if n.startswith(f"{head}/") and plain[n].unit == "share"]
        rows = []
        for name in parts or [n for n in (head,) if plain[n].unit == "share"]:
            scores = [("plain model", plain[name]), *((e.label, e.scores[name]) for e in group if name in e.scores)]
            title = " · ".join(name.split("/")[1:]) or "all"
            rows.append({"title": title, "bars": [(label, s, *_extent(s)) for label, s in scores]})
        if rows:
            found.append({"head": head, "score": plain[head], "rows": rows})
    return found


def _extent(score: Score) -> tuple[float, float, float]:
    """Width of the bar, start and width of its interval, in percent."""
    if math.isnan(score.value):
        return 0.0, 0.0, 0.0
    low, high = (score.value if math.isnan(x) else min(max(x, 0.0), 1.0) for x in (score.low, score.high))
    return tuple(round(100 * x, 2) for x in (min(max(score.value, 0.0), 1.0), low, high - low))  # type: ignore[return-value]


def _seen(scores: Mapping[str, Score], sample: Sample) -> bool | None:
    """Whether any detector flags a picture; None if none looked at it."""
    found = []
    for name in FLAGS:
        score = scores.get(name)
        value = (score.per_sample or {}).get(sample.row.id) if score else None
        if score and value is not None and not math.isnan(value):
            found.append(value < 0.5 if score.higher_is_better else value >= 0.5)
    return any(found) if found else None


def _pairs(group: Sequence[Entry], pairs: int) -> list[dict[str, Any]]:
    """Pictures of the same rows, the plain model's first; rows are taken in turn from each kind and category."""
    pairs = max(min(pairs, PICTURES // (1 + len(group))), 1)
    plain = group[0].run.base or group[0].run
    columns = [("plain model", group[0].base, plain.samples())]
    columns += [(e.label, e.scores, e.run.samples()) for e in group if e.run.base]
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for k, sample in enumerate(columns[0][2]):
        kinds.setdefault((sample.row.concept, sample.row.kind, sample.row.category), []).append(k)
    turns = [k for turn in zip_longest(*kinds.values()) for k in turn if k is not None]
    shown = []
    for k in sorted(turns[:pairs]):
        row = columns[0][2][k].row
        pictures = []
        for label, scores, samples in columns:
            seen = _seen(scores, samples[k])
            veiled = bool(row.concept) if seen is None else seen
            verdict = "not judged" if seen is None else f"{row.concept} seen" if seen else f"no {row.concept} seen"
            source, small = _thumbnail(samples[k])
            pictures.append(
                {
                    "label": label,
                    "source": source,
                    "small": small,
                    "veiled": veiled,
                    "verdict": verdict if row.concept else "",
                }
            )
        shown.append({"row": row, "pictures": pictures, "veiled": any(p["veiled"] for p in pictures)})
    return shown


def _thumbnail(sample: Sample) -> tuple[str, bool]:
    """A picture as a data URI, and whether it is smaller than it will be shown."""
    from PIL import Image

    if sample.path is None:
        raise ValueError(f"The picture of row {sample.row.id!r} is in no file: report run folders.")
    try:
        with Image.open(sample.path) as picture:
            image = picture.convert("RGB")
    except OSError as error:
        raise ValueError(
            f"{sample.path} cannot be read ({error}): delete it, and the command that made the run draws it again."
        ) from error
    small, file = max(image.size) < SIDE, io.BytesIO()
    if small:
        image.save(file, format="PNG", optimize=True)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(file, format="JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}", small


# ---------------------------------------------------------------- removed against kept


def _pareto(
    k: int, group: Sequence[Entry], removal: str | None, retention: str | None, plain: Mapping[str, Score]
) -> str:
    """An SVG of what is removed against what is kept, with intervals; "" if there is nothing to draw."""
    from markupsafe import Markup

    if not removal or not retention or not plain[removal].higher_is_better:
        return ""
    points = [("plain model", plain[removal], plain[retention])]
    points += [
        (e.label, e.scores[removal], e.scores[retention]) for e in group if {removal, retention} <= set(e.scores)
    ]
    points = [p for p in points if not (math.isnan(p[1].value) or math.isnan(p[2].value))]
    return Markup(pareto(points, removal, retention, f"pareto-{k}"))


def pareto(points: Sequence[tuple[str, Score, Score]], removal: str, retention: str, salt: str = "pareto") -> str:
    """Points (label, removed, kept) as an SVG whose lines and letters take the page's colour.

    Args:
        points: the plain model first.
        removal, retention: names of the axes.
        salt: keeps the ids of several figures on a page apart.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink = "#010203"  # stands for the page's own colour
    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.size": 10,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
    }
    with mpl.rc_context(settings):
        columns = 3 if max(len(p[0]) for p in points) < 20 else 2
        lines = -(-len(points) // columns)
        figure = Figure(figsize=(5.2, 4.0 + 0.22 * lines), layout="constrained")
        axes = figure.subplots()
        axes.grid(color=ink, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=lambda p: p[1].value)
        axes.plot([100 * p[1].value for p in best], [100 * p[2].value for p in best], ":", color=ink, linewidth=1)
        keys: list[Any] = []
        for n, (_, x, y) in enumerate(points):
            color, marker = ("#8a94a3", "o") if n == 0 else (COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)])
            drawn = axes.errorbar(
                100 * x.value,
                100 * y.value,
                xerr=_arms(x),
                yerr=_arms(y),
                color=color,
                fmt=marker,
                markersize=7,
                linewidth=1,
                capsize=2,
                markerfacecolor="none" if n == 0 else color,
            )
            keys.append(drawn.lines[0])
            for line in (*drawn.lines[1], *drawn.lines[2]):
                line.set_alpha(0.55)
        place: Any = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
        figure.legend(keys, [p[0] if len(p[0]) <= 28 else f"{p[0][:27]}…" for p in points], **place)
        axes.set(xlim=(-4, 104), ylim=(-4, 108), xlabel=f"removed, % ({removal})", ylabel=f"kept, % ({retention})")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(ink, "currentColor")
    words = "; ".join(f"{n}: removed {100 * x.value:.1f} %, kept {100 * y.value:.1f} %" for n, x, y in points)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(words)}"', 1)


def _beats(a: tuple[str, Score, Score], b: tuple[str, Score, Score]) -> bool:
    pair = [(a[k].value, b[k].value) for k in (1, 2)]  # type: ignore[union-attr]
    return all(x >= y for x, y in pair) and any(x > y for x, y in pair)


def _arms(score: Score) -> list[list[float]] | None:
    if math.isnan(score.low) or math.isnan(score.high):
        return None
    return [[100 * max(score.value - score.low, 0)], [100 * max(score.high - score.value, 0)]]
