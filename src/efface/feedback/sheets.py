"""Numbered contact sheets with a file for the answers, for those who have no browser.

sheet-01.png    numbered pictures, and so on; one set per line if they are ranked
answers.csv     a line for each number; the annotator writes an answer after the comma
answers-01.csv  one for each sheet, if the layout sets `apart`
sheets.json     what picture each number is; without method, prompt and the detector's answer
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .. import checks, files
from ..pictures import png
from .judgement import Judgement
from .session import SET, Item, Ranking, Session, details_of
from .store import Store

TEXT, GAP = 20, 8
ANSWERS, SHEETS = "answers.csv", "sheets.json"
AGAIN = "Write the sheets again, with --sheets."
MEANINGS = {
    "label": {"1": "there", "2": "other", "3": "nothing"},
    "binary": {"1": "yes", "2": "no"},
    "ranking": {**{str(k): str(k) for k in range(1, SET + 1)}, "x": "x"},
}
"""Kind to what an annotator writes, and to its outcome."""
HEADS = {
    "label": """# Looked for: {concept}. Write 1, 2 or 3 after each comma.
#   1  {concept} is there
#   2  something else is recognisable
#   3  nothing is recognisable
""",
    "binary": """# Looked for: {concept}. Write 1 or 2 after each comma.
#   1  the picture shows it
#   2  the picture does not show it
""",
    "ranking": """# Looked for: {concept}. Each line of a sheet is a set. Write a rank or x after each comma.
#   1  shows most of it, 2 less, and so on; equal numbers are a tie
#   x  does not show it
# A set counts once all its pictures have an answer.
""",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How contact sheets look.

    Args:
        columns: pictures in a line, at least 5.
        rows: lines of a sheet, 1 or more.
        side: the longer side of a picture, 16 to 1024 pixels. Pictures are enlarged without smoothing if the factor is
            a whole number.
        apart: whether each sheet gets its own file for the answers, so that several people share a pass.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> from efface.feedback import Layout
        >>> Layout(columns=8, rows=6, side=176).size(6)
        (1480, 1232)
    """

    columns: int = 6
    rows: int = 4
    side: int = 160
    apart: bool = False

    def __post_init__(self) -> None:
        checks.whole("columns", self.columns, SET)
        checks.whole("rows", self.rows, 1)
        checks.whole("side", self.side, 16, 1024)

    def size(self, lines: int) -> tuple[int, int]:
        """The width and height of a sheet with that many lines, in pixels."""
        return GAP + (self.side + GAP) * self.columns, GAP + (self.side + TEXT + GAP) * lines


def write_sheets(session: Session, folder: str | Path, layout: Layout | None = None) -> list[Path]:
    """Writes the pictures that have no answer yet as contact sheets, with an empty file for the answers.

    Args:
        session: the annotator's pass.
        folder: a new or empty folder.
        layout: how the sheets look. Default: 6 x 4 pictures of 160 pixels, one file for all answers.

    Returns:
        The sheets.

    Raises:
        ValueError: the folder holds files, nothing is left to judge, or a picture has another SHA-256 than recorded.
        FileNotFoundError: a picture is missing.
    """
    how = layout or Layout()
    folder, groups = Path(folder), [[session.items[place] for place in session.shown(k)] for k in session.left]
    if not isinstance(session, Ranking):
        one = [item for group in groups for item in group]
        groups = [one[k : k + how.columns] for k in range(0, len(one), how.columns)]
    items = [item for group in groups for item in group]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected a new or empty folder for the sheets, got {folder}. Name another one.")
    if not items:
        raise ValueError("Nothing is left to judge in this pass, so there are no sheets to write. Name another pass.")
    pictures = [[_shown(item, how.side) for item in group] for group in groups]
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    sizes: list[int] = []
    for start in range(0, len(groups), how.rows):
        lines = pictures[start : start + how.rows]
        made.append(folder / f"sheet-{len(made) + 1:02d}.png")
        files.write(made[-1], png(_sheet(lines, 1 + sum(sizes), how)))
        sizes.append(sum(map(len, lines)))
    listed = [_listed(session, item) for item in items]
    facts = {"kind": session.kind, "concept": session.concept, "annotator": session.annotator, "pass": session.number}
    apart = {"sheets": sizes} if how.apart else {}
    files.write_json(folder / SHEETS, {"format": 1, **facts, **apart, "items": listed})
    head = HEADS[session.kind].format(concept=" ".join(session.concept.split()))
    for name, numbers in _answer_files(apart | {"items": items}).items():
        files.write(folder / name, f"{head}number,answer\n{''.join(f'{k},{chr(10)}' for k in numbers)}")
    return made


def _answer_files(facts: Mapping[str, Any]) -> dict[str, range]:
    """The files for the answers, and the numbers of each."""
    if not facts.get("sheets"):
        return {ANSWERS: range(1, len(facts["items"]) + 1)}
    found, first = {}, 1
    for k, size in enumerate(facts["sheets"], 1):
        found[f"answers-{k:02d}.csv"] = range(first, first + size)
        first += size
    return found


def _listed(session: Session, item: Item) -> dict[str, str]:
    """An item as sheets.json holds it."""
    more = {} if session.kind == "label" else {"model": item.model}
    more |= {"set": session.name_of_set(item.picture)} if isinstance(session, Ranking) else {}
    return {"run": item.run, "row": item.row, "picture": item.picture, **more}


def _shown(item: Item, side: int) -> Image.Image:
    picture = item.read()
    factor = side / max(picture.size)
    how = Image.Resampling.NEAREST if factor in range(1, side + 1) else Image.Resampling.LANCZOS
    return picture.resize([max(round(length * factor), 1) for length in picture.size], how)


