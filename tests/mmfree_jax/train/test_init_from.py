"""Starting from the weights of another model: what is recorded, and what may go afterwards."""

import shutil

import pytest
from run_contents import events_of
from whole_runs import replace

from mmfree_jax.cli.train import resolve_config
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import sha256_file
from mmfree_jax.saved import run_model
from mmfree_jax.saved.array_files import read_arrays
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.train.same_run import other_model
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("cached_compilation", "traced_once")


def test_the_records_name_the_checkpoint_and_the_run_goes_on_without_it(
    finished, small_run, tmp_path
):
    source, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(finished[1], source)
    digest = sha256_file(source / "checkpoints" / "12" / "manifest.json")
    argv = ["--init-from", str(source), "--run-dir", str(run_dir)]
    config = replace(small_run, run_dir=str(run_dir), init_from=str(source), steps=6)
    train(replace(config, stop_at=4))
    assert events_of(run_dir) == [
        f"weights of {source} at step 12 (SHA-256 of the checkpoint's manifest: {digest})"
    ]
    source.rename(tmp_path / "elsewhere")
    assert other_model(resolve_config(argv).model, config.model) == []
    assert train(config)["status"] == "complete"
    with pytest.raises(CheckpointError, match=f"{source} is not a folder"):  # another run
        resolve_config([*argv[:-1], str(tmp_path / "new")])


def test_a_refused_source_leaves_no_run_directory(finished, small_run, tmp_path):
    config = replace(small_run, run_dir=str(tmp_path / "run"), init_from=str(finished[1]))
    with pytest.raises(ConfigError, match=r"model.num_layers is 2, there 1"):
        train(replace(config, model__num_layers=2))
    assert not list(tmp_path.iterdir())


def test_weights_are_not_taken_from_a_checkpoint_that_goes_while_it_is_read(
    finished, tmp_path, monkeypatch
):
    """Zeros may be all that is noticed of a chunk that is deleted."""
    run = tmp_path / "run"
    shutil.copytree(finished[1], run)

    def read_then_delete(folder, *args, **kwargs):
        found = read_arrays(folder, *args, **kwargs)
        (folder / "manifest.json").unlink()
        return found

    monkeypatch.setattr(run_model, "read_arrays", read_then_delete)
    with pytest.raises(CheckpointError, match=r"checkpoints/12 was deleted while it was read"):
        open_model(run).weights("master")
