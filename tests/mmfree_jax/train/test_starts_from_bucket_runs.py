"""Runs that start from a run in a bucket: its weights, or its whole checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest
from bucket_files import do_not_wait, put_folder

from mmfree_jax.cli.main import main
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.errors import CheckpointError, ConfigError, StorageError
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import newest_manifest
from mmfree_jax.saved.run_directory import load_config
from mmfree_jax.storage import parse_url, read_bytes, write_bytes
from mmfree_jax.train.branch_source import branch_config, parse_source, same_source
from mmfree_jax.train.init_from import initial_params
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("traced_once", "cached_compilation")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for copies."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)


@pytest.fixture(scope="module")
def run(bucket_of_runs, finished):
    """URL of the run `finished`, which has the steps 8 and 12. Leave it as it is."""
    return put_folder(finished[1], f"{bucket_of_runs.url}/runs/a")


def _losses(path):
    return [(r["kind"], r["step"], r["loss"]) for r in read_history(path) if "loss" in r]


def test_a_branch_is_that_of_the_folder_on_the_disk_and_in_the_bucket(
    run, bucket_of_runs, finished, tmp_path
):
    here = tmp_path / "from-disk"
    there = parse_url(f"{bucket_of_runs.url}/runs/b")
    for parent, run_dir in ((finished[1], here), (run, there), (run, tmp_path / "to-disk")):
        assert train(branch_config(f"{parent}@8", str(run_dir)))["step"] == 12
    (tmp_path / "there.jsonl").write_bytes(read_bytes(there / "metrics.jsonl"))
    expected = _losses(here / "metrics.jsonl")
    assert [step for kind, step, _ in expected if kind == "train"] == [9, 10, 11, 12]
    assert _losses(tmp_path / "there.jsonl") == expected
    assert _losses(tmp_path / "to-disk" / "metrics.jsonl") == expected
    for place in (there, tmp_path / "to-disk"):
        manifest = newest_manifest(place / "checkpoints")
        assert manifest is not None
        assert (manifest.origin.parent, manifest.origin.step) == (run, 8)
        assert f"branched from {run} at step 8" in manifest.origin.account
    # A branch needs its parent no more, and is known by its URL.
    again = branch_config(run, str(there))
    assert train(again)["step"] == 12


def test_what_a_branch_may_come_from(run, bucket_of_runs):
    parent = parse_url(run)
    assert parse_source(f"{run}@8") == dataclasses.replace(parse_source(run), step=8)
    write_bytes(parse_url(f"{bucket_of_runs.url}/runs/c@9/config.yaml"), b"{}")
    assert parse_source(f"{bucket_of_runs.url}/runs/c@9").step is None
    assert same_source(f"{parent}@8", f"{run}/")
    assert not same_source(f"{parent}@8", f"{run}2")
    bad = {
        f"{run}@3": (CheckpointError, "a/checkpoints has no checkpoint of step 3: it has 8, 12"),
        f"{run}@x": (ConfigError, "give a step behind the @, or the run alone"),
        f"{run}-": (CheckpointError, "runs/a- is not a training run"),
        "hf://b/run": (ConfigError, "URLs of hf: are not supported"),
        "gs://no-such-bucket/run": (CheckpointError, "no-such-bucket/run is not a training run"),
    }
    for source, (error, told) in bad.items():
        with pytest.raises(error, match=told):
            branch_config(source)
    for inside in (run, f"{run}/branches/b"):
        with pytest.raises(ConfigError, match="is or lies in the run to branch from"):
            train(branch_config(f"{run}@8", inside))


def test_a_parent_that_may_not_be_read_is_one_line(run, bucket_of_runs, tmp_path, capsys):
    from faulty_proxy import Fault

    bucket_of_runs.proxy.add(Fault(match="^GET", status=403))
    try:
        argv = ["--run-dir", str(tmp_path / "b")]
        assert main(["train", "--branch-from", f"{run}@8", *argv]) == 2
        assert main(["train", "--init-from", run, *argv]) == 2
        with pytest.raises(StorageError):
            branch_config(run)
    finally:
        bucket_of_runs.proxy.clear()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "permission denied or credentials expired" in line
    assert not (tmp_path / "b").exists()


def test_initial_weights_are_those_of_the_run(run, finished, small_run):
    asked = ["--init-from", run, "--data.paths", *small_run.data.paths]
    assert resolve_config(asked).model.hidden_size == small_run.model.hidden_size
    there, here = (initial_params(place, small_run)[0] for place in (run, str(finished[1])))
    for one, other in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        np.testing.assert_array_equal(one, other)


def test_its_config_is_read_by_url(run, finished, capsys):
    argv = ["--config", f"{run}/config.yaml", "--seed", "5"]
    assert resolve_config(argv) == dataclasses.replace(load_config(finished[1]), seed=5)
    for place in (run, str(finished[1])):
        assert main(["info", "--run", place, "--json"]) == 0
    there, here = capsys.readouterr().out.split("\n}\n")[:2]
    assert there == here
    assert main(["info", "--run", f"{run}-"]) == 2
    error = capsys.readouterr().err
    assert f"there is no {run}-/config.yaml, so it is no training run: give one" in error
    assert error.count("\n") == 1
