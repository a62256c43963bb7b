"""The runner with a trainer that only pretends: skipping, resuming, failures, devices, locks."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from quick_trainer import TRAINER, after, quiet, starts

from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.order import in_order
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.process import child_environment, outcome
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import RESULTS, read_results
from mmfree_jax.files import is_locked


def test_done_runs_are_skipped(make_sweep, trainer):
    sweep = make_sweep()
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 6
    assert not tally.failed
    again = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert not again.done
    assert all(len(s) == 1 for s in starts(sweep).values())
    rows = read_results(Path(sweep.out))
    assert {r["run"] for r in rows} == set(tally.done)
    assert len({r["config_hash"] for r in rows}) == 6
    for row in rows:
        assert all(row[c] for c in ("code", "device", "data_fingerprint", "wall_s", "finished_at"))


def test_runs_that_are_tracked_have_the_sweep_as_their_group(make_sweep, trainer, sweep_data):
    train = {"batch_size": 4, "data": {"paths": [str(sweep_data)], "seq_len": 64},
             "log": {"wandb_project": "p"}}  # fmt: skip
    sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"], train=train)
    (name,) = run_sweep(sweep, Options(), say=quiet, command=trainer).done
    config = yaml.safe_load((Path(sweep.out) / "configs" / f"{name}.yaml").read_text())
    assert (config["log"]["wandb_project"], config["log"]["wandb_group"]) == ("p", "out")


def test_a_run_that_ended_before_its_row_is_only_recorded(make_sweep, trainer):
    sweep = make_sweep()
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    table = Path(sweep.out) / RESULTS
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 1
    assert all(len(s) == 1 for s in starts(sweep).values())
    assert len(read_results(Path(sweep.out))) == 6


def test_rungs_and_shapes_have_the_vocabulary_of_the_data(make_sweep, trainer):
    sizes = ["rung-1M", "2x32", "tiny"]
    found = {r.size: r.config.model.vocab_size for r in main_runs(make_sweep(sizes=sizes))}
    assert found == {"rung-1M": 256, "2x32": 256, "tiny": 264}
    named = {"batch_size": 4, "model": {"vocab_size": 512}, "data": {"seq_len": 64}}
    assert {r.config.model.vocab_size for r in main_runs(make_sweep(sizes=sizes, train=named))} == {
        512
    }
    own = [{"learning_rates": [4e-3], "train": {"model": {"vocab_size": 300}}}]
    found = {r.config.model.vocab_size for r in main_runs(make_sweep(sizes=sizes, families=own))}
    assert found == {300}
    # A table of runs at 32,000, as rungs had it once, is told apart.
    train = make_sweep().train
    old = make_sweep(sizes=["2x32"], rates=(4e-3,), train=train | {"model": {"vocab_size": 32_000}})
    run_sweep(old, Options(), say=quiet, command=trainer)
    with pytest.raises(SweepError, match=r"set train\.model\.vocab_size to 32000, as it was, or"):
        snapshot(make_sweep(sizes=["2x32"], rates=(4e-3,)))


def test_failures_are_isolated_and_kept_with_their_reason(make_sweep, trainer):
    sweep = make_sweep(rates=(4e-3, 0.5, 0.6, 0.7, 0.8), sizes=["rung-1M"])
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 1
    found = snapshot(sweep)
    kinds = {f["run"].split("lr")[1].split("-")[0]: (f["kind"], f["reason"])
             for f in found.failures.values()}  # fmt: skip
    assert kinds["0.5"][0] == "diverged"
    assert "lower the rate" in kinds["0.5"][1]
    assert kinds["0.6"][0] == "memory"
    assert kinds["0.7"] == ("error", "exit code 1: RuntimeError: a bug")
    assert kinds["0.8"][0] == "memory"
    assert "SIGKILL" in kinds["0.8"][1]
    before = starts(sweep)
    assert not run_sweep(sweep, Options(), say=quiet, command=trainer).failed
    assert starts(sweep) == before
    retried = run_sweep(sweep, Options(retry_failed=True), say=quiet, command=trainer)
    assert len(retried.failed) == 4
    assert sum(map(len, starts(sweep).values())) == 5 + 4


def test_a_repaired_failure_is_forgotten(make_sweep, trainer, tmp_path):
    sweep = make_sweep(rates=(0.7,), sizes=["rung-1M"])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER.replace("rate == 0.7", "False"))
    run_sweep(sweep, Options(retry_failed=True), say=quiet, command=trainer)
    assert not list((Path(sweep.out) / "failures").iterdir())
    assert len(read_results(Path(sweep.out))) == 1


def test_cut_off_runs_go_on(make_sweep, trainer, monkeypatch):
    sweep = make_sweep(rates=(4e-3,))
    monkeypatch.setenv("FAKE", "slow")
    # Each would wait for ever: that the sweep returns is the end of its time.
    options, clock = Options(parallel=2, max_minutes=1), after(lambda: len(starts(sweep)) == 2)
    tally = run_sweep(sweep, options, say=quiet, command=trainer, clock=clock)
    assert sorted(tally.stopped) == sorted(starts(sweep))
    assert len(tally.stopped) == 2
    assert {snapshot(sweep).status(r) for r in snapshot(sweep).runs} == {"cut off"}
    tally = run_sweep(sweep, Options(parallel=2), say=quiet, command=trainer)
    assert len(tally.done) == 2
    assert all(len(s) == 2 for s in starts(sweep).values())


def test_a_signal_stops_the_runs_and_is_reported(make_sweep, trainer, monkeypatch):
    sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"])
    monkeypatch.setenv("FAKE", "slow")

    def interrupt():
        while not starts(sweep):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    thread.join()
    assert tally.signal == signal.SIGTERM
    assert len(tally.stopped) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_small_runs_share_a_device_and_large_ones_do_not(make_sweep, trainer):
    sweep = make_sweep(rates=(4e-3,), pack_below=2e6)  # between rung-1M and rung-3M
    run_sweep(sweep, Options(parallel=3), say=quiet, command=trainer)
    found = {name.split("-t")[0]: s for name, s in starts(sweep).items()}
    assert found == {"matmulfree-rung-1M": ["0.300"], "matmulfree-rung-3M": ["all"]}
    shares = {r["size"]: r["parallel"] for r in read_results(Path(sweep.out))}
    assert shares == {"rung-1M": "3", "rung-3M": "1"}


def test_runs_are_spread_over_the_gpus_before_they_share_one(make_sweep, trainer, monkeypatch):
    monkeypatch.setenv("FAKE", "slow")
    sweep = make_sweep(rates=(1e-3, 2e-3, 4e-3), sizes=["rung-1M"])
    options = Options(parallel=2, gpus=("4", "6"), max_minutes=1)

    def gpus():
        return sorted(filter(None, (p.read_text() for p in Path(sweep.out).glob("runs/*/gpu"))))

    run_sweep(sweep, options, say=quiet, command=trainer, clock=after(lambda: len(gpus()) == 3))
    assert gpus() in (["4", "4", "6"], ["4", "6", "6"])


def test_one_run_of_a_shape_compiles_for_the_others(make_sweep, trainer, monkeypatch):
    monkeypatch.setenv("FAKE", "compiles")  # and never comes to train
    sweep = make_sweep(rates=(1e-3, 2e-3))
    looks = iter(range(5))  # that others could have been started at

    def long_since():
        return len(starts(sweep)) >= 2 and next(looks, None) is None

    options = Options(parallel=4, max_minutes=1)
    tally = run_sweep(sweep, options, say=quiet, command=trainer, clock=after(long_since))
    assert len({name.split("-t")[0] for name in starts(sweep)}) == len(starts(sweep)) == 2
    assert len(tally.stopped) == 2
    monkeypatch.delenv("FAKE")
    assert len(run_sweep(sweep, Options(parallel=4), say=quiet, command=trainer).done) == 4
    assert len(read_results(Path(sweep.out))) == 4


def test_a_main_run_waits_only_for_the_tuning_runs_of_its_size(make_sweep, trainer, monkeypatch):
    tuning = {"tokens": 1e4, "sizes": ["rung-1M", "rung-3M"]}
    sizes = ["rung-1M", "rung-3M", "rung-7M"]
    sweep = make_sweep(tuning=tuning, sizes=sizes, tokens=[2e4])
    monkeypatch.setenv("FAKE", "broken at 192")
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 3 + 1  # rung-3M is not known, and rung-7M rests on it
    assert tally.waiting == 2
    monkeypatch.delenv("FAKE")
    tally = run_sweep(sweep, Options(retry_failed=True), say=quiet, command=trainer)
    assert len(tally.done) == 3 + 2
    assert tally.waiting == 0


def test_the_longest_of_each_shape_come_first_then_the_longest(make_sweep):
    sweep = make_sweep(rates=(4e-3,), tokens=[1e4, 1e5, 1e6], sizes=["rung-1M", "rung-7M"])
    runs = [(r.size, r.tokens) for r in in_order(main_runs(sweep), "longest")]
    assert [size for size, _ in runs[:2]] == ["rung-7M", "rung-1M"]
    assert runs[0][1] == runs[1][1] == max(tokens for _, tokens in runs)
    assert runs[2][0] == "rung-7M"
    assert runs[-1] == ("rung-1M", min(tokens for _, tokens in runs))
    assert len(runs) == 6
    with pytest.raises(ConfigError, match="order is 'random'"):
        Options(order="random")


def test_each_run_sees_one_of_the_gpus_given():
    assert child_environment(gpu="3")["CUDA_VISIBLE_DEVICES"] == "3"
    assert child_environment(parallel=4)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.225"


def test_two_sweeps_at_once_do_not_run_a_run_twice(make_sweep, trainer, monkeypatch):
    sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"])
    monkeypatch.setenv("FAKE", "slow")
    tallies = []

    def second():
        while not starts(sweep):
            time.sleep(0.05)
        # Not from the main thread: signals are the other's.
        monkeypatch.setattr("mmfree_jax.experiments.sweep.runner.Stop.listening", _no_signals)
        tallies.append(run_sweep(sweep, Options(), say=quiet, command=trainer))

    thread = threading.Thread(target=second)
    thread.start()
    clock = after(lambda: not thread.is_alive())
    run_sweep(sweep, Options(max_minutes=1), say=quiet, command=trainer, clock=clock)
    thread.join()
    assert len(tallies[0].elsewhere) == 1
    assert [len(s) for s in starts(sweep).values()] == [1]


def test_a_sweep_that_is_killed_ends_its_runs_which_keep_their_locks(make_sweep, trainer, tmp_path):
    sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"])
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(to_dict(sweep)))
    program = (
        "import sys\n"
        "from mmfree_jax.experiments.sweep.config import load_sweep\n"
        "from mmfree_jax.experiments.sweep.runner import Options, run_sweep\n"
        "run_sweep(load_sweep(sys.argv[1]), Options(), command=lambda c: [*sys.argv[2:], str(c)])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "sweep.yaml"), *trainer("")[:-1]]
    process = subprocess.Popen(command, env=os.environ | {"FAKE": "slow"}, cwd=tmp_path)
    while not starts(sweep):
        assert process.poll() is None
        time.sleep(0.05)
    (lock,) = Path(sweep.out, "locks").iterdir()
    process.kill()
    process.wait()
    until = time.monotonic() + 30  # the trainer sleeps for a minute where nobody tells it to stop
    while is_locked(lock):
        assert time.monotonic() < until
        time.sleep(0.05)


def _no_signals(self):
    return contextlib.nullcontext()


def test_what_the_end_of_a_process_means(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"=== started one\nmmfree: error: old\n=== started two\nValueError: new\n")
    assert outcome(1, log, None).reason == "exit code 1: ValueError: new"
    for number in (15, 2, 1):  # SIGTERM, SIGINT, SIGHUP: a closed terminal goes to all of it
        ends = {outcome(code, log, None).end for code in (128 + number, -number)}
        assert ends == {"stopped"}
    assert outcome(0, log, None).end == "failed"
    assert outcome(0, log, {"status": "stopped", "stopped_by": "max_minutes"}).end == "stopped"
    log.write_bytes(b"=== started one\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: oh\n")
    assert outcome(1, log, None).kind == "memory"


def test_checkpoints_go_only_where_the_config_says(make_sweep, trainer):
    for keep in (True, False):
        sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"], keep_checkpoints=keep)
        sweep = dataclasses.replace(sweep, out=f"{sweep.out}-{keep}")
        run_sweep(sweep, Options(), say=quiet, command=trainer)
        (run_dir,) = (Path(sweep.out) / "runs").iterdir()
        assert (run_dir / "checkpoints").exists() == keep
