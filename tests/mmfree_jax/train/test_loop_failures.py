"""Whole runs in this process that end badly or may not begin: losses, disks, memory, input."""

import errno
import itertools
import logging
import os
import threading

import jax.numpy as jnp
import pytest
from run_contents import events_of, losses_of
from whole_runs import replace

from mmfree_jax.config import TrainConfig
from mmfree_jax.data.pipeline import make_train_iterator
from mmfree_jax.errors import CheckpointError, ConfigError, DataError, OutputError, TrainingError
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.train import loop, report, training
from mmfree_jax.train import step as step_module
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("cached_compilation", "traced_once")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_layers": 2}, "model.num_layers 1 -> 2"),
        ({"seed": 5}, "seed 0 -> 5"),
        ({"batch_size": 16}, "batch_size 8 -> 16"),
        ({"optimizer__learning_rate": 0.5}, "optimizer.learning_rate 0.01 -> 0.5"),
        ({"steps": 20}, "steps 12 -> 20 .*schedule"),
        ({"checkpoint__resume": False}, "checkpoint.resume is off"),
    ],
)
def test_a_run_directory_with_another_run_is_refused(finished, changes, message):
    config, run_dir, _ = finished
    before = sorted(p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.name != ".lock")
    with pytest.raises(ConfigError, match=message):
        train(replace(config, **changes))
    assert before == sorted(p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.name != ".lock")


def test_two_jobs_cannot_share_a_run_directory(small_run, tmp_path):
    config = replace(small_run, run_dir=str(tmp_path), steps=3)
    errors = []

    def second_job(done):
        if done == 2:
            with pytest.raises(OutputError, match=f"in use by another job.*{os.getpid()}") as e:
                train(config)
            errors.append(e)

    train(config, on_step=second_job)
    assert errors


