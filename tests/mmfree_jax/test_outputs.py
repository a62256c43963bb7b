"""Folders of commands are whole or absent, and nothing is replaced that is someone else's."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest

from mmfree_jax import files, outputs
from mmfree_jax.errors import OutputError


def _names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def _make(path, names=("a", "sub/b"), *, command="export x", **options):
    with outputs.new_folder(path, command=command, **options) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(name)


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


def test_a_full_disk_is_one_line_and_leaves_nothing(full_disk):
    with (
        pytest.raises(OutputError, match=f"^{full_disk}/y cannot be written .No space[^\n]*$"),
        outputs.new_folder(full_disk / "y", command="export x") as folder,
    ):
        (folder / "z").write_bytes(bytes(2**20))

    def write_a_file():
        with outputs.new_folder(full_disk / "y", command="export x") as folder:
            files.write_bytes(folder / "z", bytes(2**20))

    with pytest.raises(OutputError, match=f"^{full_disk}/y/z cannot be written .No space[^\n]*$"):
        write_a_file()
    assert _names(full_disk) == []


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
        _make(tmp_path / "out", ["a", "new"], overwrite=False)
    with pytest.raises(OutputError, match=r"choose another folder, or remove it yourself$"):
        _make(tmp_path / "out", ["a", "new"])  # of a command without that option
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
        (out / outputs.MARKER).write_text(marker)
    with pytest.raises(OutputError, match="was not written by `mmfree export x`"):
        _make(out, overwrite=True)
    assert (out / "a").read_text() == "a"


def test_another_commands_folder_stays(tmp_path):
    _make(tmp_path / "out", command="export y")
    with pytest.raises(OutputError, match="`mmfree export y` wrote it, not `mmfree export x`"):
        _make(tmp_path / "out", overwrite=True)


def test_what_comes_while_the_folder_is_written_stays(tmp_path):
    def write_while_another_does():
        with outputs.new_folder(tmp_path / "out", command="export x", overwrite=True):
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
        assert outputs.check_target(folder / "out", command="export x", overwrite=True).is_dir()
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
