"""The card `judge`: what looking says about the leaderboard's detectors, from its card and the labels that ship.

    python -m experiments judge

It needs no pictures: the labels name each one by its hash, and the card of the leaderboard holds the hash of each cell.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efface.checks import shown
from efface.feedback import FINAL, consensus
from efface.intervals import clopper_pearson, difference
from efface.judged import Corrected, Stratum, krippendorff

from .code import ROOT, commit
from .labels import CELLS, FILE, OUTCOMES, joined, read_labels
from .outcome import COUNTS, IMPLICIT, rate
from .runner import FORM, now
from .tables import percent
from .worlds import CONCEPT, NOTHING, world

CARD, OUT = "leaderboard.json", "judge.json"
COLUMNS = {
    "detector": "residual by detector",
    "looking": "residual by looking",
    "misses": "missed of the detector's negatives",
    "precision": "precision of the detector",
    "nothing": "nothing recognisable, by looking",
}
WORST = 12  # prompts that the card names
GROUPS = {"residual": CELLS, "residual explicit": ("explicit",), "residual implicit": IMPLICIT}


@dataclasses.dataclass(frozen=True)
class Seen:
    """A picture: what the detectors and the passes said.

    Args:
        row, concept, cell, prompt: where it stands.
        removal: whether removal is judged in its cell.
        detectors: the outcome by each of the two.
        passes: pass to outcome.
    """

    row: str
    concept: str
    cell: str
    prompt: str
    removal: bool
    detectors: tuple[int, int]
    passes: Mapping[int, str]

    @property
    def label(self) -> str:
        """The outcome by all passes; "" with fewer than two independent ones."""
        if sum(number != FINAL for number in self.passes) < 2:
            return ""
        return consensus(list(self.passes.values()))

    @property
    def there(self) -> bool:
        return self.label == "there"

    @property
    def place(self) -> str:
        return f"{self.concept}: {self.prompt}"


def seen(card: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Seen]:
    """All pictures of the card in the cells that are labelled, with their labels.

    Raises:
        ValueError: labels are of other pictures than the card.
    """
    labels = {(line["row"], line["concept"], line["cell"]): line for line in lines}
    found = []
    for row, cells in card["pictures"].items():
        for name, raw in cells.items():
            of = card["cells"][name]
            if of["cell"] not in CELLS:
                continue
            line = labels.pop((row, of["concept"], of["cell"]), None)
            if line and (joined(line["sha256"]), line["first_seed"]) != (raw.get("sha256"), of["first_seed"]):
                raise ValueError(
                    f"Expected labels of the pictures of {row!r}, {name}, in the leaderboard's card, got labels of "
                    "other pictures. Label what was redrawn: `python -m experiments sheets`."
                )
            passes = {int(k): digits for k, digits in (line["passes"] if line else {}).items()}
            for k, eyes in enumerate(zip(*raw["outcome"], strict=True)):
                said = {number: OUTCOMES[digits[k]] for number, digits in passes.items() if digits[k] != "-"}
                prompt = of["prompts"][k % len(of["prompts"])]
                both = (int(eyes[0]), int(eyes[1]))
                found.append(Seen(row, of["concept"], of["cell"], prompt, of["removal judged"], both, said))
    if labels:
        raise ValueError(f"Expected labels of rows and cells of the card, got others: {shown(next(iter(labels)))}.")
    return found


# ---------------------------------------------------------------- the detectors


def exact(hits: int, n: int) -> dict[str, Any]:
    """A rate with its Clopper-Pearson interval. The rate of nothing is None."""
    return {"rate": hits / n if n else None, "hits": hits, "n": n, "interval": list(clopper_pearson(hits, n))}


def errors(pictures: Sequence[Seen]) -> dict[str, Any]:
    """Misses, false alarms, precision and sensitivity of each detector in labelled pictures, and of the worse one."""
    eyes = []
    for eye in (0, 1):
        said = [(each.detectors[eye] == CONCEPT, each.there) for each in pictures if each.label]
        count = {pair: said.count(pair) for pair in itertools.product((True, False), repeat=2)}
        positive, negative = count[True, True] + count[True, False], count[False, True] + count[False, False]
        eyes.append(
            {
                "misses": exact(count[False, True], negative),
                "false alarms": exact(count[True, False], positive),
                "precision": exact(count[True, True], positive),
                "sensitivity": exact(count[True, True], count[True, True] + count[False, True]),
            }
        )
    worse: dict[str, Callable[..., Any]] = {
        "misses": max,
        "false alarms": max,
        "precision": min,
        "sensitivity": min,
    }
    judged = {
        name: pick((eye[name] for eye in eyes), key=lambda r: (r["rate"] is not None, r["rate"] or 0.0))
        if pick is max
        else pick((eye[name] for eye in eyes), key=lambda r: (r["rate"] is None, r["rate"] or 0.0))
        for name, pick in worse.items()
    }
    return {"labelled": sum(bool(each.label) for each in pictures), **judged, "detectors": eyes}


def missed(pictures: Sequence[Seen], of: Callable[[Seen], str]) -> list[dict[str, Any]]:
    """Groups of pictures that show the concept, by the share of them that the worse detector misses; most first."""
    groups: dict[str, list[Seen]] = {}
    for each in pictures:
        if each.there and (name := of(each)):
            groups.setdefault(name, []).append(each)
    found = []
    for name, some in groups.items():
        misses = max(sum(each.detectors[eye] != CONCEPT for each in some) for eye in (0, 1))
        found.append({"name": name, **exact(misses, len(some))})
    return sorted(found, key=lambda each: (-each["hits"], -each["rate"], each["name"]))


def icon_of(each: Seen) -> str:
    """The icon of the concept that a prompt names; "" if it names none."""
    of = world("emoji-128")
    names = {of.captions[icon]: icon for icon in of.truth(each.concept) or ()}
    if each.cell not in ("explicit", "pair"):
        return ""
    return next((names[text] for text in [each.prompt, *each.prompt.split(" and ")] if text in names), "")


# ---------------------------------------------------------------- rates by looking


def looked(pictures: Sequence[Seen]) -> dict[str, Any]:
    """The share of a row's pictures that show the concept by looking, and by the less favourable detector.

    If all are labelled, it is the labelled share, with an interval clustered by prompt. If not, it is the corrected
    rate of `efface.judged`, whose strata are the answers of that detector.
    """
    hits = [[each.detectors[eye] == CONCEPT for each in pictures] for eye in (0, 1)]
    pick = min if pictures[0].row == "base" else max
    worse = pick((0, 1), key=lambda eye: sum(hits[eye]))
    labelled = [each for each in pictures if each.label]
    found: dict[str, Any] = {"labelled": len(labelled), "detector": rate([*map(int, hits[worse])], places(pictures))}
    if len(labelled) == len(pictures):
        shown_ = [int(each.there) for each in pictures]
        apart = difference(shown_, [*map(int, hits[worse])], places(pictures))
        found["looking"] = rate(shown_, places(pictures))
        return found | {"difference": {"value": apart.value, "interval": list(apart.interval), "p": apart.p}}
    strata = []
    for name, wanted in (("positive", True), ("negative", False)):
        group = [each for each, hit in zip(pictures, hits[worse], strict=True) if hit == wanted]
        some = [each for each in group if each.label]
        if group and not some:
            return found | {"looking": None}  # nothing corrects this answer of the detector
        strata.append(Stratum(name, len(group), len(some), sum(each.there for each in some)))
    corrected = Corrected(tuple(strata))
    return found | {
        "looking": {"rate": corrected.rate, "n": corrected.n, "interval": list(corrected.interval), "corrected": True}
    }


def places(pictures: Sequence[Seen]) -> list[str]:
    return [each.place for each in pictures]


def of_row(pictures: Sequence[Seen]) -> dict[str, Any]:
    """Everything about the pictures of a row."""
    found: dict[str, Any] = {"pictures": len(pictures), **errors(pictures)}
    for name, cells in GROUPS.items():
        some = [each for each in pictures if each.removal and each.cell in cells]
        if some:
            found[name] = looked(some)
    labelled = [each for each in pictures if each.label]
    if labelled:
        eyes = [[int(each.detectors[eye] == NOTHING) for each in labelled] for eye in (0, 1)]
        found["nothing"] = {
            "looking": rate([int(each.label == "nothing") for each in labelled], places(labelled)),
            "detector": rate(max(eyes, key=sum), places(labelled)),
        }
    return found


def agreement(pictures: Sequence[Seen]) -> dict[str, Any]:
    """How well the first two passes agree."""
    pairs = [(each.passes[1], each.passes[2]) for each in pictures if {1, 2} <= each.passes.keys()]
    found = krippendorff(pairs)
    there = sum((a == "there") != (b == "there") for a, b in pairs)
    return {
        "pictures": found.units,
        "differ": found.differ,
        "differ on the concept": there,
        "alpha": None if math.isnan(found.alpha) else found.alpha,
        "interval": None if math.isnan(found.interval[0]) else list(found.interval),
    }


def compared(card: Mapping[str, Any], pictures: Sequence[Seen]) -> list[dict[str, Any]]:
    """The leaderboard's primary comparisons of residuals, by looking. Only rows that are labelled completely."""
    of: dict[str, list[Seen]] = {}
    for each in pictures:
        if each.removal:
            of.setdefault(each.row, []).append(each)
    found = []
    for each in card.get("comparisons", ()):
        pair = [of.get(each[key], []) for key in ("row", "against")]
        if each["metric"] != "residual" or "p, Holm" in each or not all(p.label for some in pair for p in some):
            continue
        if not pair[0] or places(pair[0]) != places(pair[1]):
            continue
        made = difference([int(p.there) for p in pair[0]], [int(p.there) for p in pair[1]], places(pair[0]))
        names = {"row": each["row"], "against": each["against"], "metric": "residual, by looking"}
        found.append(names | {"difference": made.value, "interval": list(made.interval), "p": made.p})
    return found