def test_an_unwritable_run_directory_is_named(small_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"run_dir .*file/run cannot be written"):
        train(replace(small_run, run_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mesh__tensor": 3}, ConfigError, "mesh"),
        ({"batch_size": 12}, ConfigError, "batch_size.*multiple of 8"),
        ({"data__paths": ("/nowhere",)}, DataError, "/nowhere"),
        ({"data__paths": ()}, DataError, "data.paths is empty"),
        ({"data__seq_len": 100_000}, DataError, "data.seq_len"),
        ({"model__vocab_size": 128}, DataError, "model.vocab_size is 128"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    small_run, tmp_path, changes, error, message
):
    config = replace(small_run, run_dir=str(tmp_path / "run"))
    with pytest.raises(error, match=message) as e:
        train(replace(config, **changes))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run").exists()


def _poison(monkeypatch, steps):
    """Makes loss and gradients of some steps (counted from 0) not finite."""
    inner = step_module.loss_sums

    def loss_sums(weights, batch, **kwargs):
        objective, sums = inner(weights, batch, **kwargs)
        bad = jnp.any(batch["tokens"][:, 0] == 255)  # see `poisoned`
        return jnp.where(bad, jnp.nan, 1.0) * objective, sums

    def poisoned(*args, start_row=0, batch_size, place, **kwargs):
        """The real rows, with token 255 in front on the poisoned steps."""
        numbers = itertools.count(start_row // batch_size)

        def poison(batch):
            if next(numbers) in steps:
                batch["tokens"][:, 0] = 255
            return place(batch)

        return make_train_iterator(
            *args, start_row=start_row, batch_size=batch_size, place=poison, **kwargs
        )

    monkeypatch.setattr(step_module, "loss_sums", loss_sums)
    monkeypatch.setattr(loop, "make_train_iterator", poisoned)
    monkeypatch.setattr(loop, "jit_train_step", step_module.jit_train_step)


def test_not_finite_stops_with_step_rows_and_checkpoint(small_run, tmp_path, monkeypatch):
    _poison(monkeypatch, {6})
    config = replace(small_run, run_dir=str(tmp_path))
    with pytest.raises(TrainingError) as e:
        train(config)
    message = str(e.value)
    assert "at step 7 (rows 48 to 55" in message
    assert (
        f"the last good checkpoint is {tmp_path}/checkpoints/4: go on from it with --branch-from "
        f"{tmp_path} --run-dir NEW and --optimizer.learning-rate below 0.01, or run again with "
        "--on-nonfinite skip"
    ) in message
    assert "\n" not in message
    assert checkpoint_steps(tmp_path / "checkpoints") == [4]


def test_not_finite_may_be_skipped_within_a_bound(small_run, tmp_path, monkeypatch):
    _poison(monkeypatch, {4, 5, 9})
    config = replace(small_run, run_dir=str(tmp_path / "a"), on_nonfinite="skip", max_skips=2)
    assert train(config)["status"] == "complete"
    records = {
        r["step"]: r for r in read_history(tmp_path / "a" / "metrics.jsonl") if r["kind"] == "train"
    }
    assert [s for s, r in records.items() if r["skipped_steps"]] == [5, 6, 10]
    assert "loss" not in records[5]
    # The optimiser has made two updates fewer than steps, so its rate lags by two.
    assert records[8]["learning_rate"] > records[9]["learning_rate"]
    with pytest.raises(TrainingError, match=r"2 updates in a row.*max_skips \(1\)"):
        train(replace(config, run_dir=str(tmp_path / "b"), max_skips=1))


def test_a_run_that_skips_every_step_is_not_complete(small_run, tmp_path, monkeypatch):
    _poison(monkeypatch, set(range(small_run.steps)))
    config = replace(small_run, run_dir=str(tmp_path), on_nonfinite="skip", max_skips=1000)
    message = (
        f"all {small_run.steps} steps were skipped.*nothing was learnt.*--optimizer.learning-rate"
    )
    with pytest.raises(TrainingError, match=message):
        train(config)
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(TrainingError, match=message):  # resumed at its last step
        train(config)


def test_a_full_disk_is_one_clear_line(small_run, tmp_path, monkeypatch):
    """Here while the summary is written; while saving: see test_checkpoint.py."""

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(report, "write_text", full)
    config = replace(small_run, run_dir=str(tmp_path))
    with pytest.raises(OutputError, match=r"No space left on device.*it resumes"):
        train(config)
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == 12
    monkeypatch.undo()
    assert train(config)["status"] == "complete"


def test_a_failed_save_ends_the_run_at_the_next_step_in_one_line(small_run, make_disk, caplog):
    steps = []

    def let_saves_end(done):
        steps.append(done)
        for thread in threading.enumerate():
            if thread.name.startswith("checkpoint-"):
                thread.join()

    config = replace(
        small_run,
        run_dir=str(make_disk(700) / "run"),
        steps=100,
        checkpoint__every_steps=4,
        checkpoint__keep_last=100,
    )
    logger = logging.getLogger("absl")  # Orbax's
    logger.addHandler(caplog.handler)
    with pytest.raises(CheckpointError, match=r"No space left on device.*last good ch") as e:
        train(config, on_step=let_saves_end)
    logger.removeHandler(caplog.handler)
    assert f"checkpoint of step {steps[-1] - 1} could not be saved" in str(e.value)
    assert "\n" not in str(e.value)
    assert [r for r in caplog.records if r.exc_info] == []


def test_too_little_memory_names_settings_that_can_be_typed():
    config = replace(TrainConfig(batch_size=12, grad_accum=2, loss_chunk=512), model__remat="none")
    assert training._out_of_memory(config) == (
        "device memory is too small for batch_size 12 / grad_accum 2 at data.seq_len 2048: set "
        "--grad-accum 3 or --model.remat full or --loss-chunk 256 or --mesh.fsdp 2 on as many more "
        "devices"
    )
    least = replace(config, batch_size=2, loss_chunk=1, model__remat="full")
    assert training._out_of_memory(least).endswith(": set --mesh.fsdp 2 on as many more devices")


def test_nothing_of_an_earlier_start_is_replaced_without_a_word(small_run, tmp_path):
    """A start that saved nothing keeps its records aside; a run without its checkpoints stays."""
    run_dir = tmp_path / "run"
    config = replace(small_run, run_dir=str(run_dir), steps=4, eval__batches=0)

    def fail(done):
        if done == 3:
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            train(config, on_step=fail)
    first = (run_dir / "metrics.earlier.jsonl").read_bytes()
    train(config)
    assert (run_dir / "metrics.earlier.jsonl").read_bytes() == first
    started, failed, whole = (
        losses_of(run_dir, name)
        for name in ("metrics.earlier.jsonl", "metrics.earlier-1.jsonl", "metrics.jsonl")
    )
    assert started.keys() == {1, 2} == failed.keys()
    assert started.items() | failed.items() < whole.items()
    assert "kept in metrics.earlier-1.jsonl" in events_of(run_dir)[0]
    before = {path: path.read_bytes() for path in run_dir.glob("*.*")}
    (run_dir / "checkpoints" / "4").rename(run_dir / "checkpoints" / "4.damaged")
    with pytest.raises(ConfigError, match="records of a run of 4 steps, whose checkpoints are go"):
        train(config)
    (run_dir / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .*/checkpoints is damaged .4."):
        train(config)
    del before[run_dir / "summary.json"]
    assert before == {path: path.read_bytes() for path in run_dir.glob("*.*")}
