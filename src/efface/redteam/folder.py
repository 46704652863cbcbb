"""The folder of an attack: attack.json with the setting, attempts.jsonl with one line per prompt, and the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..pictures import png, to_pil
from .result import AttackResult

if TYPE_CHECKING:
    from torch import Tensor

SETTING, ATTEMPTS, IMAGES, LOCK = "attack.json", "attempts.jsonl", "images", ".lock"
FORMAT = 1
RESTORE = "Restore it, or attack again in another folder."
MOST = 64 * files.MIB


def claim(folder: Path) -> Path:
    """Returns a folder that is an attack's or empty; creates it if needed.

    Raises:
        ValueError: the path is a file, or the folder holds other files.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder for the attack, got the file {folder}. Name a folder.")
    if folder.is_dir() and not (folder / SETTING).exists():
        ours = (LOCK, IMAGES)
        others = sorted(p.name for p in folder.iterdir() if p.name not in ours and not p.name.endswith(".partial"))
        if others:
            raise ValueError(f"{folder} holds other files ({', '.join(others[:3])}). Name an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IMAGES).mkdir(exist_ok=True)
    return folder


def agree(folder: Path, setting: Mapping[str, Any]) -> None:
    """Writes the setting, or checks that the folder's is the same.

    Raises:
        ValueError: the folder holds another attack. The message lists the differences.
    """
    from .. import schema
    from .forms import AttackFile

    path = files.inside(folder, SETTING)
    if not files.there(path):
        files.write_json(path, {**setting, "quality": None})
        return
    earlier = schema.read(path, AttackFile, RESTORE)
    same = {key: value for key, value in earlier.items() if key not in ("quality", "versions")}
    now = {key: value for key, value in setting.items() if key != "versions"}
    files.check_same(same, now, f"{folder} holds another attack", "Name another folder, or repeat its command.")


def attempts(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of attempts.jsonl.

    Raises:
        ValueError: a complete line does not match the schema.
    """
    from .. import schema
    from .forms import AttemptLine

    path = files.inside(folder, ATTEMPTS)
    if not files.there(path):
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(files.read(path, MOST).splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue  # a killed process did not finish it
        where = f"{path}, line {number}"
        entry = files.json_of(line, where, RESTORE)
        _check_whole(schema.check(entry, AttemptLine, where, RESTORE), len(found), where)
        found.append(entry)
    return found


def _check_whole(entry: Mapping[str, Any], k: int, where: str) -> None:
    """Raises ValueError if the parts of a line do not belong together."""
    outcomes, pictures = entry["outcomes"], entry["pictures"]
    counts = {arm: len(each) for arm, each in outcomes.items()}
    whole = entry["k"] == k and counts == {arm: len(each) for arm, each in pictures.items()}
    if outcomes:
        whole = whole and {"base", "before"} <= outcomes.keys() and "attacked" in entry.get("search", {})
    if not whole or set(counts.values()) - {len(entry["seeds"])}:
        raise ValueError(f"{where} is damaged, because its outcomes, pictures and seeds do not match. {RESTORE}")


def mend(folder: Path) -> int:
    """Removes an incomplete last line, and returns the number of finished attempts."""
    path, done = files.inside(folder, ATTEMPTS), attempts(folder)
    if files.there(path):
        content = files.read(path, MOST)
        if not content.endswith(b"\n"):
            files.cut(path, content.rfind(b"\n") + 1)
    return len(done)


def keep(
    folder: Path, k: int, record: dict[str, Any], pictures: Mapping[str, Tensor], tensors: Mapping[str, Any]
) -> None:
    """Writes the pictures and tensors of attempt k, then its line."""
    named: dict[str, list[dict[str, str]]] = {}
    for arm, images in pictures.items():
        for j, picture in enumerate(to_pil(images)):
            content, name = png(picture), f"{IMAGES}/{k:04d}-{arm}-{j}.png"
            files.create(folder / name, content)
            named.setdefault(arm, []).append({"file": name, "sha256": files.sha256(content)})
    for arm, each in tensors.items():
        files.write_tensors(folder / IMAGES / f"{k:04d}-{arm}.safetensors", each, {"format": str(FORMAT)})
    files.sync(folder / IMAGES)
    files.append(folder / ATTEMPTS, json.dumps({"k": k, **record, "pictures": named}) + "\n")


def opened(folder: str | Path) -> AttackResult:
    """Reads the result of an attack from its folder.

    Raises:
        FileNotFoundError: the folder holds no attack.
        ValueError: a file is damaged or of another version, or the attack is not finished.
    """
    from .. import schema
    from .forms import AttackFile

    path = files.inside(Path(folder), SETTING)
    if not files.there(path):
        raise FileNotFoundError(f"{folder} has no {SETTING}, so it holds no attack. Make one with `efface attack`.")
    setting = schema.read(path, AttackFile, RESTORE)
    done, total = attempts(Path(folder)), len(setting["prompts"])
    if len(done) != total:
        raise ValueError(
            f"The attack in {folder} is not finished: it has {len(done)} of {total} prompts. Run its command again, "
            "which continues."
        )
    return AttackResult(Path(folder), setting, tuple(done))