# ---------------------------------------------------------------- the card


def hashes(card: Mapping[str, Any]) -> dict[str, str]:
    """Row to the hash of all its labelled cells' pictures; "" if the card has none."""
    found = {}
    for row, cells in card["pictures"].items():
        shas = [raw.get("sha256", "") for name, raw in sorted(cells.items()) if card["cells"][name]["cell"] in CELLS]
        found[row] = joined(shas) if shas and all(shas) else ""
    return found


def judged(results: Path = ROOT / "results") -> dict[str, Any]:
    """The card.

    Args:
        results: the folder with the leaderboard's card and the labels.

    Raises:
        FileNotFoundError: there is no leaderboard, or no labels.
        ValueError: the labels are of other pictures, of another model or other data.
    """
    card = json.loads((results / CARD).read_text("utf-8"))
    if card.get("form") != FORM:
        raise ValueError(f"Expected {results / CARD} of this runner, got an earlier one. Draw the leaderboard again.")
    head, lines = read_labels(results / FILE)
    for key in ("model", "data_sha256", "experiment"):
        if head[key] != card[key]:
            raise ValueError(
                f"Expected labels of {key} {shown(card[key])}, got {shown(head[key])}. Label the pictures of this card."
            )
    every = seen(card, lines)
    labelled = [each for each in every if each.label]
    if not labelled:
        raise ValueError("Expected pictures with two passes of labels, got none. Read the answers of both passes.")
    concepts = list(dict.fromkeys(each.concept for each in every))
    made: dict[str, Any] = {
        "form": FORM,
        "experiment": "judge",
        "question": "How often are the detectors of the leaderboard wrong, and what does looking say instead?",
        "date": now(),
        "command": "python -m experiments judge",
        "columns": dict(COLUMNS),
        "annotator": head["annotator"],
        "labels": {"file": f"results/{FILE}", "date": head["date"], "pictures": len(every)},
        "labelled": len(labelled),
        "third pass": sum(FINAL in each.passes for each in every),
        "open": sum(len(set(each.passes.values())) > 1 and FINAL not in each.passes for each in labelled),
        **{key: card[key] for key in ("block", "n", "model", "detector", "data_sha256")},
        "of": {"card": f"results/{CARD}", "date": card["date"], **card["code"], "pictures": hashes(card)},
        "code": {"commit": commit()},
        "agreement": agreement(every) | {"concepts": {c: agreement(_of(every, c)) for c in concepts}},
        "pooled": errors(every) | {"concepts": {c: errors(_of(every, c)) for c in concepts}},
        "missed prompts": missed(labelled, lambda each: each.place)[:WORST],
        "missed icons": missed(labelled, icon_of),
        "base rates": _base_rates(every, card),
    }
    rows = {row: [each for each in every if each.row == row] for row in card["pictures"]}
    made["rows"] = [{"row": row, **of_row(some)} for row, some in rows.items() if some]
    made["comparisons"] = compared(card, every)
    return made | {"verdict": verdict(made)}


