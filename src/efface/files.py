"""The one place where files are written whole, and where files that strangers may have made are read.

A file appears whole or not at all, and no write follows a link. A file that is read has to be an ordinary one of
bounded size: a pipe, a device or a text of great depth is an error, never a wait or a traceback of another kind.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from . import checks

if TYPE_CHECKING:
    from torch import Tensor

MIB = 2**20
TEXT, TENSORS = 256 * MIB, 64 * 1024 * MIB
"""The most bytes that are read of a text and of a file of tensors."""
PICKLES = (".bin", ".ckpt", ".p", ".pickle", ".pkl", ".pt", ".pth")
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # opening a pipe would wait for its other end


def short(text: str, most: int = 80) -> str:
    """A text as a message shows it: at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place once the block ends without an exception.

    Raises:
        OSError: the file cannot be written. What was there before stays.
    """
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}-{threading.get_ident()}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, content: bytes | str) -> None:
    """The whole new file or the whole old one, never something between."""
    with whole(path) as partial:
        create(partial, content)


def write_json(path: Path, value: Any) -> None:
    """As `write`, with JSON; ValueError for NaN, which JSON has not."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As `write`, with tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written. What was there before stays.
        ValueError: the name of the file is not UTF-8.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"Expected a file name in UTF-8, got {str(path)!r}. Name another file.") from error
    try:
        with whole(path) as partial:
            save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, partial, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"Cannot write {path} ({error}). What was there before is still there.") from error


def create(path: Path, content: bytes | str) -> None:
    """A new file in place of what has this name, on the disk when this returns. A kill may leave half of it."""
    path.unlink(missing_ok=True)
    _put(path, os.O_EXCL, content)


def append(path: Path, text: str) -> None:
    """Adds to a file, on the disk when this returns. A kill may leave half of it."""
    _put(path, os.O_APPEND, text)


def _put(path: Path, how: int, content: bytes | str) -> None:
    with _opened(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how | NO_LINK, 0o666), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # some file systems tell only now that they are full


def cut(path: Path, size: int) -> None:
    """Leaves the first `size` bytes of a file, which needs no room on a full disk."""
    with _opened(path), os.fdopen(os.open(path, os.O_WRONLY | NO_LINK), "wb") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # there are no handles on folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Keeps other processes off the folder of a lock file. The system frees it when this process ends, however it ends.

    Args:
        path: the lock file.
        waiting: called before it waits for another process; None: it does not wait.

    Raises:
        BlockingIOError: another process is at work there.
    """
    import fcntl

    with _opened(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                owner = file.read(20).strip()
                raise BlockingIOError(
                    f"Another process{f' ({owner})' if owner else ''} is at work in {path.parent}: wait for it or end "
                    "it, or name another folder."
                ) from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # the number is only for the message above; a full disk must not matter
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield


# ---------------------------------------------------------------- the same setting, or what differs


def as_json(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], what: str, cure: str) -> None:
    """ValueError that lists what differs between a setting in a file and today's.

    Args:
        earlier: what the file says.
        now: what it should say.
        what: begins the message, such as "runs/a holds another run".
        cure: ends it.
    """
    lines = _differences("", earlier, as_json(now))
    if lines:
        listed = "\n".join(f"  {line}" for line in lines[:8])
        raise ValueError(f"{what}. It differs in\n{listed}\n{cure}")


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        dot = f"{name}." if name else ""
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(f"{dot}{k}", old.get(k), new.get(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for k, (a, b) in enumerate(zip(old, new, strict=True)) for d in _differences(f"{name}[{k}]", a, b)]
    return [] if old == new else [f"{name}: {short(json.dumps(old))} there, {short(json.dumps(new))} here"]


# ---------------------------------------------------------------- reading what a stranger may have made


def inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder.

    Raises:
        ValueError: an absolute name, one with `..`, or a link that leads out of the folder.
    """
    pure = PurePath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not pure.parts:
        raise ValueError(
            f"Expected the name of a file in {folder}, got {checks.shown(name)}. Correct it, or delete it."
        )
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link that leads out of {folder}. Put the file itself there.")
    return path


def there(path: Path) -> bool:
    """Whether there is anything of this name, also a link to nothing."""
    return os.path.lexists(path)


def check_ordinary(path: Path, most: int = TEXT) -> None:
    """Raises unless a path is a file of at most `most` bytes.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a folder, a pipe or a device, or a file that is too large.
    """
    with _opened(path):
        _check(path.stat(), path, most)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[None]:
    """ValueError for what cannot be opened as a file: sockets, links in a circle, and any link where one is written."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        raise ValueError(f"{path} is a link or a socket, not a file ({error.strerror}). Delete it.") from error


def _check(found: os.stat_result, path: Path, most: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is a folder, a pipe or a device, not a file. Give an ordinary file.")
    if found.st_size > most:
        raise ValueError(f"Expected {path} to have at most {most:,} bytes, got {found.st_size:,}. Give another file.")


def read(path: Path, most: int = TEXT) -> bytes:
    """The bytes of an ordinary file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a folder, a pipe or a device, or a file of more than `most` bytes.
    """
    with _opened(path):
        handle = os.open(path, os.O_RDONLY | NO_WAIT)
    try:
        _check(os.fstat(handle), path, most)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def read_text(path: Path, most: int = TEXT) -> str:
    """The text of an ordinary file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as `read`; or it is not UTF-8.
    """
    try:
        return read(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def parse(text: bytes | str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: not JSON, not UTF-8, a number of thousands of digits, or nested more than 200 deep.
    """
    from pydantic_core import from_json

    return from_json(text, allow_inf_nan=False)


def read_json(path: Path, cure: str, most: int = TEXT) -> Any:
    """What a JSON file says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as `read` and `parse`; `cure` ends the message.
    """
    return json_of(read(path, most), path, cure)


def json_of(text: bytes | str, where: str | Path, cure: str, *, nan: bool = False) -> Any:
    """What a JSON text in a file says.

    Args:
        text: UTF-8.
        where: the file, and the entry in it.
        cure: ends the message of an error.
        nan: whether NaN and Infinity are read, which are no JSON.

    Raises:
        ValueError: as `parse`.
    """
    from pydantic_core import from_json

    try:
        return from_json(text, allow_inf_nan=nan)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: it is not JSON ({error}). {cure}") from error


def refuse_pickle(path: Path) -> None:
    """ValueError for a file that is named like a pickle: unpickling runs code."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path} is a pickle by its name, and these run code when read. Convert it to safetensors.")


def read_tensors(path: Path, cure: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a pickle by its name, no ordinary file, or no safetensors; `cure` ends the message.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    check_ordinary(path, TENSORS)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged, cut short, or no safetensors file ({error}). {cure}") from error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
