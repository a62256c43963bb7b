"""Runs that go on from a checkpoint of another under new settings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_contents import arrays_of, assert_same, by_path, events_of, losses_of
from whole_runs import replace, stop_at

from mmfree_jax.cli.train import resolve_config
from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.data import open_dataset, writer
from mmfree_jax.errors import CheckpointError, ConfigError, DataError
from mmfree_jax.files import lock
from mmfree_jax.saved.checkpoint import Checkpointer
from mmfree_jax.saved.manifest import checkpoint_steps, read_manifest
from mmfree_jax.saved.origin import FROM_NOTHING
from mmfree_jax.train import branch, loop
from mmfree_jax.train.branch import take_branch
from mmfree_jax.train.branch_source import Source, branch_config, parse_source
from mmfree_jax.train.flops import count_flops
from mmfree_jax.train.init_from import initial_params
from mmfree_jax.train.setup import open_run
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("cached_compilation", "traced_once")


@pytest.fixture
def parent(finished):
    """The folder of a run of 12 steps, with checkpoints of steps 8 and 12."""
    return finished[1]


def _branch(source, run_dir, **changes):
    return replace(branch_config(str(source), str(run_dir)), **changes)


def _taken(source, run_dir, **changes):
    """What a branch takes over, without training."""
    return take_branch(open_run(_branch(source, run_dir, **changes)))


def test_unchanged_a_branch_is_the_uninterrupted_run_bit_for_bit(parent, tmp_path, capsys):
    new = tmp_path / "new"
    summary = train(_branch(f"{parent}@8", new))
    assert summary["status"] == "complete"
    assert summary["tokens"] == 12 * 8 * 16
    assert_same(arrays_of(new, 12), arrays_of(parent, 12))
    whole = losses_of(parent)
    assert losses_of(new) == {step: whole[step] for step in (9, 10, 11, 12)}

    account = (
        f"branched from {parent} at step 8 (1,024 tokens): weights, optimiser, step and tokens go "
        "on; rows go on at row 64 of the same order; changed: nothing"
    )
    assert events_of(new) == [account]
    assert account in capsys.readouterr().out
    assert read_yaml(new / "config.yaml")["branch_from"] == f"{parent}@8"
    origin = json.loads((new / "summary.json").read_text())["origin"]
    assert (origin["parent"], origin["step"], origin["tokens"]) == (str(parent), 8, 1024)
    assert len(origin["checkpoint"]) == 64
    assert read_manifest(new / "checkpoints" / "12").origin.to_json() == origin
    assert json.loads((parent / "summary.json").read_text())["origin"] is None
    assert checkpoint_steps(parent / "checkpoints") == [8, 12]


def test_a_branch_resumes_without_its_parent(parent, tmp_path):
    copy, new = tmp_path / "copy", tmp_path / "new"
    shutil.copytree(parent, copy)
    argv = ["--branch-from", f"{copy}@8", "--run-dir", str(new), "--checkpoint.every-steps", "99"]
    first = train(resolve_config(argv), on_step=stop_at(10))
    assert (first["stopped_by"], first["step"]) == ("SIGTERM", 10)
    shutil.rmtree(copy)
    for again in (argv, ["--branch-from", str(copy), *argv[2:]]):  # the step may be left out
        assert resolve_config(again) == replace(
            from_dict(TrainConfig, read_yaml(new / "config.yaml")), branch_from=again[1]
        )
    assert train(resolve_config(["--config", str(new / "config.yaml")]))["step"] == 12
    assert_same(arrays_of(new, 12), arrays_of(parent, 12))
    assert losses_of(new) == {step: losses_of(parent)[step] for step in (9, 10, 11, 12)}
    assert [e.partition(" ")[0] for e in events_of(new)] == ["branched", "resumed"]
    with pytest.raises(ConfigError, match=r"branch_from '.*copy@8' -> '.*copy@4'"):
        train(_branch(new, new, branch_from=f"{copy}@4"))


def test_killed_before_its_first_checkpoint_it_begins_again(parent, tmp_path, monkeypatch):
    new = tmp_path / "new"

    class Killed(BaseException):
        pass

    def save(self, step, *_):
        (self.folder / str(step)).mkdir()  # as an unfinished save leaves it
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", save)
        with pytest.raises(Killed):
            train(_branch(f"{parent}@8", new))
    assert checkpoint_steps(new / "checkpoints") == []
    assert train(_branch(f"{parent}@8", new))["step"] == 12
    assert_same(arrays_of(new, 12), arrays_of(parent, 12))


def test_its_own_checkpoint_comes_before_its_first_step(parent, tmp_path):
    new, seen = tmp_path / "new", []

    def on_step(done):
        seen.append((done, checkpoint_steps(new / "checkpoints")))

    train(_branch(f"{parent}@8", new, steps=9), on_step=on_step)
    assert seen == [(9, [8])]
    assert (
        read_manifest(new / "checkpoints" / "8").data
        == read_manifest(parent / "checkpoints" / "8").data
    )


def test_a_finished_run_is_extended_at_another_rate_and_schedule(parent, tmp_path):
    new = tmp_path / "new"
    changes = {"optimizer__learning_rate": 4e-3, "optimizer__schedule": "constant"}
    train(_branch(parent, new, steps=14, eval__batches=0, **changes))
    losses = losses_of(new)
    assert list(losses) == [13, 14]
    assert [rate for _, _, rate, _ in losses.values()] == pytest.approx([4e-3, 4e-3])
    assert int(arrays_of(new, 14)[".opt_state[1].count"]) == 14
    (account,) = events_of(new)
    assert account.endswith(
        "changed: steps 12 -> 14, optimizer.learning_rate 0.01 -> 0.004, "
        "optimizer.schedule paper -> constant, eval.batches 2 -> 0"
    )


def test_another_batch_size_goes_on_at_the_next_row(parent, tmp_path, monkeypatch):
    new, starts = tmp_path / "new", []
    inner = loop.make_train_iterator

    def make_train_iterator(*args, start_row, **kwargs):
        starts.append(start_row)
        return inner(*args, start_row=start_row, **kwargs)

    monkeypatch.setattr(loop, "make_train_iterator", make_train_iterator)
    config = _branch(f"{parent}@8", new, batch_size=16, eval__batches=0)
    train(config, on_step=stop_at(10))
    summary = train(config)
    assert starts == [64, 64 + 2 * 16]
    tokens = {step: tokens for step, (_, _, _, tokens) in losses_of(new).items()}
    assert tokens == {9: 1024 + 256, 10: 1024 + 512, 11: 1024 + 768, 12: 1024 + 1024}
    assert summary["tokens"] == 2048
    flops = count_flops(config.model, 16).training
    assert summary["training_flops"] == flops * 2048

    # A branch of the branch counts on from all of it.
    origin = _taken(f"{new}@10", tmp_path / "third", data__seq_len=8).origin
    assert (origin.step, origin.tokens, origin.row) == (10, 1536, 0)
    assert origin.flops == flops * 1536
    assert _taken(f"{new}@10", tmp_path / "third").origin.row == 96


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    """Writes a data folder of other text; its tokenizer's checksum is given."""

    def write(sha256):
        folder = tmp_path_factory.mktemp("data") / "other"
        identity = {"kind": "byte", "vocab_size": 256, "bos_id": None, "eos_id": None}
        documents = [np.full(99, 65 + i, np.uint8) for i in range(30)]
        splits = {"train": documents, "heldout": documents[:5]}
        writer.write_dataset(folder, splits, identity | {"sha256": sha256})
        return str(folder)

    return write


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data__seq_len": 8}, "data.seq_len 16 -> 8"),
        ({"data__seed": 3}, "data.seed 0 -> 3"),
        ({"data__paths": "other"}, "other data"),
        (
            {"data__paths": "both", "data__weights": (2.0, 1.0)},
            "other data, data.weights () -> (2.0, 1.0)",
        ),
    ],
)
def test_where_the_order_of_rows_changes_they_begin_anew(
    parent, tmp_path, other_data, changes, why
):
    other = changes.get("data__paths")
    if other:
        paths = branch_config(str(parent)).data.paths if other == "both" else ()
        changes = changes | {"data__paths": (*paths, other_data("0"))}
        changes = dict(sorted(changes.items()))
    origin = _taken(f"{parent}@8", tmp_path / "new", **changes).origin
    assert (origin.step, origin.tokens, origin.row) == (8, 1024, 0)
    assert f"rows begin anew at row 0 of another order ({why})" in origin.account


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model__hidden_size": 64}, ConfigError, "model.hidden_size is 64, there 32.*set these"),
        ({"model__norm_eps": 1e-3}, ConfigError, "model.norm_eps is 0.001, there 1e-06"),
        ({"model__intermediate_size": 64}, ConfigError, "model.intermediate_size is 64, there 32"),
        ({"seed": 5}, ConfigError, r"seed is 5, there 0 \(nothing is initialised\)"),
        ({"model__initializer_range": 1.0}, ConfigError, "model.initializer_range is 1.0, there"),
        ({"steps": 8}, ConfigError, "steps is 8, but .* has made 8 .*set --steps above 8"),
    ],
)
def test_what_a_branch_must_keep_is_named(parent, tmp_path, changes, error, message):
    before = sorted(p.stat().st_mtime_ns for p in parent.rglob("*"))
    with pytest.raises(error, match=message):
        _taken(f"{parent}@8", tmp_path / "new", **changes)
    assert sorted(p.stat().st_mtime_ns for p in parent.rglob("*")) == before


