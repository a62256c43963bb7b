"""Whole runs in this process, on a mesh of eight simulated devices."""

import itertools
import json
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from whole_runs import replace, stop_at

from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.train import report, setup
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("cached_compilation", "traced_once")

TIMING = ("time_s", "tokens_per_s", "eta_s", "_share", "_s")


def _records(run_dir, *kinds):
    """The records, without what depends on the clock or on restarts."""
    kept = []
    for record in read_history(run_dir / "metrics.jsonl"):
        if record["kind"] in kinds:
            kept.append(
                {
                    k: v
                    for k, v in record.items()
                    if not k.endswith(TIMING) and not k.startswith("changed_share")
                }
            )
    return kept


def test_a_run_leaves_everything_behind(finished):
    config, run_dir, summary = finished
    assert summary["status"] == "complete"
    assert summary["step"] == config.steps == 12
    assert summary["tokens"] == 12 * 8 * 16
    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert checkpoint_steps(run_dir / "checkpoints") == [8, 12]
    assert (run_dir / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "config.yaml").exists()

    records = read_history(run_dir / "metrics.jsonl")
    trained = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trained] == list(range(1, 13))
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert trained[0]["learning_rate"] == 0
    assert trained[2]["learning_rate"] == pytest.approx(1e-2)
    for record in trained:
        assert record["perplexity"] == pytest.approx(np.exp(record["loss"]))
        assert record["mfu"] is None  # a CPU is not in the table
        shares = sum(record[f"{n}_share"] for n in ("data", "step", "eval", "checkpoint"))
        assert 0 < shares <= 1.0001
    measured = [r for r in trained if "zero_share" in r]
    assert [r["step"] for r in measured] == [4, 8, 12]
    assert measured[0]["changed_share"] is None
    assert 0 < measured[1]["changed_share"] < 1
    assert {"zero_share_mixer", "zero_share_glu", "zero_share_head"} <= measured[0].keys()

    evaluated = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluated] == [6, 12]
    # A byte tokenizer without special tokens: one byte a token.
    assert evaluated[0]["bits_per_byte"] == pytest.approx(evaluated[0]["loss"] / np.log(2))
    assert summary["eval_loss"] == evaluated[-1]["loss"]


def test_a_finished_run_says_so(finished, capsys):
    config, run_dir, summary = finished
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert train(config) == summary
    assert "already holds this run, complete at step 12" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("text", ["[]", '"complete"', "{", "3"])
def test_a_damaged_summary_is_none(finished, text):
    config, run_dir, _ = finished
    run = SimpleNamespace(run_dir=run_dir, place=run_dir, config=config)
    good = (run_dir / report.SUMMARY).read_bytes()
    (run_dir / report.SUMMARY).write_text(text)
    try:
        assert report.finished_summary(run) is None
    finally:
        (run_dir / report.SUMMARY).write_bytes(good)


@pytest.mark.parametrize("every", [1, 5])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, tmp_path, every):
    """Also where records are means over several steps, and the interruption falls between."""
    whole, whole_dir, _ = finished
    if every > 1:
        whole_dir = tmp_path / "whole"
        whole = replace(whole, run_dir=str(whole_dir), log__every_steps=every)
        train(whole)
    broken = replace(whole, run_dir=str(tmp_path / "broken"))
    for step, number in ((3, signal.SIGTERM), (7, signal.SIGUSR1)):
        summary = train(broken, on_step=stop_at(step, number))
        assert (summary["status"], summary["stopped_by"]) == ("stopped", number.name)
        assert checkpoint_steps(tmp_path / "broken" / "checkpoints")[-1] == step
    assert train(broken)["status"] == "complete"
    kinds = ("train", "eval")
    assert _records(tmp_path / "broken", *kinds) == _records(whole_dir, *kinds)


def test_a_run_stops_where_it_is_told_and_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    whole, whole_dir, _ = finished
    config = replace(whole, run_dir=str(tmp_path))
    for end in (5, 5, 9):  # the second finds the step made
        summary = train(replace(config, stop_at=end))
        assert (summary["status"], summary["stopped_by"]) == ("stopped", "stop_at")
        assert summary["step"] == checkpoint_steps(tmp_path / "checkpoints")[-1] == end
        assert _records(tmp_path, "eval")[-1]["step"] == end
    assert train(config)["status"] == "complete"
    assert _records(tmp_path, "train") == _records(whole_dir, "train")


