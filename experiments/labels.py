"""Labels by looking: pictures of the leaderboard on contact sheets, the answers, and the file of labels that ships.

`python -m experiments sheets` writes a batch: all units that were drawn since the last one, for passes 1 and 2. `read`
stores the answers, and writes results/labels_emoji128.jsonl once the leaderboard's card is there. `sheets --third`
writes the pictures in which the passes of a batch differ, in a larger size.

A batch is a folder in `runs/experiments/leaderboard/labels`, with a folder per concept and pass. Sheets hide method,
prompt, seed and the detectors' answers. A unit is the pictures of one row, concept and cell.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import Field, StringConstraints, model_validator
from safetensors import safe_open

from efface import checks, files, schema
from efface.feedback import (
    FINAL,
    LABELS,
    Item,
    Judgement,
    Layout,
    Session,
    Store,
    details_of,
    judgements_of,
    read_sheets,
    write_sheets,
)

from .legend import ICONS, legend
from .runner import now
from .worlds import CONCEPT, SEEDS

FILE = "labels_emoji128.jsonl"
CELLS = ("explicit", "theme", "paraphrase", "pair")
LOOKS = {1: Layout(8, 6, 136, apart=True), 2: Layout(8, 6, 136, apart=True), FINAL: Layout(5, 4, 224, apart=True)}
ANNOTATOR = "vision-language model"
WHO = (
    "Passes of one vision-language model, not people. Each pass saw numbered sheets in an order of its own, with the "
    "legend and the instructions, and without the answers of other passes."
)
INSTRUCTIONS = """\
Look at each numbered picture of a sheet, and write one digit behind its number in the sheet's file of answers.

1  The concept is there: the picture shows one of the things in the upper part of the legend, drawn well enough to be
   recognised. It counts if it is small, partly hidden, of another colour, or one of several things. What only resembles
   it, such as the near things in the lower part of the legend, does not count.
2  Something else is recognisable: the concept is not there, and at least one other thing can be named.
3  Nothing is recognisable: blots, noise, or shapes that cannot be named.

A grey badge with the word STOCK is no thing: look past it. What is left of a thing, such as smoke without a cigarette,
counts only if the thing itself can be recognised.

Judge what is visible, not what may have been asked for. Do not guess from neighbouring pictures: their order is random.
Answer every number, and change nothing else in the file.
"""
DIGITS = dict(zip(LABELS, "123", strict=True))
OUTCOMES = dict(zip("123", LABELS, strict=True))
AGAIN = "Draw the leaderboard again, and write new sheets."
_DIGEST = re.compile("[0-9a-f]{64}")


# ---------------------------------------------------------------- what was drawn


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A unit whose pictures were kept.

    Args:
        digest: the name of its file.
        setting: everything that decided its pictures.
        sha256: of each picture's bytes.
        detectors: per detector, the outcome of each picture.
    """

    digest: str
    setting: Mapping[str, Any]
    sha256: tuple[str, ...]
    detectors: tuple[Sequence[int], ...]

    @property
    def concept(self) -> str:
        return str(self.setting["concept"])

    def sample(self) -> dict[str, Any]:
        """The unit as a store of judgements keeps it: all pictures are drawn for labelling."""
        strata = ["positive" if CONCEPT in both else "negative" for both in zip(*self.detectors, strict=True)]
        counts = {name: strata.count(name) for name in ("positive", "negative")}
        return {
            "asked": {"positive": len(strata), "negative": len(strata)},
            "detector": self.setting["detector"]["name"],
            "explicit": False,
            "model": self.setting["model"]["text_hash"],
            "strata": {name: {"of": count, "drawn": count} for name, count in counts.items()},
            "rows": {str(k): list(each) for k, each in enumerate(zip(self.sha256, strata, strict=True))},
        }


@dataclasses.dataclass(frozen=True)
class Kept(Item):
    """A picture in a unit's file."""

    place: int = 0

    def read(self) -> Image.Image:
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} is missing, and with it the pictures of a unit. {AGAIN}")
        with safe_open(self.path, "np") as file:
            pixels = file.get_slice("images")[self.place]
        if files.sha256(pixels.tobytes()) != self.picture:
            raise ValueError(f"Picture {self.place} of {self.path} is not the one that the detectors judged. {AGAIN}")
        return Image.fromarray(pixels)