def test_data_of_another_tokenizer_is_refused(parent, tmp_path, other_data):
    with pytest.raises(DataError, match=f"branch_from {parent} with byte .*same tokenizer"):
        _taken(parent, tmp_path / "new", steps=20, data__paths=(other_data("1"),))


def _refused(argv, message, error=(ConfigError, CheckpointError)):
    with pytest.raises(error, match=message):
        train(resolve_config(argv))


def test_weights_of_a_run_take_no_data_of_another_tokenizer(parent, other_data):
    config = resolve_config(["--init-from", str(parent), "--data.paths", other_data("0")])
    same, other = (open_dataset(other_data(sha256), "train") for sha256 in ("0", "1"))
    with pytest.raises(DataError, match=f"init_from {parent} with byte .*same tokenizer"):
        initial_params(parent, config, data=[same, other])
    assert initial_params(parent, config, data=[same])[0]["head"]


def test_a_checkpoint_that_is_not_there_is_told_with_those_that_are(parent, tmp_path):
    new = ["--run-dir", str(tmp_path / "new")]
    _refused(["--branch-from", f"{parent}@5", *new], "no checkpoint of step 5: it has 8, 12")
    _refused(["--branch-from", str(tmp_path / "gone"), *new], "gone is not a training run")
    _refused(["--branch-from", f"{parent}@best", *new], "best': give a step behind the @")
    (tmp_path / "empty").mkdir()
    shutil.copy(parent / "config.yaml", tmp_path / "empty")
    _refused(["--branch-from", str(tmp_path / "empty"), *new], "holds no checkpoint that can be")
    assert not (tmp_path / "new").exists()


