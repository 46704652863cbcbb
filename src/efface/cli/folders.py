"""Output files and folders: checked before a job, and removed if nothing was written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import checks


def check_folder(out: Path | None, overwrite: bool | None = None) -> None:
    """Raises ValueError unless the output folder is writable, and empty or replaceable.

    `overwrite` is None for verbs without --overwrite.
    """
    out = _numbered() if out is None else checks.path("--out", out)
    try:
        if out.exists() and not out.is_dir():
            raise ValueError(f"Expected --out to be a folder, got the file {out}. Name another one.")
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            cure = (
                "Name another folder"
                if overwrite is None
                else "Give --overwrite to replace its results, or name another"
            )
            raise ValueError(f"{out} is not empty. {cure}.")
        _try_to_write(out / ".writable")
    except OSError as error:
        raise ValueError(f"Cannot write to {out} ({error.strerror}). Name another folder with --out.") from error


def output_file(out: Path, overwrite: bool) -> Path:
    """The output file. Raises ValueError unless its folder is writable and the file is new or replaceable."""
    out = checks.path("--out", out)
    try:
        if out.is_dir():
            raise ValueError(
                f"Expected --out to be a file, got the folder {out}. Add a name, such as delta.safetensors."
            )
        if out.exists() and not overwrite:
            raise ValueError(f"{out} exists. Give --overwrite to replace it, or name another file.")
        _try_to_write(out.with_name(f".{out.name}.writable"))
    except OSError as error:
        raise ValueError(f"Cannot write to {out} ({error.strerror}). Name another file with --out.") from error
    return out


@contextmanager
def output_folder(out: Path | None) -> Iterator[Path]:
    """Yields the output folder, by default a numbered one. Removes it again if nothing was written."""
    out = _numbered() if out is None else out
    made = _absent(out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield out
    finally:
        _remove(made)


def _numbered() -> Path:
    """The next numbered folder."""
    base = Path("efface-out")
    taken = [int(p.name) for p in base.glob("[0-9]*") if p.name.isdecimal()] if base.is_dir() else []
    return base / f"{max(taken, default=0) + 1:03d}"


def _try_to_write(file: Path) -> None:
    """Creates a file with its parent folders, and removes them again. Raises OSError if that fails."""
    made = [file, *_absent(file.parent)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    finally:
        _remove(made)


def _absent(folder: Path) -> list[Path]:
    """The folder and its parents that do not exist, innermost first."""
    return [each for each in (folder, *folder.parents) if not each.exists()]


def _remove(made: list[Path]) -> None:
    """Removes files and empty folders."""
    for each in made:
        with suppress(OSError):
            each.rmdir() if each.is_dir() else each.unlink()