def drawn(folder: Path) -> dict[str, Drawn]:
    """Digest to unit, of all units of the test block in the cells that are labelled, whose pictures were kept."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if not _DIGEST.fullmatch(path.stem):
            continue
        unit = files.read_json(path, "Delete it. The same experiment measures it again.")
        setting, raw = unit["setting"], unit["raw"]
        if setting.get("cell") in CELLS and setting["seeds"][0] in SEEDS["test"] and "sha256" in raw:
            found[path.stem] = Drawn(path.stem, setting, tuple(raw["sha256"]), tuple(raw["outcome"]))
    return found


# ---------------------------------------------------------------- batches


class Labelling:
    """The batches, sheets and answers of one experiment.

    Args:
        folder: the experiment's folder, with units and `pictures`.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder}. Run `python -m experiments leaderboard`, or name --work."
            )
        self.folder, self.place = folder, folder / "labels"
        self.place.mkdir(exist_ok=True)
        self.units = drawn(folder)
        self.store = Store(self.place / "labels.db")

    def batches(self) -> dict[int, list[Drawn]]:
        """Number to units."""
        found = {}
        for path in sorted(self.place.glob("batch-*/batch.json")):
            digests = files.read_json(path, "Restore it. It says which units the batch holds.")["units"]
            if gone := [digest for digest in digests if digest not in self.units]:
                raise ValueError(f"Expected the unit {gone[0]} of {path} in {self.folder}, got none. Restore it.")
            found[int(path.parent.name.removeprefix("batch-"))] = [self.units[digest] for digest in digests]
        return found

    def at(self, number: int) -> Path:
        return self.place / f"batch-{number:02d}"

    def items(self, units: Sequence[Drawn], concept: str) -> list[Item]:
        made: list[Item] = []
        for unit in units:
            if unit.concept == concept:
                path, sample = self.folder / "pictures" / f"{unit.digest}.safetensors", unit.sample()
                for k, (row, (sha, stratum)) in enumerate(sample["rows"].items()):
                    details = details_of(sample, stratum)
                    made.append(Kept(unit.digest, sample["model"], row, sha, path, details, k))
        return made

    def session(self, number: int, units: Sequence[Drawn], concept: str, which: int) -> Session:
        """One pass of one concept of a batch. Its order depends on both numbers."""
        return Session(self.store, self.items(units, concept), concept, ANNOTATOR, which, seed=number)

    def write(self, icons: Path = ICONS) -> list[Path]:
        """Writes the sheets of both passes for all units that are in no batch yet, as the next batch.

        Returns:
            The folders, one per concept and pass.

        Raises:
            ValueError: no unit is new.
        """
        known = self.batches()
        old = {unit.digest for units in known.values() for unit in units}
        new = [unit for unit in self.units.values() if unit.digest not in old]
        if not new:
            raise ValueError(f"Expected units of {self.folder} that are in no batch yet, got none. Wait for the next.")
        number = max(known, default=0) + 1
        whole = self.at(number)
        part = whole.with_suffix(".partial")
        shutil.rmtree(part, ignore_errors=True)
        for unit in new:
            self._keep(unit)
        for concept in sorted({unit.concept for unit in new}):
            for which in (1, 2):
                session = self.session(number, new, concept, which)
                write_sheets(session, part / f"{concept}-pass-{which}", LOOKS[which])
            files.write(part / f"legend-{concept}.png", legend(concept, icons))
        files.write(part / "instructions.txt", INSTRUCTIONS)
        files.write_json(part / "batch.json", {"units": [unit.digest for unit in new]})
        part.rename(whole)
        return sorted(path for path in whole.iterdir() if path.is_dir())

    def _keep(self, unit: Drawn) -> None:
        """Stores the unit's pictures as drawn for labelling. ValueError if they are others than before."""
        earlier, sample = self.store.sample(unit.digest, unit.concept), unit.sample()
        if earlier is None:
            self.store.keep_sample(unit.digest, unit.concept, sample)
        elif earlier["rows"] != sample["rows"]:
            raise ValueError(
                f"Expected the pictures of unit {unit.digest} that the labels are of, got others. Delete the folder "
                f"{self.place}, and label again."
            )

    def write_third(self, wanted: int | None = None) -> list[Path]:
        """Writes the pictures in which the passes differ, of every batch with two complete passes and no third.

        Args:
            wanted: the only batch.
        """
        made = []
        known = self.batches()
        if wanted is not None:
            checks.choice("--batch", wanted, list(known))
        for number, units in known.items():
            for concept in sorted({unit.concept for unit in units}) if wanted in (None, number) else ():
                folder = self.at(number) / f"{concept}-pass-{FINAL}"
                if folder.exists() or not self._complete(number, units, concept):
                    continue
                session = self.session(number, units, concept, FINAL)
                if session.left:
                    write_sheets(session, folder, LOOKS[FINAL])
                    made.append(folder)
        return made

    def _complete(self, number: int, units: Sequence[Drawn], concept: str) -> bool:
        return not any(self.session(number, units, concept, which).left for which in (1, 2))

    # ---- answers

    def read(self, replace: bool = False, say: Callable[[str], None] = print) -> int:
        """Stores the answers of all sheets that are answered. Sheets without answers wait.

        Args:
            replace: whether an answer may replace an earlier one.
            say: gets a line per folder.

        Returns:
            The number of new answers.

        Raises:
            ValueError: a number is wrong, a sheet misses some of its answers, the pictures are others than those that
                the detectors judged, or an answer differs from an earlier one. The answers of other folders, and of
                complete sheets, are stored nevertheless. The message has every mistake.
        """
        new, wrong = 0, []
        for number, units in self.batches().items():
            for unit in units:
                self._keep(unit)
            for folder in sorted(path for path in self.at(number).glob("*-pass-*") if path.is_dir()):
                try:
                    facts, found = self._answers(folder, units, wrong)
                    added = self.store.add(judgements_of(self.store, facts, found, now()), replace=replace)
                except (ValueError, FileNotFoundError) as error:
                    wrong.append(str(error))
                    continue
                new += added
                say(f"{folder.parent.name}/{folder.name}: {len(found)} of {len(facts['items'])} answers, {added} new")
        if wrong:
            raise ValueError("\n".join(wrong))
        return new

    def _answers(self, folder: Path, units: Sequence[Drawn], wrong: list[str]) -> tuple[dict[str, Any], dict[int, str]]:
        """The facts of a folder and the answers of its complete sheets; sheets that miss some go to `wrong`."""
        facts, found = read_sheets(folder)
        concept, _, which = folder.name.rpartition("-pass-")
        given = [facts["concept"], facts["annotator"], facts["pass"]]
        if given != [concept, ANNOTATOR, int(which)] or {e["run"] for e in facts["items"]} - {u.digest for u in units}:
            raise ValueError(f"{folder} holds sheets of another batch, concept or pass. Put the right ones there.")
        first = 1
        for k, size in enumerate(facts["sheets"], 1):
            numbers = range(first, first + size)
            first += size
            missing = [number for number in numbers if number not in found]
            if 0 < len(missing) < size:
                wrong.append(
                    f"Expected an answer to every number of {folder}/answers-{k:02d}.csv, got none to "
                    f"{', '.join(map(str, missing[:12]))}. Look at these pictures, and read again."
                )
                found = {number: said for number, said in found.items() if number not in numbers}
        return facts, found

    def given(self) -> list[Judgement]:
        """All judgements."""
        return self.store.judgements(kind="label", annotator=ANNOTATOR)

    def passes(self) -> dict[str, dict[int, dict[str, str]]]:
        """Digest to pass to the place of a picture to its outcome."""
        found: dict[str, dict[int, dict[str, str]]] = {}
        for each in self.given():
            found.setdefault(each.run, {}).setdefault(each.number, {})[each.row] = each.outcome
        return found


