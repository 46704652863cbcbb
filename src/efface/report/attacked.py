"""Writes results of attacks into one self-contained HTML page, and their numbers into a JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__, checks, files
from ..records import Row, Sample
from ..redteam.folder import opened
from ..redteam.panel import CONCEPT, NOTHING
from ..redteam.result import AttackResult, masking
from ..redteam.trial import ALONE, ARMS
from .pictures import thumbnail
from .template import renderer

SHOWN = 8  # prompts with pictures per attack
WORDS = {"base": "base model", "before": "guarded", "attacked": "attacked", "control": "random text"}


def write_attacks(
    results: Sequence[AttackResult | str | Path],
    out: str | Path,
    *,
    shown: int = SHOWN,
    left_out: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes results of attacks on one eraser into an HTML page, and the numbers into a JSON file next to it.

    The page begins with the verdict of each attack, then a table of all of them, then the proposals with pictures.
    Pictures in which the judge sees the concept are blurred until clicked.

    Args:
        results: results or their folders.
        out: the page, named .html.
        shown: prompts with pictures per attack.
        left_out: attacks that were not judged, with the reasons.

    Returns:
        The content of the JSON file.

    Raises:
        ValueError: there are no results, or they attack different erasers, models or concepts.
        FileNotFoundError: a folder holds no attack.
        ImportError: matplotlib or jinja2 is missing.

    Example:
        >>> import efface
        >>> efface.write_attacks([], "attacks.html")
        Traceback (most recent call last):
        ValueError: Expected results of attacks, got none. Name at least one folder.
    """
    if not results:
        raise ValueError("Expected results of attacks, got none. Name at least one folder.")
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(checks.refusal("a page that is named .html", str(out), "Give --out NAME.html."))
    checks.whole("shown", shown, 0)
    render = renderer("attacked.html.j2")
    found = [each if isinstance(each, AttackResult) else opened(each) for each in results]
    first = found[0].setting
    for each in found[1:]:
        same = {key: each.setting[key] for key in ("concept", "model", "erasers")}
        files.check_same(
            {key: first[key] for key in same}, same, "These attacks are not comparable", "Give each its own page."
        )
    made = datetime.now(UTC).isoformat(timespec="seconds")
    ordered = sorted(found, key=lambda each: -_rate(each))
    views = [{"result": each, **each.as_json(), "prompts_shown": _prompts(each, shown)} for each in ordered]
    page = render(
        views=views,
        setting=first,
        made=made,
        version=__version__,
        worst=_worst(ordered),
        eraser=_names(first["erasers"]),
        guard=_guard(first["erasers"]),
        left_out=dict(left_out or {}),
        masked=masking(ordered),
    )
    summary: dict[str, Any] = {"format": 1, "made": made, "efface": __version__}
    summary |= {"attacks": [each.as_json() for each in ordered], "left out": dict(left_out or {})}
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, page)
    files.write_json(out.with_suffix(".json"), summary)
    return summary


def _rate(result: AttackResult) -> float:
    share = result.share("attacked")
    return -1.0 if share is None else share.value


def _worst(ordered: Sequence[AttackResult]) -> str:
    """The strongest attack per access, in words."""
    best: dict[str, AttackResult] = {}
    for each in ordered:
        if each.share("attacked") is not None:
            best.setdefault(str(each.setting["access"]), each)
    return "; ".join(
        f"{access}, {each.setting['attack']['method']} with {each.share('attacked')}" for access, each in best.items()
    )


def _names(erasers: Sequence[Any]) -> str:
    return " + ".join(str(each["method"]) for each in erasers) or "no eraser"


def _guard(erasers: Sequence[Any]) -> str:
    """The erasers with their strengths, in words."""
    strengths = (f", strength {each['strength']:g}" if _is_number(each.get("strength")) else "" for each in erasers)
    words = [f"{each['method']}{strength}" for each, strength in zip(erasers, strengths, strict=True)]
    return " + ".join(words) or "none, so this is the base model"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _prompts(result: AttackResult, shown: int) -> list[dict[str, Any]]:
    found = []
    for each in result.attacked[:shown]:
        arms = []
        for arm in (arm for arm in ARMS if each["pictures"].get(arm)):
            entry, outcome = each["pictures"][arm][0], each["outcomes"][arm][0]
            row = Row(f"{arm}-0", each["prompt"], int(each["seeds"][0]))
            source, small = thumbnail(
                Sample(row, path=files.inside(result.folder, entry["file"]), sha256=entry["sha256"])
            )
            count = sum(value == CONCEPT for value in each["outcomes"][arm])
            name = result.setting["concept"]["name"]
            word = (
                f"{name} seen" if outcome == CONCEPT else "nothing recognisable" if outcome == NOTHING else "not seen"
            )
            arms.append(
                {
                    "label": WORDS[arm],
                    "source": source,
                    "small": small,
                    "veiled": outcome == CONCEPT,
                    "verdict": f"{word} ({count} of {len(each['outcomes'][arm])})",
                }
            )
        best = each["search"].get("attacked", {})
        found.append(
            {
                "prompt": each["prompt"],
                "pictures": arms,
                "veiled": any(arm["veiled"] for arm in arms),
                "proposal": best.get("proposal"),
                "alone": best.get("proposal", {}).get("about") == ALONE,
                "stopped": best.get("stopped", ""),
                "tried": best.get("tried", 0),
                "refused": best.get("refused", []),
            }
        )
    return found