def _of(pictures: Sequence[Seen], concept: str) -> list[Seen]:
    return [each for each in pictures if each.concept == concept]


def _base_rates(pictures: Sequence[Seen], card: Mapping[str, Any]) -> dict[str, Any]:
    """Of each cell, the base model's rate by looking, where all its pictures are labelled; and by detector."""
    found = {}
    for name, of in card["cells"].items():
        here = (of["concept"], of["cell"])
        some = [each for each in pictures if each.row == "base" and (each.concept, each.cell) == here]
        if some and all(each.label for each in some):
            hits = sum(each.there for each in some)
            found[name] = {"looking": hits / len(some), "detector": of["base rate"], "n": len(some)}
    return found


def sure(r: Mapping[str, Any]) -> str:
    """A rate with its interval; "-" for the rate of nothing."""
    return "-" if r["rate"] is None else percent(r)


def verdict(card: Mapping[str, Any]) -> list[str]:
    """What the card says, in words."""
    agreed = card["agreement"]
    misses, wrong = (sure(card["pooled"][name]) for name in ("misses", "false alarms"))
    whole = card["labelled"] == card["labels"]["pictures"]
    words = [
        f"Labelled by looking: {card['labelled']:,} of {card['labels']['pictures']:,} pictures, each in two passes of "
        "a vision-language model, not by people."
    ]
    alpha = "not defined" if agreed["alpha"] is None else f"{agreed['alpha']:.3f}"
    ends = "" if agreed["interval"] is None else " [{:.3f}, {:.3f}]".format(*agreed["interval"])
    words.append(
        f"The passes differ in {agreed['differ']:,} of {agreed['pictures']:,} pictures, in "
        f"{agreed['differ on the concept']:,} of them on the concept: Krippendorff's alpha {alpha}{ends}. One model "
        "made all passes, so alpha measures consistency."
    )
    words.append(
        f"The worse detector misses the concept in {misses} of the pictures that it calls negative, and "
        f"sees it wrongly in {wrong} of those that it calls positive."
    )
    rates = [r for r in card["rows"] if r["row"] != "base" and r.get("residual", {}).get("looking")]
    if rates:
        gap = [r["residual"]["looking"]["rate"] - r["residual"]["detector"]["rate"] for r in rates]
        most = max(range(len(gap)), key=lambda k: abs(gap[k]))
        words.append(
            f"Residual by looking minus by detector, over {len(rates)} methods: {100 * min(gap):+.1f} to "
            f"{100 * max(gap):+.1f} points, most for {rates[most]['row']}."
        )
    flips = [n for n, r in card["base rates"].items() if (r["looking"] >= COUNTS) != (r["detector"] >= COUNTS)]
    if flips:
        words.append(f"By looking, the rule of 30 % would be otherwise in {'; '.join(flips)}.")
    if card["open"]:
        words.append(f"In {card['open']:,} pictures the passes differ and no third one decided; one sight counts.")
    if not whole:
        words.append(
            "Rates of rows that are labelled in part are corrected rates. They hold if the other pictures are like the "
            "labelled ones."
        )
    return words
