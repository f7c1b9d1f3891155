"""Atomic files and the lock of a folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from ssepa_lib.errors import UserError
from ssepa_lib.files import (
    FolderInUse,
    FolderLock,
    _process,
    remove_parts,
    visible,
    write_atomically,
    write_csv,
    write_json,
    write_text,
)
from ssepa_lib.readers import read_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_crash_in_the_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "table.csv"
    write_text(path, "old")

    def crash(part):
        assert part.suffix == ".csv", "writers choose the format by the suffix"
        part.write_text("half")
        raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        write_atomically(path, crash)
    assert path.read_text() == "old" and names(path.parent) == ["table.csv"]


def test_two_writers_at_once_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "a.txt", ("a" * 200_000, "b" * 200_000)

    def write(text):
        for _ in range(20):
            write_text(path, text)
            assert path.read_text() in texts

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and names(tmp_path) == ["a.txt"]


def test_text_json_and_csv_are_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"größe": [1, None]})
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json", "metrics") == {"größe": [1, None]}
    write_csv(tmp_path / "a.csv", ["image", "classes"], [("ä, b.jpg", 1)])
    assert (tmp_path / "a.csv").read_bytes() == 'image,classes\n"ä, b.jpg",1\n'.encode()


@pytest.mark.parametrize("content", [b"{", "{'ä'}".encode("latin-1"), None])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"the metrics of a run cannot be read from .*metrics\.json") as error:
        read_json(path, "the metrics of a run")
    assert "\n" not in str(error.value)


def test_a_second_holder_is_refused_and_named(tmp_path):
    code = (
        "import sys\nfrom ssepa_lib.files import FolderLock\n"
        "with FolderLock(sys.argv[1]):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"in use by process {other.pid} on {socket.gethostname()} since 20"):
        FolderLock(tmp_path).__enter__()
    other.communicate()
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            FolderLock(tmp_path).__enter__()
    assert names(tmp_path) == []


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), FolderLock(tmp_path / "new"):
        raise RuntimeError
    assert names(tmp_path / "new") == []


def test_a_stale_lock_is_taken_over_on_the_same_host_only(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    holder = {"host": socket.gethostname(), "pid": dead.pid, "started": "2026-01-01 00:00:00"}
    (tmp_path / ".lock").write_text(json.dumps(holder))
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    for foreign in (json.dumps(holder | {"host": "größer"}), "", "[]"):
        (tmp_path / ".lock").write_text(foreign, encoding="utf-8")
        with pytest.raises(UserError, match=r"delete .*\.lock"):
            FolderLock(tmp_path).__enter__()
        assert (tmp_path / ".lock").read_text(encoding="utf-8") == foreign


def holder(**changes):
    """The lock of a dead process of this host."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    known = {"host": socket.gethostname(), "pid": dead.pid, "started": "2026-01-01 00:00:00"}
    return known | changes


@pytest.mark.parametrize(
    ("changes", "minutes", "taken_over"),
    [
        ({"pid": os.getpid()}, 0, False),
        ({"pid": os.getpid(), "born": "1"}, 0, True),  # the number was given to another process
        ({"pid": os.getpid(), "space": "pid:[1]"}, 0, False),  # in a container of the same name
        ({"pid": 7, "space": "pid:[1]"}, 29, False),
        ({"pid": 7, "space": "pid:[1]"}, 31, True),
        ({"host": "elsewhere"}, 29, False),
        ({"host": "elsewhere"}, 31, True),
        (None, 0.5, False),  # its writer was killed in the middle
        (None, 2, True),
    ],
)
def test_when_a_lock_counts_as_left_behind(tmp_path, changes, minutes, taken_over):
    path = tmp_path / ".lock"
    path.write_text("" if changes is None else json.dumps(holder(**changes)))
    silent_since = time.time() - 60 * minutes
    os.utime(path, (silent_since, silent_since))
    if taken_over:
        with FolderLock(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert names(tmp_path) == []
        return
    with pytest.raises(FolderInUse, match=r"in use by process .* since .*delete .*\.lock") as error:
        FolderLock(tmp_path).__enter__()
    text = str(error.value)
    elsewhere = changes is None or {"host", "space"} & changes.keys()
    assert ("is taken over after" in text) == bool(elsewhere) and "\n" not in text


def test_a_killed_process_that_nobody_waits_for_is_dead(tmp_path):
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while _process(zombie.pid)[0] not in ("Z", ""):
        time.sleep(0.01)
    (tmp_path / ".lock").write_text(json.dumps(holder(pid=zombie.pid)))
    with FolderLock(tmp_path):
        pass
    zombie.wait()


def test_a_holder_gives_signs_of_life_and_leaves_the_lock_of_another(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderLock, "RENEWED", 0.01)
    lock = FolderLock(tmp_path)
    with lock:
        os.utime(lock.path, (0, 0))
        end = time.monotonic() + 10
        while lock.path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert lock.path.stat().st_mtime > 0
        lock.path.write_text("of another process, which thought that this one was dead")
    assert names(tmp_path) == [".lock"]


def test_parts_that_killed_writers_left_are_removed(tmp_path):
    for name in (
        ".state.0a.part.pt",
        ".state.previous.0a.part.pt",
        ".a.b.0a.part.png",
        "a.png",
        ".x.part.png",
    ):
        (tmp_path / name).touch()
    remove_parts(tmp_path / "state.pt")
    remove_parts(tmp_path / "*.png")
    assert names(tmp_path) == [".x.part.png", "a.png"]


def test_part_files_are_hidden(tmp_path):
    seen = []
    write_atomically(tmp_path / "b.png", lambda part: part.touch() or seen.extend(visible([part])))
    (tmp_path / "a.png").touch()
    (tmp_path / "._a.png").touch()  # as macOS leaves them
    assert seen == [] and [path.name for path in visible(tmp_path.iterdir())] == ["a.png", "b.png"]
