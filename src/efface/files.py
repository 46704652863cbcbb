"""Writes files atomically, and reads files that may come from untrusted sources.

A file appears completely or not at all, and no write follows a link. Only ordinary files of bounded size are read. A
pipe, a device or deeply nested JSON raises an error; nothing hangs.
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
"""The largest sizes in bytes of a text file and of a tensor file."""
PICKLES = (".bin", ".ckpt", ".p", ".pickle", ".pkl", ".pt", ".pth")
NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # opening a pipe would wait for its other end


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, which replaces `path` when the block ends without an exception.

    Raises:
        OSError: the file cannot be written. An earlier file stays.
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
    """Writes a file. After a crash there is either the complete new file or the complete old one."""
    with whole(path) as partial:
        create(partial, content)


def write_json(path: Path, value: Any) -> None:
    """As `write`, with JSON. Raises ValueError for NaN, which JSON cannot hold."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As `write`, with tensors as a safetensors file.

    Raises:
        OSError: the file cannot be written. An earlier file stays.
        ValueError: the file's name is not UTF-8.
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
        raise OSError(f"Cannot write {path} ({error}). Free some space, or name another file.") from error


def create(path: Path, content: bytes | str) -> None:
    """Creates or replaces a file, and flushes it to disk. A kill may leave a part of it."""
    path.unlink(missing_ok=True)
    _put(path, os.O_EXCL, content)


def append(path: Path, text: str) -> None:
    """Appends to a file, and flushes it to disk. A kill may leave a part of the addition."""
    _put(path, os.O_APPEND, text)


def _put(path: Path, how: int, content: bytes | str) -> None:
    with _opened(path), os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how | NO_LINK, 0o666), "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())  # some file systems report only now that they are full


def cut(path: Path, size: int) -> None:
    """Truncates a file to its first `size` bytes. This also works on a full disk."""
    with _opened(path), os.fdopen(os.open(path, os.O_WRONLY | NO_LINK), "wb") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return  # there are no handles on folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def lock(path: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Locks the folder of a lock file against other processes. The system frees the lock when this process ends.

    Args:
        path: the lock file.
        waiting: called before waiting for another process. None: does not wait.

    Raises:
        BlockingIOError: another process holds the lock.
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
                    f"Another process{f' ({owner})' if owner else ''} is working in {path.parent}. Wait for it, end "
                    "it, or name another folder."
                ) from None
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # the number only serves the message above, so a full disk does not matter
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
        yield


# ---------------------------------------------------------------- the same setting, or what differs


def as_json(value: Any) -> Any:
    """The value after a round trip through JSON."""
    return json.loads(json.dumps(value))


def check_same(earlier: Mapping[str, Any], now: Mapping[str, Any], what: str, cure: str) -> None:
    """Raises ValueError if a setting in a file differs from the current one. The message lists the differences.

    Args:
        earlier: the setting in the file.
        now: the current setting.
        what: the start of the message, such as "runs/a holds another run".
        cure: the end of the message.
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
    there, here = (checks.short(json.dumps(each)) for each in (old, new))
    return [] if old == new else [f"{name}: {there} there, {here} here"]


# ---------------------------------------------------------------- reading what a stranger may have made


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder.

    Raises:
        ValueError: the name is absolute or contains `..`, or the file is a link that leads out of the folder.
    """
    pure = PurePath(name)
    if pure.is_absolute() or ".." in pure.parts or "\0" in name or not pure.parts:
        raise ValueError(
            f"Expected the name of a file in {folder}, got {checks.shown(name)}. Correct it, or delete it."
        )
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{path} is a link that leads out of {folder}. Replace it by the file.")
    return path


def there(path: Path) -> bool:
    """Whether the path exists, also as a broken link."""
    return os.path.lexists(path)


def check_ordinary(path: Path, most: int = TEXT) -> None:
    """Raises unless the path is an ordinary file of at most `most` bytes.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the path is a folder, a pipe or a device, or the file is too large.
    """
    with _opened(path):
        _check(path.stat(), path, most)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[None]:
    """Raises ValueError for paths that cannot be opened as files: sockets, circular links, and any link when
    writing."""
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
    """Reads the bytes of an ordinary file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the path is a folder, a pipe or a device, or the file has more than `most` bytes.
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
    """Reads the text of an ordinary file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: as `read`, or the file is not UTF-8.
    """
    try:
        return read(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def parse(text: bytes | str) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: the text is not JSON or not UTF-8, a number has thousands of digits, or the nesting is deeper than
            200.
    """
    from pydantic_core import from_json

    return from_json(text, allow_inf_nan=False)


def read_json(path: Path, cure: str, most: int = TEXT) -> Any:
    """Reads a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: as `read` and `parse`; `cure` ends the message.
    """
    return json_of(read(path, most), path, cure)


def json_of(text: bytes | str, where: str | Path, cure: str, *, nan: bool = False) -> Any:
    """Parses a JSON text from a file.

    Args:
        text: the text, in UTF-8.
        where: the file, and the entry in it, for messages.
        cure: ends the message of an error.
        nan: accepts NaN and Infinity, which are not JSON.

    Raises:
        ValueError: as `parse`.
    """
    from pydantic_core import from_json

    try:
        return from_json(text, allow_inf_nan=nan)
    except ValueError as error:
        raise ValueError(f"{where} is damaged, because it is not JSON ({error}). {cure}") from error


def refuse_pickle(path: Path) -> None:
    """Raises ValueError for a file with a pickle's suffix, because unpickling runs code."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} has the suffix of a pickle, and reading a pickle runs code. Convert it to safetensors."
        )


def read_tensors(path: Path, cure: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Reads the metadata and the tensors of a safetensors file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file has a pickle's suffix, is not an ordinary file, or is not safetensors; `cure` ends the
            message.
    """
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    check_ordinary(path, TENSORS)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file ({error}). {cure}") from error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
