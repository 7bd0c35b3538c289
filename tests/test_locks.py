"""A lock on a directory: one writer, named to the next, and no dead process holds it."""

import errno
import fcntl
import os
import shutil
import signal
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from pyrovae.runtime import locks
from pyrovae.runtime.locks import LockedError, LockWarning, held, holder


@contextmanager
def holding(directory, work=lambda: None):
    """Another process that holds the lock, does some work, and then sleeps; gives its number."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with held(directory):
            work()
            os.write(writing, b"locked")
            time.sleep(60)
    assert os.read(reading, 6) == b"locked"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_second_writer_is_refused_in_one_line_that_names_the_first(tmp_path):
    with (
        holding(tmp_path) as pid,
        pytest.raises(LockedError) as refused,
        held(tmp_path),
    ):
        pass
    line = str(refused.value)
    assert line.startswith(f"expected no other process to write to {tmp_path}, got process {pid} on ")
    assert f" on {socket.gethostname()} since 2" in line
    assert "\n" not in line


def test_a_killed_process_holds_nothing(tmp_path):
    with holding(tmp_path) as pid:
        assert f"process {pid} on" in holder(tmp_path)
    with held(tmp_path):
        assert f"process {os.getpid()} on" in holder(tmp_path)
    assert holder(tmp_path) == ""


def test_a_forked_child_does_not_keep_what_its_killed_parent_held(tmp_path):
    reading, writing = os.pipe()

    def fork() -> None:
        child = os.fork()
        if child == 0:
            os.write(writing, b"child")
            time.sleep(60)
        os.write(writing, child.to_bytes(8, "little"))

    with holding(tmp_path, fork):
        said = os.read(reading, 5) + os.read(reading, 8)
    child = int.from_bytes(said.replace(b"child", b""), "little")
    try:
        os.kill(child, 0)  # it lives
        with held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_within_itself_it_does_nothing_and_another_thread_is_refused(tmp_path):
    found = []

    def other() -> None:
        try:
            with held(tmp_path):
                found.append("held")
        except LockedError as error:
            found.append(str(error))

    with held(tmp_path):
        with held(tmp_path / "." / "."):
            pass
        assert holder(tmp_path) != ""  # the inner one has not released it
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"got process {os.getpid()} on" in found[0]


def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(LockWarning, match="a file system without locks: start no second process"),
        held(tmp_path),
    ):
        locks.check(tmp_path)
    assert holder(tmp_path) == ""


def test_on_a_full_disk_the_lock_is_held_without_a_name(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with held(tmp_path):
        assert holder(tmp_path) == "another process"


@pytest.mark.parametrize("made_anew", [True, False])
def test_a_directory_that_was_deleted_is_noticed(tmp_path, made_anew):
    place = tmp_path / "run"
    place.mkdir()
    with held(place):
        locks.check(place)
        shutil.rmtree(place)
        if made_anew:
            place.mkdir()
            (place / ".lock").touch()
        with pytest.raises(FileNotFoundError, match="the directory was deleted or moved"):
            locks.check(place)


def test_what_is_not_there_cannot_be_locked(tmp_path):
    with pytest.raises(FileNotFoundError), held(tmp_path / "none"):
        pass
    assert holder(tmp_path / "none") == ""