def test_its_folder_is_its_own(parent, tmp_path):
    before = sorted(parent.iterdir())
    for place in (parent, parent / "new", parent / "checkpoints"):
        _refused(["--branch-from", str(parent), "--run-dir", str(place)], "give another --run-dir")
    assert sorted(parent.iterdir()) == before
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    _refused(
        ["--branch-from", str(parent), "--run-dir", str(other), "--steps", "20"],
        f"holds another run .*branch_from None -> '{parent}': give another --run-dir; or "
        f"its settings, --config {other}/config.yaml$",
    )
    assert checkpoint_steps(other / "checkpoints") == [8, 12]


def test_what_goes_with_it_and_what_does_not(parent, tmp_path):
    new = ["--run-dir", str(tmp_path / "new")]
    given = ["--branch-from", str(parent), *new]
    _refused([*given, "--preset", "tiny"], "leave out the preset 'tiny'")
    _refused([*given, "--init-from", str(parent)], "leave it out, or --init-from")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"branch_from": str(parent), "steps": 20, "data": {"seed": 4}}))
    config = resolve_config(["--config", str(path), *new, "--batch-size", "16"])
    was = from_dict(TrainConfig, read_yaml(parent / "config.yaml"))
    assert config == replace(
        was, run_dir=new[1], branch_from=str(parent), steps=20, data__seed=4, batch_size=16
    )
    path.write_text(yaml.safe_dump({"branch_from": str(parent), "preset": "tiny"}))
    _refused(["--config", str(path), *new], "leave out the preset 'tiny'")


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(parent, tmp_path, capsys):
    copy, new = tmp_path / "copy", tmp_path / "new"
    shutil.copytree(parent, copy)
    files = (p for p in (copy / "checkpoints" / "12" / "state").rglob("*") if p.is_file())
    victim = max(files, key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[::-1])
    train(_branch(copy, new, steps=9))
    out = capsys.readouterr().out
    assert f"{copy}/checkpoints/12" in out
    assert "falling back to the checkpoint before" in out
    assert f"branched from {copy} at step 8" in out
    assert len(events_of(new)) == 2
    assert (copy / "checkpoints" / "12").is_dir()  # it is not ours to move away
    with pytest.raises(CheckpointError, match=r"does not match .*give another step \(8\)"):
        _taken(f"{copy}@12", tmp_path / "other", steps=20)