def _sheet(lines: Sequence[Sequence[Image.Image]], first: int, layout: Layout) -> Image.Image:
    """Lines of pictures, each picture under its number."""
    wide, high = layout.side + GAP, layout.side + TEXT + GAP
    out = Image.new("RGB", layout.size(len(lines)), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(16)
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            x, y = GAP + wide * column, GAP + high * row
            draw.text((x, y), str(first), fill="black", font=font)
            out.paste(picture, (x, y + TEXT))
            first += 1
    return out


def read_sheets(folder: str | Path) -> tuple[dict[str, Any], dict[int, str]]:
    """Reads the answers of contact sheets.

    Args:
        folder: what `write_sheets` wrote, with answers filled in.

    Returns:
        The content of sheets.json, and number to outcome for the answers that are filled in. Of rankings, only complete
        sets count.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a number is not on the sheets or occurs twice, or an answer is none of the possible ones. The
            message has the line.
    """
    from .. import schema
    from .forms import SheetsFile

    folder = Path(folder)
    facts: dict[str, Any] = schema.read(_there(folder, SHEETS), SheetsFile, AGAIN)
    found: dict[int, str] = {}
    for name, numbers in _answer_files(facts).items():
        found |= _answers(_there(folder, name), numbers, facts)
    if _kind(facts) == "ranking":
        names = [entry.get("set", "") for entry in facts["items"]]
        open_ = {name for number, name in enumerate(names, 1) if number not in found}
        found = {number: outcome for number, outcome in found.items() if names[number - 1] not in open_}
    return facts, found


def _there(folder: Path, name: str) -> Path:
    if not files.there(folder / name):
        raise FileNotFoundError(f"{folder} has no {name}, so it holds no contact sheets. {AGAIN}")
    return files.inside(folder, name)


def _answers(path: Path, numbers: range, facts: Mapping[str, Any]) -> dict[int, str]:
    """The answers of a file that are filled in."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    for line, text in enumerate(files.read_text(path).splitlines(), 1):
        if not text.strip() or text.lstrip().startswith(("#", "number")):
            continue
        number, answer = _line(text, f"line {line} of {path}", numbers, _possible(facts))
        if number in seen:
            raise ValueError(f"Expected number {number} once in {path}, got it again in line {line}. Delete one.")
        seen.add(number)
        if answer:
            found[number] = MEANINGS[_kind(facts)][answer]
    return found


def _kind(facts: Mapping[str, Any]) -> str:
    return str(facts.get("kind", "label"))


def _possible(facts: Mapping[str, Any]) -> list[str]:
    return list(MEANINGS[_kind(facts)])


def _line(text: str, where: str, numbers: range, possible: Sequence[str]) -> tuple[int, str]:
    """The number and the answer of a line, which is empty or one of the possible ones."""
    cells = [cell.strip(' "') for cell in re.split("[,;\t]", text)]  # spreadsheets differ in separator and quotes
    number = int(cells[0]) if re.fullmatch("[0-9]{1,9}", cells[0]) else 0
    if number not in numbers:
        ends = f"a number from {numbers[0]} to {numbers[-1]} in {where}"
        raise ValueError(checks.refusal(ends, text, "Use the numbers of the sheets."))
    if any(cells[2:]):
        raise ValueError(checks.refusal(f"one answer in {where}", text, "Write NUMBER,ANSWER."))
    answer = cells[1].lower() if len(cells) > 1 else ""
    if answer not in ("", *possible):
        words = f"{', '.join(possible[:-1])} or {possible[-1]}"
        raise ValueError(checks.refusal(f"the answer {words} in {where}", answer, "Correct it, and read again."))
    return number, answer


def judgements_of(store: Store, facts: Mapping[str, Any], found: Mapping[int, str], time: str) -> list[Judgement]:
    """The judgements of filled-in sheets.

    Args:
        store: for labels, the store from which the pictures were drawn.
        facts, found: what `read_sheets` returned.
        time: when the answers were read.

    Raises:
        ValueError: a labelled picture is not in the sample of the store, or has another SHA-256 there.
    """
    if (kind := _kind(facts)) != "label":
        return [_feedback(facts, facts["items"][number - 1], kind, found[number], time) for number in sorted(found)]
    made, samples = [], {}
    for run in {entry["run"] for entry in facts["items"]}:
        samples[run] = store.sample(run, facts["concept"]) or {"rows": {}}
    for number, outcome in sorted(found.items()):
        entry = facts["items"][number - 1]
        sample = samples[entry["run"]]
        picture, stratum = sample["rows"].get(entry["row"], ("", ""))
        if picture != entry["picture"]:
            raise ValueError(
                f"Expected picture {number} of the sheets to be one that {store.name} has drawn for labelling, got row "
                f"{entry['row']!r} of another run or version. {AGAIN}"
            )
        looked = (facts["concept"], facts["annotator"], facts["pass"], outcome, time)
        details = details_of(sample, stratum)
        made.append(Judgement(entry["run"], sample["model"], entry["row"], picture, *looked, details=details))
    return made


def _feedback(facts: Mapping[str, Any], entry: Mapping[str, Any], kind: str, outcome: str, time: str) -> Judgement:
    looked = (facts["concept"], facts["annotator"], facts["pass"], outcome, time, kind)
    details = {"set": entry["set"]} if "set" in entry else {}
    place = (entry["run"], entry.get("model", ""), entry["row"], entry["picture"])
    return Judgement(*place, *looked, details=details)
