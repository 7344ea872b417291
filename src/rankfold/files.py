"""Writing to disk so that a file or folder appears whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from rankfold.errors import OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_whole(path: Path, content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) under a temporary name, fsync it, and rename it to ``path``.

    Raises OutputError with the system's reason; the old file, if any, is then still there."""
    data = content.encode() if isinstance(content, str) else content
    with whole_file(path, f" ({len(data):,} bytes)") as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, described: str = "") -> Iterator[BinaryIO]:
    """A file to write to, which becomes ``path`` when the block ends without an exception.

    Raises OutputError with ``described`` and the system's reason; the old file, if any, is then there."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}{described}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise OutputError unless the disk that will hold ``folder`` can be written and has room."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not place.is_dir():
        raise OutputError(f"cannot make {folder}: {place} is a file; name another --out")
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise OutputError(
            f"not enough disk space at {place}: {free / 1e6:,.0f} MB free, "
            f"{needed_bytes / 1e6:,.0f} MB needed; free some or name another --out"
        )
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OutputError(f"cannot write at {place}: {error.strerror}; name another --out") from error


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A temporary folder beside ``final`` that is renamed to it when the block ends without an
    exception, and removed otherwise.  What a killed process left of an earlier one is removed first.
    Raises OutputError if ``final`` exists by then."""
    final = final.absolute()
    staging = final.with_name(f".{final.name}.partial-{os.getpid()}")
    try:
        for abandoned in final.parent.glob(f".{glob.escape(final.name)}.partial-*"):
            _remove_unless_locked(abandoned)
        staging.mkdir(parents=True)
        lock = _lock(staging)
    except OSError as error:
        raise OutputError(f"cannot make the folder {final}: {error.strerror}") from error
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                _sync_file(file)
        sync_folder(staging)
        staging.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        raise OutputError(f"cannot complete the folder {final}: {error.strerror}") from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def lock_for_one(descriptor: int) -> None:
    """Lock an open file or folder for this process alone, for as long as the descriptor is open.  Where the
    system has no such locks (Windows) nobody is kept out.

    Raises BlockingIOError if another process holds it."""
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(folder: Path) -> int:
    """Lock ``folder`` for as long as the returned descriptor, or this process, lives.

    Raises BlockingIOError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_for_one(descriptor)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove_unless_locked(folder: Path) -> None:
    with suppress(BlockingIOError, FileNotFoundError):
        lock = _lock(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cache_folder() -> Path:
    """Where things are kept that can be made again: ``RANKFOLD_CACHE``, else ``~/.cache/rankfold``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RANKFOLD_CACHE") or Path(home) / "rankfold")