def test_a_run_that_is_being_trained_may_be_branched_from(parent, tmp_path, monkeypatch):
    with lock(parent / ".lock", "run"):
        taken = _taken(f"{parent}@8", tmp_path / "new")
        assert taken.notes == [f"{parent} is in use by another job, which goes on undisturbed"]
    assert _taken(f"{parent}@8", tmp_path / "new").notes == []

    # It deletes the checkpoint while that is read.
    copy = tmp_path / "copy"
    shutil.copytree(parent, copy)
    inner = branch.restore

    def restore(folder, *args, **kwargs):
        restored = inner(folder, *args, **kwargs)
        (folder / "manifest.json").unlink()
        return restored

    monkeypatch.setattr(branch, "restore", restore)
    with pytest.raises(
        CheckpointError, match=r"8 was deleted while it was read.*--checkpoint.keep-every"
    ):
        _taken(f"{copy}@8", tmp_path / "new")


def test_meshes_and_optimisers_of_other_form(parent, tmp_path):
    """The state itself is the same, wherever it lies and whatever stands beside it."""
    there = arrays_of(parent, 8)
    for mesh in ({"mesh__fsdp": 8}, {"mesh__fsdp": 1, "mesh__tensor": 2}):
        assert_same(by_path(_taken(f"{parent}@8", tmp_path / "new", **mesh).state), there)
    form = {"optimizer__clip_norm": None, "optimizer__weight_decay": 0.0}
    opt_state = _taken(f"{parent}@8", tmp_path / "new", **form).state.opt_state
    adam, schedule = opt_state
    assert int(adam.count) == int(schedule.count) == 8
    for name, moment in (("mu", adam.mu), ("nu", adam.nu)):
        weight = np.asarray(moment["embedding"]["weight"])
        np.testing.assert_array_equal(weight, there[f".opt_state[1].{name}['embedding']['weight']"])
    dtypes = {"optimizer__moment_dtype": "bfloat16", "model__param_dtype": "bfloat16"}
    state = _taken(f"{parent}@8", tmp_path / "new", **dtypes).state
    assert state.params["embedding"]["weight"].dtype == "bfloat16"
    assert state.opt_state[1].mu["embedding"]["weight"].dtype == "bfloat16"
    assert state.opt_state[1].nu["embedding"]["weight"].dtype == "float32"


def test_layers_may_be_unrolled_in_a_branch_and_in_place(parent, tmp_path):
    """The checkpoints of both programs are the same, and so is the function."""
    new = tmp_path / "new"
    train(_branch(f"{parent}@8", new, model__scan_layers=False))
    assert_same(arrays_of(new, 8), arrays_of(parent, 8))
    whole, unrolled = losses_of(parent), losses_of(new)
    for step in (9, 10, 11, 12):
        assert unrolled[step][0] == pytest.approx(whole[step][0], rel=1e-3)
    # And back, in the run's own folder.
    back = replace(from_dict(TrainConfig, read_yaml(new / "config.yaml")), model__scan_layers=True)
    shutil.rmtree(new / "checkpoints" / "12")
    train(back)
    assert read_yaml(new / "config.yaml")["model"]["scan_layers"] is True
    assert losses_of(new)[12] == whole[12]


@pytest.mark.parametrize(
    ("text", "source"),
    [("runs/a", ("runs/a", None)), ("runs/a@12", ("runs/a", 12)), ("@3", ("@3", None)),
     ("a@b@4", ("a@b", 4)), ("runs/me@home", ("runs/me@home", None))],
)  # fmt: skip
def test_what_a_source_says(text, source):
    found = parse_source(text)
    assert (str(found.run), found.step) == source


def test_a_folder_of_that_very_name_comes_first(parent, tmp_path):
    shutil.copytree(parent, tmp_path / "run@8")
    assert parse_source(str(tmp_path / "run@8")) == Source(tmp_path / "run@8")


def test_a_checkpoint_of_before_there_were_origins(tmp_path, byte_data):
    old = Path(__file__).parents[1] / "saved" / "old" / "run"
    assert read_manifest(old / "checkpoints" / "300").origin == FROM_NOTHING
    changes = {"steps": 400, "data__seq_len": 8, "data__paths": (str(byte_data),)}
    origin = _taken(old, tmp_path / "new", **changes).origin
    assert (origin.step, origin.tokens, origin.row) == (300, 300 * 8 * 16, 0)
