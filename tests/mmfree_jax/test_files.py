"""Files and folders are whole or absent, and nothing is replaced that is someone else's."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmfree_jax import files
from mmfree_jax.errors import OutputError


def _names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def _make(path, names=("a", "sub/b"), *, command="export x", **options):
    with files.new_folder(path, command=command, **options) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)


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
    with (
        pytest.raises(OutputError, match=f"^{full_disk}/y cannot be written .No space[^\n]*$"),
        files.new_folder(full_disk / "y", command="export x") as folder,
    ):
        (folder / "z").write_bytes(bytes(2**20))

    def write_a_file():
        with files.new_folder(full_disk / "y", command="export x") as folder:
            files.write_bytes(folder / "z", bytes(2**20))

    with pytest.raises(OutputError, match=f"^{full_disk}/y/z cannot be written .No space[^\n]*$"):
        write_a_file()
    assert _names(full_disk) == []


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


def test_a_new_folder_lists_its_files(tmp_path, umask):
    _make(tmp_path / "new" / "out")
    assert _names(tmp_path / "new") == [
        "out",
        "out/.mmfree-output.json",
        "out/a",
        "out/sub",
        "out/sub/b",
    ]
    marker = json.loads((tmp_path / "new/out/.mmfree-output.json").read_text())
    assert marker == {"command": "export x", "files": ["a", "sub/b"]}
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o750
    (tmp_path / "empty").mkdir()
    _make(tmp_path / "empty")
    assert (tmp_path / "empty" / "a").read_text() == "a"


def test_an_earlier_output_is_replaced_only_when_asked(tmp_path):
    _make(tmp_path / "out", ["a", "old"])
    with pytest.raises(OutputError, match="exists already: choose another folder, or pass --over"):
        _make(tmp_path / "out", ["a", "new"])
    assert (tmp_path / "out" / "old").exists()
    _make(tmp_path / "out", ["a", "new"], overwrite=True)
    assert _names(tmp_path) == ["out", "out/.mmfree-output.json", "out/a", "out/new"]


def test_an_error_in_the_block_leaves_the_earlier_output(tmp_path):
    _make(tmp_path / "out", ["old"])
    with pytest.raises(TypeError):
        _make(tmp_path / "out", ["new", 1], overwrite=True)
    assert _names(tmp_path) == ["out", "out/.mmfree-output.json", "out/old"]


@pytest.mark.parametrize("stranger", ["notes.txt", "sub/notes.txt", "mine/", "link"])
def test_a_folder_with_someone_elses_files_stays(tmp_path, stranger):
    out = tmp_path / "out"
    _make(out)
    if stranger == "link":
        (out / stranger).symlink_to(tmp_path)
    elif stranger.endswith("/"):
        (out / stranger).mkdir()
    else:
        (out / stranger).write_text("mine")
    before = _names(out)
    with pytest.raises(OutputError, match=f"also holds {stranger.rstrip('/')}, which"):
        _make(out, overwrite=True)
    assert _names(out) == before


@pytest.mark.parametrize("marker", [None, "{", "[]", '{"command": "export x"}', '{"files": []}'])
def test_a_folder_without_the_list_stays(tmp_path, marker):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("a")
    if marker is not None:
        (out / files.MARKER).write_text(marker)
    with pytest.raises(OutputError, match="was not written by `mmfree export x`"):
        _make(out, overwrite=True)
    assert (out / "a").read_text() == "a"


def test_another_commands_folder_stays(tmp_path):
    _make(tmp_path / "out", command="export y")
    with pytest.raises(OutputError, match="`mmfree export y` wrote it, not `mmfree export x`"):
        _make(tmp_path / "out", overwrite=True)


def test_what_comes_while_the_folder_is_written_stays(tmp_path):
    def write_while_another_does():
        with files.new_folder(tmp_path / "out", command="export x", overwrite=True):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").write_text("mine")

    with pytest.raises(OutputError, match="was not written by"):
        write_while_another_does()
    assert _names(tmp_path) == ["out", "out/mine"]


@pytest.mark.parametrize(
    "target", ["run", "run/", "run/.", "run/new", "run/sub", ".", "link", "link/x", "run/../run"]
)
def test_a_target_that_is_holds_or_lies_in_the_source_is_refused(tmp_path, target):
    run = tmp_path / "here" / "run"
    (run / "sub").mkdir(parents=True)
    (run / "config.yaml").write_text("x")
    (tmp_path / "here" / "link").symlink_to(run)
    with pytest.raises(OutputError, match=r"is, holds or lies in .*, which is read"):
        _make(f"{tmp_path}/here/{target}", sources=[run], overwrite=True)
    assert _names(run) == ["config.yaml", "sub"]
    assert sorted(os.listdir(tmp_path / "here")) == ["link", "run"]


def test_a_source_that_is_a_file_and_one_that_is_not_there(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "packed").write_text("x")
    with pytest.raises(OutputError, match="is, holds or lies in"):
        _make(tmp_path / "out", sources=[tmp_path / "out" / "packed"], overwrite=True)
    _make(tmp_path / "new", sources=[tmp_path / "absent"])
    assert (tmp_path / "new" / "a").exists()


def test_the_current_folder_a_mount_and_a_file_are_refused(tmp_path, monkeypatch, full_disk):
    (tmp_path / "up" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "up" / "here")
    for target in (".", "..", "../../up"):
        with pytest.raises(OutputError, match="is or holds the current folder"):
            _make(target, overwrite=True)
    with pytest.raises(OutputError, match="is a mount point: name a new folder inside"):
        _make(full_disk, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        _make(tmp_path / "file", overwrite=True)
    _make("new/")
    assert (tmp_path / "up/here/new/a").read_text() == "a"


class _KilledError(BaseException):
    pass


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
def test_a_writer_killed_at_any_step_leaves_one_of_the_two(tmp_path, monkeypatch, exchanges):
    """The process ends before or after each rename, and nothing it would clean up is."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    before, kept = Path.rename, shutil.rmtree
    for steps in range(3):
        left = [steps]

        def rename(path, target, left=left):
            if not left[0]:
                raise _KilledError
            left[0] -= 1
            before(path, target)

        folder = tmp_path / str(steps)
        _make(folder / "out", ["old"])
        with monkeypatch.context() as killed, contextlib.suppress(_KilledError):
            killed.setattr(Path, "rename", rename)
            killed.setattr(shutil, "rmtree", lambda *_, **__: None)
            _make(folder / "out", ["new"], overwrite=True)
        assert shutil.rmtree is kept
        if exchanges:
            assert (folder / "out" / "new").exists()
        assert files.check_target(folder / "out", command="export x", overwrite=True).is_dir()
        assert {"old", "new"} & set(os.listdir(folder / "out"))
        _make(folder / "out", ["newer"], overwrite=True)
        assert sorted(os.listdir(folder / "out")) == [".mmfree-output.json", "newer"]


def test_a_link_to_an_earlier_output_keeps_pointing(tmp_path):
    _make(tmp_path / "real", ["old"])
    (tmp_path / "link").symlink_to("real")
    _make(tmp_path / "link", ["new"], overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "real") == [".mmfree-output.json", "new"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OutputError, match="loop cannot be written"):
        _make(tmp_path / "loop")


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
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is read"):
        files.check_file(out, r'\{\s*"law"', beside=[figure], sources=[tmp_path / "." / "x.png"])
    out.write_bytes(b'{\n "name": "law"}')
    with pytest.raises(OutputError, match=f"{out} is not replaced: it is no earlier output"):
        files.check_file(out, r'\{\s*"law"')
    out.unlink()
    with pytest.raises(OutputError, match=f"{figure} is not replaced: it is no earlier output"):
        files.check_file(out, r'\{\s*"law"', beside=[figure])