def test_records_beyond_the_restored_step_are_dropped(small_run, tmp_path):
    """As after a kill between two checkpoints."""
    config = replace(small_run, run_dir=str(tmp_path))
    train(config, on_step=stop_at(5))
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 6, "tokens": 0, "loss": 99.0}\n{"kind": "tra')
    train(config)
    assert all(r["loss"] < 99 for r in _records(tmp_path, "train"))
    assert [r["step"] for r in _records(tmp_path, "train")] == list(range(1, 13))


@pytest.mark.slow
def test_another_mesh_and_accumulation_may_go_on(small_run, tmp_path):
    config = replace(small_run, run_dir=str(tmp_path))
    train(config, on_step=stop_at(6))
    other = replace(config, mesh__fsdp=1, mesh__tensor=2, grad_accum=2, log__every_steps=3)
    assert train(other)["step"] == 12


def test_a_constant_schedule_may_be_prolonged(small_run, tmp_path):
    config = replace(
        small_run, run_dir=str(tmp_path), steps=4, optimizer__schedule="constant", eval__batches=0
    )
    train(config)
    assert train(replace(config, steps=6))["step"] == 6


def test_a_damaged_checkpoint_is_passed_over(small_run, tmp_path, capsys):
    config = replace(small_run, run_dir=str(tmp_path))
    train(config, on_step=stop_at(7))
    victim = max(
        (p for p in (tmp_path / "checkpoints" / "7" / "state").rglob("*") if p.is_file()),
        key=lambda p: p.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[::-1])
    assert train(config)["step"] == 12
    out = capsys.readouterr().out
    assert f"{tmp_path}/checkpoints/7" in out
    assert "resumed from checkpoint 4" in out
    assert [r["step"] for r in _records(tmp_path, "train")] == list(range(1, 13))


def test_a_complete_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(
    finished, tmp_path, capsys
):
    config, whole, _ = finished
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    config = replace(config, run_dir=str(run_dir))
    last = run_dir / "checkpoints" / "12"
    victim = max((last / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    damaged = victim.read_bytes()[::-1]
    victim.write_bytes(damaged)
    assert train(config)["step"] == 12
    out = capsys.readouterr().out
    assert "already holds this run" not in out
    assert f"{last}: " in out
    assert "falling back to the checkpoint before" in out
    assert "resumed from checkpoint 8" in out
    kept = last.with_name("12.damaged") / victim.relative_to(last)
    assert kept.read_bytes() == damaged  # nothing is thrown away
    for kind in ("train", "eval"):
        assert _records(run_dir, kind) == _records(whole, kind)
    train(config)  # whole again
    assert "already holds this run, complete at step 12" in capsys.readouterr().out


def test_max_minutes_stops_with_a_checkpoint_and_goes_on(small_run, tmp_path, capsys):
    config = replace(small_run, run_dir=str(tmp_path), max_minutes=10.0, stop_at=11)
    now = [0.0]

    def tick(done):
        now[0] += 100.0

    summary = train(config, clock=lambda: now[0], on_step=tick)
    assert (summary["status"], summary["stopped_by"]) == ("stopped", "max_minutes")
    assert summary["step"] == 6
    assert checkpoint_steps(tmp_path / "checkpoints")[-1] == 6
    assert (tmp_path / "loss_curve.png").exists()
    # Told before the first step, as the time that is left is that of all steps.
    assert (
        "; stops at step 11 (stop_at) or after 10 minutes (max_minutes)\n"
        in capsys.readouterr().out
    )
    config = replace(config, stop_at=None, max_minutes=None)
    assert train(config, clock=lambda: now[0])["status"] == "complete"
    assert "; stops" not in capsys.readouterr().out


def test_checkpoints_by_the_clock(small_run, tmp_path):
    config = replace(
        small_run,
        run_dir=str(tmp_path),
        checkpoint__every_minutes=5.0,
        checkpoint__every_steps=1000,
        checkpoint__keep_last=10,
    )
    now = [0.0]

    def tick(done):
        now[0] += 100.0

    train(config, clock=lambda: now[0], on_step=tick)
    assert checkpoint_steps(tmp_path / "checkpoints") == [3, 6, 9, 12]


def test_samples_go_on_record(small_run, tmp_path, monkeypatch):
    calls = []

    def sampler(model, params, tokenizer, prompt, **kwargs):
        calls.append((tokenizer, prompt, kwargs))
        return prompt + " all people"

    monkeypatch.setattr(setup, "load_tokenizer", lambda path: "tokenizer")
    config = replace(
        small_run,
        run_dir=str(tmp_path),
        eval__sample_tokens=7,
        eval__sample_every_steps=5,
        eval__sample_prompt="we hold",
    )
    train(config, sampler=sampler)
    samples = [r for r in read_history(tmp_path / "metrics.jsonl") if r["kind"] == "sample"]
    assert [r["step"] for r in samples] == [5, 10, 12]
    assert (tmp_path / "sample.txt").read_text() == "we hold all people\n"
    assert calls[0] == ("tokenizer", "we hold", calls[0][2])
    assert calls[0][2]["max_new_tokens"] == 7


def test_metrics_are_read_one_step_late(small_run, tmp_path, monkeypatch):
    """When step s is dispatched, the last record is of step s - 2 at most."""
    path = tmp_path / "metrics.jsonl"
    config = replace(
        small_run,
        run_dir=str(tmp_path),
        eval__batches=0,
        log__ternary_every_steps=0,
        checkpoint__every_steps=100,
    )
    seen = {}
    train(config, on_step=lambda s: seen.update({s: len(_records(tmp_path, "train"))}))
    assert path.exists()
    assert seen == {s: s - 1 for s in range(1, 13)}


def test_signals_are_put_back(small_run, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(replace(small_run, run_dir=str(tmp_path), steps=3), on_step=stop_at(2, signal.SIGINT))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_time_of_all_attempts_is_told(small_run, tmp_path, capsys):
    ticks = itertools.count()
    config = replace(small_run, run_dir=str(tmp_path))

    def die(step):
        if step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, clock=lambda: float(next(ticks)), on_step=die)
    first = read_history(tmp_path / "metrics.jsonl")
    lived = first[-1]["time_s"] + first[0]["total_s"]
    began = next(ticks) + 1
    capsys.readouterr()
    goodput = train(config, clock=lambda: float(next(ticks)))["goodput"]

    shares = [value for name, value in goodput.items() if name.endswith("_share")]
    assert sum(shares) == pytest.approx(1)
    assert len(shares) == 8
    assert all(share > 0 for share in shares)
    assert goodput["attempts"] == 2
    # What went by on the clock until the last sign of the first, and in the second but its report.
    assert goodput["total_s"] == pytest.approx(lived + next(ticks) - began, abs=20)
    records = [r for r in read_history(tmp_path / "metrics.jsonl") if r["kind"] == "goodput"]
    assert [r["step"] for r in records] == [0, 0, 4, 4, 4, 8, 12, 12]
    assert records[3]["lost_s"] == goodput["lost_s"]
    assert f"goodput {goodput['step_share']:.1%} of " in capsys.readouterr().out


def test_a_run_goes_on_from_local_copies_that_are_newer(finished, tmp_path, capsys):
    whole, whole_dir, _ = finished
    run_dir, local = tmp_path / "run", tmp_path / "local"
    config = replace(
        whole, run_dir=str(run_dir), checkpoint__local_dir=str(local),
        checkpoint__local_every_steps=3,
    )  # fmt: skip

    def die_at(step):
        def on_step(done):
            if done == step:
                raise RuntimeError("killed")

        return on_step

    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_step=die_at(7))
    assert checkpoint_steps(run_dir / "checkpoints") == [4]
    with pytest.raises(RuntimeError, match="killed"):  # from step 6, and dies before step 8
        train(config, on_step=die_at(8))
    said = capsys.readouterr().out
    assert "taken from the local copies of step 6: the newest checkpoint is step 4" in said
    assert "resumed from checkpoint 6" in said
    for file in local.glob("*/*/6/pieces.safetensors"):
        file.unlink()
    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_step=die_at(11))
    said = capsys.readouterr().out
    assert "resumed from checkpoint 4" in said
    assert train(config)["status"] == "complete"
    kinds = ("train", "eval")
    assert _records(run_dir, *kinds) == _records(whole_dir, *kinds)
    assert not any(local.iterdir()), "a complete run leaves no copies"
