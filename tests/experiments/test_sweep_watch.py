"""Watching a sweep: what its folder says of runs under way, and how that is shown."""

import contextlib
import io
import json
import sys

import pytest
import yaml
from terminal import Terminal

from mmfree_jax.errors import TrainingError
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.process import Outcome
from mmfree_jax.experiments.sweep.record import make_row, write_failure
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import append_result
from mmfree_jax.experiments.sweep.watch import Underway, standing, watch
from mmfree_jax.files import lock


class Folder:
    """A sweep of four runs of one size: 100, 200, 300 and 400 steps of 256 tokens."""

    def __init__(self, path):
        self.config = path / "sweep.yaml"
        self.out = path / "out"
        self.config.write_text(yaml.safe_dump({
            "out": str(self.out), "families": [{"learning_rates": [4e-3]}], "sizes": ["rung-1M"],
            "tokens": [25600, 51200, 76800, 102400],
            "train": {"batch_size": 4, "data": {"seq_len": 64}},
        }))  # fmt: skip
        self.sweep = load_sweep(self.config)
        self.runs = main_runs(self.sweep)
        for name in ("runs", "locks", "failures"):
            (self.out / name).mkdir(parents=True)
        self.held = contextlib.ExitStack()

    def start(self, k, step=None, time_s=0.0):
        name = self.runs[k].name
        self.held.enter_context(lock(self.out / "locks" / f"{name}.lock", name))
        folder = self.out / "runs" / name
        folder.mkdir()
        train = {
            "kind": "train",
            "step": step,
            "time_s": time_s,
            "loss": 2.5,
            "tokens_per_s": 1234.0,
        }
        records = [train, {"kind": "eval", "step": step}] if step else []
        text = "".join(json.dumps(r) + "\n" for r in records) + '{"kind": "tra'
        (folder / "metrics.jsonl").write_text(text)

    def finish(self, k, wall):
        run = self.runs[k]
        summary = {"parameters": {"total": 2, "non_embedding": 1, "ternary": 1}, "tokens": 1,
                   "step": 1, "training_flops": 1.0, "eval_loss": 2.0, "tokens_per_s": 1e3,
                   "device": {"kind": "cpu", "count": 1}, "versions": {}}  # fmt: skip
        append_result(self.out, make_row(run, summary, wall, 1, "0"))
        self.held.close()


@pytest.fixture
def folder(tmp_path):
    made = Folder(tmp_path)
    with made.held:
        yield made


def test_the_time_left_is_the_work_left_at_the_pace_so_far(folder):
    """100 steps took 50 s, and 150 of 300 so far 100 s: 0.6 s a step; 750 are left."""
    folder.finish(0, wall=50.0)
    folder.start(2, step=150, time_s=100.0)
    found = standing(snapshot(folder.sweep))
    (run,) = found.underway
    assert (run.step, run.steps, run.loss, run.tokens_per_s) == (150, 300, 2.5, 1234.0)
    assert run.eta == pytest.approx(100.0)
    assert found.eta == pytest.approx(750 * 0.6)
    assert found.flops_share == pytest.approx(0.25)
    assert found.counts == {"done": 1, "running": 1, "pending": 2}
    assert found.line == "1/4 runs done, 1 running, 2 pending; 25% of the FLOPs, ETA 7m30s"
    assert not found.is_over


def test_runs_at_a_time_share_the_work_but_the_longest_must_end(folder):
    folder.start(0, step=10, time_s=100.0)
    folder.start(1)
    folder.start(2)
    folder.start(3)
    found = standing(snapshot(folder.sweep))
    assert found.eta == pytest.approx(990 * 10.0 / 4)
    assert [u.eta for u in found.underway][1:] == [None] * 3
    folder.held.close()
    for path in (folder.out / "runs").glob("*/metrics.jsonl"):
        path.unlink()
    folder.runs = folder.runs[::-1]
    (folder.out / "runs" / folder.runs[0].name).rmdir()
    folder.start(0, step=100, time_s=10.0)
    write_failure(folder.out, folder.runs[1], Outcome("failed", "error", "why"), 1)
    found = standing(snapshot(folder.sweep))
    assert found.eta == pytest.approx(600 * 0.1)  # the failed run is nobody's to do


def test_nothing_is_promised_without_a_pace(folder):
    folder.start(1)
    found = standing(snapshot(folder.sweep))
    assert found.eta is None
    assert found.line == "0/4 runs done, 1 running, 3 pending; 0% of the FLOPs"


def test_lines_on_a_pipe_come_with_news_and_once_a_minute(folder):
    stream, now, slept = io.StringIO(), 0.0, []

    def sleep(seconds):
        nonlocal now
        now += seconds
        slept.append(seconds)
        if len(slept) == 4:  # after a minute
            folder.start(0, step=50, time_s=5.0)
        if len(slept) == 5:
            for k in range(3):
                folder.finish(k, wall=10.0)
        if len(slept) == 6:
            write_failure(folder.out, folder.runs[3], Outcome("failed", "error", "why"), 1)

    watch(folder.sweep, stream, every=20.0, clock=lambda: now, sleep=sleep)
    assert slept == [20.0] * 6
    assert stream.getvalue().splitlines() == [
        "0/4 runs done, 4 pending; 0% of the FLOPs",
        "0/4 runs done, 4 pending; 0% of the FLOPs",
        "0/4 runs done, 1 running, 3 pending; 5% of the FLOPs, ETA 1m35s",
        "3/4 runs done, 1 pending; 60% of the FLOPs",
        "3/4 runs done, 1 failed; 60% of the FLOPs",
    ]


def test_an_interrupt_ends_the_watch_and_damage_is_named(folder):
    def sleep(_):
        raise KeyboardInterrupt

    watch(folder.sweep, io.StringIO(), every=1.0, sleep=sleep)
    folder.start(0)
    path = folder.out / "runs" / folder.runs[0].name / "metrics.jsonl"
    path.write_text("what\n{}\n")
    with pytest.raises(TrainingError, match="line 1 is not JSON"):
        watch(folder.sweep, io.StringIO(), every=1.0, sleep=sleep)


def test_a_terminal_shows_a_table_until_the_sweep_is_over(folder):
    """The real command on a real terminal, while a run goes on in this process."""
    folder.start(2, step=150, time_s=100.0)
    command = [sys.executable, "-m", "mmfree_jax", "sweep", "status", str(folder.config), "--watch",
               "--every", "0.2"]  # fmt: skip
    shown = Terminal(command, columns=100)
    shown.read(until="ETA 9m27s")  # 850 steps at 2/3 s
    for part in ("under way", "150/300", "50%", "2.500", "1,234", "1m40s", "0/4 runs done"):
        assert part in shown.output
    for k in range(4):
        folder.finish(k, wall=10.0)
    shown.read()
    assert shown.code == 0
    assert "4/4 runs done; 100% of the FLOPs" in shown.output
    assert "4 done; " in shown.output  # what `sweep status` says


def test_a_branch_counts_from_where_it_left_its_trunk():
    assert Underway("decay", 100, 150, 200, 2.5, 1e3, 30.0).share == pytest.approx(0.5)
    assert Underway("decay", 100, 150, 200, 2.5, 1e3, 30.0).eta == pytest.approx(30.0)
    assert Underway("decay", 100, 100, 200, None, None, 0.0).eta is None
