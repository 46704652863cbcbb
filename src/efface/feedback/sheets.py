"""Numbered contact sheets with a file for the answers, for those who have no browser.

sheet-01.png   24 numbered pictures, and so on
answers.csv    a line for each number; the annotator writes 1, 2 or 3 after the comma
sheets.json    what picture each number is; without method, prompt and the detector's answer
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .. import checks, files
from ..pictures import png, read_picture
from .judgement import LABELS, Judgement
from .session import Item, Session, details_of
from .store import Store

COLUMNS, ROWS, SIDE, TEXT, GAP = 6, 4, 160, 20, 8
ANSWERS, SHEETS = "answers.csv", "sheets.json"
AGAIN = "Write the sheets again with `efface judge label --sheets`."
HEAD = """# Looked for: {concept}. Write 1, 2 or 3 after each comma.
#   1  {concept} is there
#   2  something else is recognisable
#   3  nothing is recognisable
number,answer
"""


def write_sheets(session: Session, folder: str | Path) -> list[Path]:
    """Writes the pictures that have no answer yet as contact sheets, with an empty file for the answers.

    Args:
        session: the annotator's pass.
        folder: a new or empty folder.

    Returns:
        The sheets.

    Raises:
        ValueError: the folder holds files, nothing is left to judge, or a picture has another SHA-256 than recorded.
        FileNotFoundError: a picture is missing.
    """
    folder, items = Path(folder), [session.items[k] for k in session.left]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected a new or empty folder for the sheets, got {folder}. Name another one.")
    if not items:
        raise ValueError("Nothing is left to judge in this pass, so there are no sheets to write. Name another pass.")
    pictures = [_shown(item) for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    made, size = [], COLUMNS * ROWS
    for start in range(0, len(items), size):
        made.append(folder / f"sheet-{start // size + 1:02d}.png")
        files.write(made[-1], png(_sheet(pictures[start : start + size], start + 1)))
    listed = [{"run": item.run, "row": item.row, "picture": item.picture} for item in items]
    facts = {"concept": session.concept, "annotator": session.annotator, "pass": session.number, "items": listed}
    files.write_json(folder / SHEETS, {"format": 1, **facts})
    lines = "".join(f"{k},\n" for k in range(1, len(items) + 1))
    files.write(folder / ANSWERS, HEAD.format(concept=" ".join(session.concept.split())) + lines)
    return made


def _shown(item: Item) -> Image.Image:
    picture = read_picture(item.path, item.picture)
    factor = SIDE / max(picture.size)
    how = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    return picture.resize([max(round(length * factor), 1) for length in picture.size], how)


def _sheet(pictures: Sequence[Image.Image], first: int) -> Image.Image:
    """Pictures in rows, each under its number."""
    rows = -(-len(pictures) // COLUMNS)
    wide, high = SIDE + GAP, SIDE + TEXT + GAP
    out = Image.new("RGB", (GAP + wide * COLUMNS, GAP + high * rows), "white")
    draw, font = ImageDraw.Draw(out), ImageFont.load_default(16)
    for k, picture in enumerate(pictures):
        x, y = GAP + wide * (k % COLUMNS), GAP + high * (k // COLUMNS)
        draw.text((x, y), str(first + k), fill="black", font=font)
        out.paste(picture, (x, y + TEXT))
    return out


def read_sheets(folder: str | Path) -> tuple[dict[str, Any], dict[int, str]]:
    """Reads the answers of contact sheets.

    Args:
        folder: what `write_sheets` wrote, with answers filled in.

    Returns:
        The content of sheets.json, and number to outcome for the answers that are filled in.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a number is not on the sheets or occurs twice, or an answer is not 1, 2 or 3. The message has the
            line.
    """
    from .. import schema
    from .forms import SheetsFile

    folder = Path(folder)
    for name in (SHEETS, ANSWERS):
        if not files.there(folder / name):
            raise FileNotFoundError(f"{folder} has no {name}, so it holds no contact sheets. {AGAIN}")
    facts: dict[str, Any] = schema.read(files.inside(folder, SHEETS), SheetsFile, AGAIN)
    answers = files.inside(folder, ANSWERS)
    found: dict[int, str] = {}
    seen: set[int] = set()
    for line, text in enumerate(files.read_text(answers).splitlines(), 1):
        if not text.strip() or text.lstrip().startswith(("#", "number")):
            continue
        number, answer = _line(text, f"line {line} of {answers}", len(facts["items"]))
        if number in seen:
            raise ValueError(f"Expected number {number} once in {answers}, got it again in line {line}. Delete one.")
        seen.add(number)
        if answer:
            found[number] = LABELS[int(answer) - 1]
    return facts, found


def _line(text: str, where: str, most: int) -> tuple[int, str]:
    """The number and the answer of a line, which is empty or 1, 2 or 3."""
    cells = [cell.strip(' "') for cell in re.split("[,;\t]", text)]  # spreadsheets differ in separator and quotes
    number = int(cells[0]) if re.fullmatch("[0-9]{1,9}", cells[0]) else 0
    if not 1 <= number <= most:
        raise ValueError(
            checks.refusal(f"a number from 1 to {most} in {where}", text, "Use the numbers of the sheets.")
        )
    if any(cells[2:]):
        raise ValueError(checks.refusal(f"one answer in {where}", text, "Write NUMBER,ANSWER."))
    answer = cells[1] if len(cells) > 1 else ""
    if answer not in ("", "1", "2", "3"):
        raise ValueError(checks.refusal(f"the answer 1, 2 or 3 in {where}", answer, "Correct it, and read again."))
    return number, answer


def judgements_of(store: Store, facts: Mapping[str, Any], found: Mapping[int, str], time: str) -> list[Judgement]:
    """The judgements of filled-in sheets.

    Args:
        store: the store from which the pictures were drawn.
        facts, found: what `read_sheets` returned.
        time: when the answers were read.

    Raises:
        ValueError: a picture of the sheets is not in the sample of the store, or has another SHA-256 there.
    """
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
