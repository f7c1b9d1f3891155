"""Atomic files, always in UTF-8, and a lock that keeps a second writer out of a folder."""

import csv
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from ssepa_lib.errors import UserError
from ssepa_lib.readers import FORMULA


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a part file beside `path`, then put it in its place; the folder is created.

    Whatever happens in `write`, `path` holds either its old content or the new one. The part file keeps the
    suffix, because writers of images and tables choose the format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, one value per line."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file atomically.

    A text that a spreadsheet would take for a formula gets an apostrophe in front, which spreadsheets hide
    and `readers.read_table` drops. Numbers stay as they are.
    """

    def cell(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(FORMULA):
            return f"'{value}"
        return None if value != value else value  # NaN is an empty cell, as None is

    def write(part: Path) -> None:
        with open(part, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([cell(value) for value in row] for row in (header, *rows))

    write_atomically(path, write)


def require_place(path: Path, folder: bool = True, writable: bool = True) -> None:
    """Refuse a place where results could not be written, before anything is computed.

    Args:
        path: of a folder or a file, which need not exist.
        folder: whether it is to be a folder.
        writable: whether anything is to be written there at all.

    Raises:
        UserError: something else is there, a file is in the way, or the folder may not be written to.
    """
    path = Path(path)
    if os.path.lexists(path) and path.is_dir() != folder:
        found, wanted = ("file", "folder") if folder else ("folder", "file")
        raise UserError(f"{path} is a {found}, but results need a {wanted}; choose another name.")
    there = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if there != path and not there.is_dir():
        raise UserError(f"{path} cannot be made, because {there} is a file; choose another folder.")
    if writable and not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be written, because {there} is read-only; choose another folder.")


class FolderInUse(UserError):
    """Another process holds a lock: wait for it, or do something else first."""


class FolderLock:
    """Keeps a second writer out of a folder: `with FolderLock(folder): …`.

    The lock file names the host, the process and the start time of the holder. One left behind by a
    process of this host that no longer exists is taken over; on another host nobody can tell, so it stays.

    Args:
        folder: the folder; it is created on entering.
        name: of the lock file; locks of different names do not exclude each other.

    Raises:
        FolderInUse: on entering, if another holder is alive; the sentence names it.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.path = Path(folder) / name

    @property
    def taken(self) -> bool:
        """Whether the lock file is there, whoever left it."""
        return self.path.exists()

    def __enter__(self) -> "FolderLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                self._remove_stale()
                continue
            started = datetime.now().isoformat(sep=" ", timespec="seconds")
            holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": started}
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(holder, ensure_ascii=False) + "\n")
            return self

    def __exit__(self, *_: object) -> None:
        self.path.unlink(missing_ok=True)

    def _remove_stale(self) -> None:
        """Remove the lock of a dead process; refuse that of a live or unknown one."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:  # released in the meantime
            return
        host, pid, started = _holder(text)
        if host != socket.gethostname() or _alive(pid):
            raise FolderInUse(
                f"{self.path.parent} is in use by process {pid} on {host} since {started}; wait for it, "
                f"or delete {self.path} if that process is gone."
            )
        aside = self.path.with_name(f".lock.{uuid.uuid4().hex[:8]}.stale")
        try:
            os.replace(self.path, aside)
        except FileNotFoundError:  # another process took it over first
            return
        if aside.read_text(encoding="utf-8") != text:  # and this is its own lock: give it back
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()


def _holder(text: str) -> tuple[str, int, str]:
    """Host, process and start time in a lock; a lock that is still being written names nobody."""
    try:
        holder = json.loads(text)
        return str(holder["host"]), int(holder["pid"]), str(holder["started"])
    except (ValueError, KeyError, TypeError):
        return "an unknown host", 0, "an unknown time"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
