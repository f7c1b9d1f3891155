"""Atomic files, always in UTF-8, and a lock that keeps a second writer out of a folder."""

import csv
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ssepa_lib.errors import UserError, explain_failure
from ssepa_lib.readers import FORMULA


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around code that writes `path`: a full disk or a missing right becomes one sentence that names it.

    Raises:
        UserError: what is written before stays as it is.
    """
    try:
        yield
    except OSError as error:
        reason = explain_failure(OSError(error.errno, error.strerror, str(path)))
        if reason is None:
            raise
        raise UserError(reason) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a part file beside `path`, then put it in its place; the folder is created.

    Whatever happens in `write`, `path` holds either its old content or the new one. The part file keeps the
    suffix, because writers of images and tables choose the format by it.

    Raises:
        UserError: the disk is full, or nothing may be written there.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(part)
            os.replace(part, path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(path: Path) -> None:
    """Remove the part files of `path` that killed processes left; only for the one who may write it.

    The name may be a pattern: `folder / "*.png"`.
    """
    for part in path.parent.glob(f".{path.stem}.*.part{path.suffix}"):
        with suppress(OSError):
            part.unlink(missing_ok=True)


def visible(paths: Iterable[Path]) -> list[Path]:
    """Paths in order, without hidden ones: part files, and what a system keeps beside a user's files."""
    return sorted(path for path in paths if not path.name.startswith("."))


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
        sealed = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
        code = errno.EROFS if sealed else errno.EACCES
        raise UserError(explain_failure(OSError(code, os.strerror(code), str(path))))


class FolderInUse(UserError):
    """Another process holds a lock: wait for it, or do something else first."""


class FolderLock:
    """Keeps a second writer out of a folder: `with FolderLock(folder): …`.

    The lock file names the host, the process and the start time of the holder, who renews it every minute.
    One left behind by a process of this host that no longer exists is taken over at once; one of another
    host, where nobody can look for the process, half an hour after its last sign of life.

    Args:
        folder: the folder; it is created on entering.
        name: of the lock file; locks of different names do not exclude each other.

    Raises:
        FolderInUse: on entering, if another holder is alive; the sentence names it.
        UserError: the lock cannot be written.
    """

    RENEWED = 60.0  # seconds between two signs of life
    EXPIRES = 1800.0  # seconds without one after which the lock of another host counts as left behind

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.path = Path(folder) / name
        self.text, self.released = "", threading.Event()

    @property
    def taken(self) -> bool:
        """Whether the lock file is there, whoever left it."""
        return self.path.exists()

    def __enter__(self) -> "FolderLock":
        self.text = json.dumps(_Holder.here()._asdict(), ensure_ascii=False) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_stale()
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        with suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self.text:  # nobody has taken it over
                self.path.unlink()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.text.encode())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _renew(self) -> None:
        while not self.released.wait(self.RENEWED):
            with suppress(OSError):
                os.utime(self.path)

    def _remove_stale(self) -> None:
        """Remove the lock of a dead process; refuse that of a live or unknown one."""
        try:
            text = self.path.read_text(encoding="utf-8")
            silent = time.time() - self.path.stat().st_mtime
        except FileNotFoundError:  # released in the meantime
            return
        holder = _Holder.read(text)
        expires = self.EXPIRES if holder.pid else self.RENEWED  # without a name: killed while it wrote this
        if holder.alive or (holder.elsewhere and silent < expires):
            until = f" (it is taken over after {expires / 60:.0f} minutes without a sign of life)"
            raise FolderInUse(
                f"{self.path.parent} is in use by process {holder.pid} on {holder.host} since "
                f"{holder.started}{until * holder.elsewhere}; wait for it, or delete {self.path} if that "
                "process is gone."
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


class _Holder(NamedTuple):
    """Who holds a lock.

    `space` tells containers of one host apart, whose processes cannot see each other; `born` is the start of
    the process in ticks of its clock, because its number may be given to another one.
    """

    host: str
    pid: int
    started: str
    space: str = ""
    born: str = ""

    @classmethod
    def here(cls) -> "_Holder":
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), now, _space(), _process(os.getpid())[1])

    @classmethod
    def read(cls, text: str) -> "_Holder":
        """The holder that a lock names; nobody in one whose writer was killed."""
        try:
            given = json.loads(text)
            names = ("host", "pid", "started", "space", "born")
            host, pid, started, space, born = (given.get(name, "") for name in names)
            return cls(str(host), int(pid), str(started), str(space), str(born))
        except (ValueError, AttributeError, TypeError):
            return cls("an unknown host", 0, "an unknown time")

    @property
    def elsewhere(self) -> bool:
        """Whether this process cannot tell if the holder is alive."""
        return self.host != socket.gethostname() or bool(self.space and self.space != _space())

    @property
    def alive(self) -> bool:
        """Whether the holder is a live process of this host."""
        if self.elsewhere:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        state, born = _process(self.pid)
        return state not in ("Z", "X") and (not self.born or not born or self.born == born)


def _space() -> str:
    """The process namespace of a Linux container; empty elsewhere."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _process(pid: int) -> tuple[str, str]:
    """State and start of a process as Linux tells them; empty elsewhere."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    return "", ""
