"""The config of a run directory, and who has it."""

import contextlib

import pytest

from mmfree_jax import files
from mmfree_jax.errors import ConfigError
from mmfree_jax.presets import preset
from mmfree_jax.saved.run_directory import load_config, open_run_dir, run_identity, write_config


def test_the_config_comes_back(tmp_path):
    write_config(tmp_path, preset("370M"))
    assert load_config(tmp_path) == preset("370M")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_missing_or_malformed_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="give the folder of a training run"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path)


def _open_and_fail(run_dir, begin=lambda: None):
    with contextlib.suppress(KeyError), contextlib.ExitStack() as held:
        open_run_dir(run_dir, held)
        run_identity(run_dir)
        begin()
        raise KeyError


def test_a_start_that_fails_before_its_run_begins_leaves_no_folder(tmp_path):
    run_dir = tmp_path / "runs" / "new"
    _open_and_fail(run_dir)
    assert list(tmp_path.rglob("*")) == [run_dir.parent]
    _open_and_fail(run_dir, lambda: write_config(run_dir, preset("370M")))
    assert load_config(run_dir) == preset("370M")
    (tmp_path / "mine").mkdir()
    _open_and_fail(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_a_lock_that_its_holder_removes_is_taken_anew(tmp_path, monkeypatch):
    path, lock_file = tmp_path / "new" / ".lock", files._flock
    first = files.take_lock(path, "the thing")

    def remove_then_lock(descriptor, what, *, wait):
        """The holder lets go between the other's opening of the file and its locking."""
        monkeypatch.setattr(files, "_flock", lock_file)
        path.unlink()
        path.parent.rmdir()
        files.os.close(first)
        lock_file(descriptor, what, wait=wait)

    monkeypatch.setattr(files, "_flock", remove_then_lock)
    with files.lock(path, "the thing"):
        assert files.is_locked(path)
        with pytest.raises(files.InUseError), files.lock(path, "the thing"):
            pass