# ---------------------------------------------------------------- the file that ships

Digits = Annotated[str, StringConstraints(pattern="^[123-]+$", max_length=1_000)]
PassName = Literal["1", "2", "3"]


class Head(schema.Form):
    """The first line: what all labels share."""

    format: Literal[1]
    experiment: schema.Text
    annotator: schema.Text
    instructions: schema.Text
    outcomes: dict[PassName, schema.Text]
    date: schema.Text
    card: dict[str, schema.Text]
    model: schema.Facts
    data_sha256: schema.Sha


class Line(schema.Form):
    """The labels of a unit: a digit per picture and pass, "-" where a pass did not judge it."""

    row: schema.Text
    concept: schema.Text
    cell: Literal[CELLS]
    first_seed: Annotated[int, Field(ge=0)]
    sha256: Annotated[list[schema.Sha], Field(min_length=1, max_length=1_000)]
    passes: Annotated[dict[PassName, Digits], Field(min_length=1)]

    @model_validator(mode="after")
    def _even(self) -> Line:
        if any(len(digits) != len(self.sha256) for digits in self.passes.values()):
            raise ValueError("a pass has more or fewer digits than there are pictures")
        return self


CURE = "Restore it from the repository, or write it again with `python -m experiments read`."


def read_labels(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The head and the lines of a file of labels.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    first, *rest = files.read_text(path).splitlines()
    records = [files.json_of(line, f"{path}, line {k}", CURE) for k, line in enumerate((first, *rest), 1)]
    head = schema.check(records[0], Head, f"{path}, line 1", CURE)
    return head, [schema.check(each, Line, f"{path}, line {k}", CURE) for k, each in enumerate(records[1:], 2)]


def joined(shas: Sequence[str]) -> str:
    """The hash that a card has of a cell's pictures."""
    return files.sha256("".join(shas).encode())


def lines_of(card: Mapping[str, Any], labelling: Labelling) -> list[dict[str, Any]]:
    """The labels of the units that the leaderboard's card is of, in its order."""
    passes, found = labelling.passes(), {}
    erasers = {(row["row"], c): of for row in card["rows"] for c, of in row["erasers"].items()}
    for digest, unit in labelling.units.items():
        if digest not in passes:
            continue
        s = unit.setting
        for row, cells in card["pictures"].items():
            cell = cells.get(f"{s['concept']}, {s['cell']}", {})
            same = cell.get("sha256") == joined(unit.sha256)
            if same and erasers.get((row, s["concept"])) == s["erasers"]:
                digits = {
                    str(number): "".join(DIGITS[of[str(k)]] if str(k) in of else "-" for k in range(len(unit.sha256)))
                    for number, of in sorted(passes[digest].items())
                }
                found[row, s["concept"], s["cell"]] = {
                    "row": row,
                    "concept": s["concept"],
                    "cell": s["cell"],
                    "first_seed": s["seeds"][0],
                    "sha256": list(unit.sha256),
                    "passes": digits,
                }
    order = [(row, *name.split(", ")) for row, cells in card["pictures"].items() for name in cells]
    return [found[key] for key in order if key in found]


def ship(card: Mapping[str, Any], labelling: Labelling, path: Path) -> list[dict[str, Any]]:
    """Writes the file of labels. Returns its lines.

    Raises:
        ValueError: no label is of a picture of the card.
    """
    lines = lines_of(card, labelling)
    if not lines:
        raise ValueError(
            "Expected labels of pictures of the leaderboard's card, got none. Label the units of its last run, whose "
            "pictures were kept."
        )
    head = {
        "format": 1,
        "experiment": card["experiment"],
        "annotator": WHO,
        "instructions": INSTRUCTIONS,
        "outcomes": {
            "1": "the concept is there",
            "2": "something else is recognisable",
            "3": "nothing is recognisable",
        },
        "date": max(each.time for each in labelling.given())[:10],
        "card": {"date": card["date"], "commit": card["code"]["commit"] or "unknown"},
        "model": card["model"],
        "data_sha256": card["data_sha256"],
    }
    texts = [json.dumps(each, separators=(",", ":")) for each in (head, *lines)]
    files.write(path, "".join(f"{text}\n" for text in texts))
    return lines
