"""Files and folders are whole or absent, and nothing is replaced that is someone else's."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmfree_jax import files
from mmfree_jax.errors import OutputError


def _names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_a_file_is_written_with_the_umasks_mode_and_nothing_beside(tmp_path, umask):
    files.write_text(tmp_path / "new" / "x.txt", "ü\n")
    assert (tmp_path / "new" / "x.txt").read_bytes() == "ü\n".encode()
    assert (tmp_path / "new" / "x.txt").stat().st_mode & 0o777 == 0o640
    assert _names(tmp_path) == ["new", "new/x.txt"]


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(TypeError), files.open_atomically(path) as file:
        file.write("no bytes")  # type: ignore[arg-type]
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_error_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_text("old")

    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), fails)
    with pytest.raises(OutputError, match=f"{path} cannot be written .No space.*make room"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["x"]


def test_a_full_disk_is_one_line_and_leaves_nothing(full_disk):
    with pytest.raises(OutputError, match=f"^{full_disk}/x cannot be written .No space[^\n]*$"):
        files.write_bytes(full_disk / "x", bytes(2**20))
    assert list(full_disk.iterdir()) == []


def test_a_link_keeps_pointing_and_a_pipe_stays_a_pipe(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"

    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    files.write_text(pipe, "through")
    reader.join(10)
    assert read == ["through"]
    assert pipe.is_fifo()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(OutputError, match="is a folder: give the name of a file"):
        files.write_text(tmp_path, "x")


_HOLD = """
import sys
from mmfree_jax import files
with files.lock(sys.argv[1], "the thing"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_holds_a_lock_and_the_others_are_told_which(tmp_path):
    path = tmp_path / "new" / ".lock"
    assert not files.is_locked(path)
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        assert files.is_locked(path)
        told = f"the thing is in use by another job .process {holder.pid} on "
        with pytest.raises(files.InUseError, match=told), files.lock(path, "the thing"):
            pass
        holder.kill()
        with files.lock(path, "the thing", wait=True):
            assert files.is_locked(path)
            assert path.read_text() == files.owner()
    finally:
        holder.kill()
        holder.communicate()
    assert not files.is_locked(path)


def test_digests(tmp_path):
    # printf abc | sha256sum
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(b"abc") == files.sha256_file(tmp_path / "x") == known


def test_a_file_is_replaced_that_begins_as_the_commands_own_do(tmp_path):
    out, figure = tmp_path / "x.json", tmp_path / "x.png"
    for there in (None, b"", b'{\n "law": 1}'):
        if there is not None:
            out.write_bytes(there)
        files.check_file(out, r'\{\s*"law"', beside=[figure])
    figure.write_bytes(b"of the same")
    files.check_file(out, r'\{\s*"law"', beside=[figure])
    files.check_file("/dev/null", "no such beginning")
    for place, beside in ((tmp_path, []), (out, [tmp_path])):  # told before there is work to lose
        with pytest.raises(OutputError, match="is a folder: give the name of a file"):
            files.check_file(place, r'\{\s*"law"', beside=beside)
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is read"):
        files.check_file(out, r'\{\s*"law"', beside=[figure], sources=[tmp_path / "." / "x.png"])
    out.write_bytes(b'{\n "name": "law"}')
    with pytest.raises(OutputError, match=f"{out} is not replaced: it is no earlier output"):
        files.check_file(out, r'\{\s*"law"')
    out.unlink()
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is no earlier output"):
        files.check_file(out, r'\{\s*"law"', beside=[figure])
