"""The runner with a trainer that only pretends: skipping, resuming, failures, shards, rates."""

import contextlib
import csv
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.data import writer
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.cli import sweep as cli
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.order import in_order
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.process import child_environment, outcome
from mmfree_jax.experiments.sweep.report import best_rows, status_text
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import read_failures, snapshot
from mmfree_jax.experiments.sweep.table import RESULTS, read_results
from mmfree_jax.files import is_locked

# Loss is lowest at the rate 4e-3 x (width / 128)^-1; each rate of BAD ends in another way.
_TRAINER = """
import json, math, os, re, signal, sys, time
text = open(sys.argv[1]).read()
field = lambda name: re.search(f"^ *{name}: (.*)$", text, re.M)[1]
out, rate, planned = field("run_dir"), float(field("learning_rate")), int(field("steps"))
behaviour = os.environ.get("FAKE", "")
if behaviour == "slow":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.makedirs(out, exist_ok=True)
with open(out + "/starts", "a") as f:
    f.write(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "all") + "\\n")
open(out + "/gpu", "w").write(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
with open(out + "/metrics.jsonl", "a") as f:
    f.write("" if behaviour == "compiles" else '{"kind": "train"}\\n')
open(out + "/config.yaml", "w").write(text)
if behaviour == "compiles":
    time.sleep(1.5)
if behaviour == "slow" and len(open(out + "/starts").readlines()) == 1:
    signal.sigwait([signal.SIGTERM])
    sys.exit(143)
if rate == 0.5:
    print("mmfree: error: training is not finite: loss nan at step 3; lower the rate")
    sys.exit(2)
if rate == 0.6:
    print("mmfree: error: device memory is too small for batch_size 4")
    sys.exit(2)
if rate == 0.7:
    raise RuntimeError("a bug")
if rate == 0.8:
    os.kill(os.getpid(), signal.SIGKILL)
width = int(field("hidden_size"))
if behaviour == f"broken at {width}":
    raise RuntimeError("broken")
loss = 3 + math.log(rate / (4e-3 * 128 / width)) ** 2
steps = planned if field("stop_at") == "null" else int(field("stop_at"))
status = "complete" if steps == planned else "stopped"
summary = {"status": status, "stopped_by": "stop_at", "step": steps,
  "tokens": steps * 256, "eval_loss": loss,
  "training_flops": 1e9, "parameters": {"total": 2, "non_embedding": 1, "ternary": 1},
  "device": {"kind": "cpu", "count": 1}, "versions": {"jax": "0"}, "tokens_per_s": 1e6}
os.makedirs(out + "/checkpoints/1", exist_ok=True)
json.dump(summary, open(out + "/summary.json", "w"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "bytes"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    rng = np.random.default_rng(0)
    documents = {s: [rng.integers(0, 256, 500).astype(np.uint8)] for s in ("train", "heldout")}
    writer.write_dataset(folder, documents, identity)
    return folder


@pytest.fixture
def make(tmp_path, data):
    def build(rates=(2e-3, 4e-3, 8e-3), **values):
        base = {
            "out": str(tmp_path / "out"),
            "families": [{"base": "matmulfree", "learning_rates": list(rates)}],
            "sizes": ["rung-1M", "rung-3M"],
            "tokens": [1e4],
            "train": {"batch_size": 4, "data": {"paths": [str(data)], "seq_len": 64}},
        }
        return from_dict(SweepConfig, {**base, **values})

    return build


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    return lambda config: [sys.executable, "-S", str(script), str(config)]  # starts in no time


def quiet(_):
    pass


def starts(sweep):
    found = Path(sweep.out).glob("runs/*/starts")
    return {p.parent.name: p.read_text().split() for p in found}


def test_done_runs_are_skipped(make, trainer):
    sweep = make()
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


def test_runs_that_are_tracked_have_the_sweep_as_their_group(make, trainer, data):
    train = {"batch_size": 4, "data": {"paths": [str(data)], "seq_len": 64},
             "log": {"wandb_project": "p"}}  # fmt: skip
    sweep = make(rates=(4e-3,), sizes=["rung-1M"], train=train)
    (name,) = run_sweep(sweep, Options(), say=quiet, command=trainer).done
    config = yaml.safe_load((Path(sweep.out) / "configs" / f"{name}.yaml").read_text())
    assert (config["log"]["wandb_project"], config["log"]["wandb_group"]) == ("p", "out")


def test_a_run_that_ended_before_its_row_is_only_recorded(make, trainer):
    sweep = make()
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    table = Path(sweep.out) / RESULTS
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-1]))
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 1
    assert all(len(s) == 1 for s in starts(sweep).values())
    assert len(read_results(Path(sweep.out))) == 6


def test_rungs_and_shapes_have_the_vocabulary_of_the_data(make, trainer):
    sizes = ["rung-1M", "2x32", "tiny"]
    found = {r.size: r.config.model.vocab_size for r in main_runs(make(sizes=sizes))}
    assert found == {"rung-1M": 256, "2x32": 256, "tiny": 264}
    named = {"batch_size": 4, "model": {"vocab_size": 512}, "data": {"seq_len": 64}}
    assert {r.config.model.vocab_size for r in main_runs(make(sizes=sizes, train=named))} == {512}
    own = [{"learning_rates": [4e-3], "train": {"model": {"vocab_size": 300}}}]
    found = {r.config.model.vocab_size for r in main_runs(make(sizes=sizes, families=own))}
    assert found == {300}
    # A table of runs at 32,000, as rungs had it once, is told apart.
    train = make().train
    old = make(sizes=["2x32"], rates=(4e-3,), train=train | {"model": {"vocab_size": 32_000}})
    run_sweep(old, Options(), say=quiet, command=trainer)
    with pytest.raises(SweepError, match=r"set train\.model\.vocab_size to 32000, as it was, or"):
        snapshot(make(sizes=["2x32"], rates=(4e-3,)))


def test_failures_are_isolated_and_kept_with_their_reason(make, trainer):
    sweep = make(rates=(4e-3, 0.5, 0.6, 0.7, 0.8), sizes=["rung-1M"])
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


def test_a_repaired_failure_is_forgotten(make, trainer, tmp_path):
    sweep = make(rates=(0.7,), sizes=["rung-1M"])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER.replace("rate == 0.7", "False"))
    run_sweep(sweep, Options(retry_failed=True), say=quiet, command=trainer)
    assert not list((Path(sweep.out) / "failures").iterdir())
    assert len(read_results(Path(sweep.out))) == 1


def test_cut_off_runs_go_on(make, trainer, monkeypatch):
    sweep = make(rates=(4e-3,))
    monkeypatch.setenv("FAKE", "slow")
    began = time.monotonic()
    tally = run_sweep(sweep, Options(parallel=2, max_minutes=1.5 / 60), say=quiet, command=trainer)
    assert time.monotonic() - began < 30
    assert sorted(tally.stopped) == sorted(starts(sweep))
    assert len(tally.stopped) == 2
    assert {snapshot(sweep).status(r) for r in snapshot(sweep).runs} == {"cut off"}
    tally = run_sweep(sweep, Options(parallel=2), say=quiet, command=trainer)
    assert len(tally.done) == 2
    assert all(len(s) == 2 for s in starts(sweep).values())


def test_a_signal_stops_the_runs_and_is_reported(make, trainer, monkeypatch):
    sweep = make(rates=(4e-3,), sizes=["rung-1M"])
    monkeypatch.setenv("FAKE", "slow")

    def interrupt():
        while not starts(sweep):
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    thread.join()
    assert tally.signal == signal.SIGTERM
    assert len(tally.stopped) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_small_runs_share_a_device_and_large_ones_do_not(make, trainer):
    sweep = make(rates=(4e-3,), pack_below=2e6)  # between rung-1M and rung-3M
    run_sweep(sweep, Options(parallel=3), say=quiet, command=trainer)
    found = {name.split("-t")[0]: s for name, s in starts(sweep).items()}
    assert found == {"matmulfree-rung-1M": ["0.300"], "matmulfree-rung-3M": ["all"]}
    shares = {r["size"]: r["parallel"] for r in read_results(Path(sweep.out))}
    assert shares == {"rung-1M": "3", "rung-3M": "1"}


def test_runs_are_spread_over_the_gpus_before_they_share_one(make, trainer, monkeypatch):
    monkeypatch.setenv("FAKE", "slow")
    sweep = make(rates=(1e-3, 2e-3, 4e-3), sizes=["rung-1M"])
    options = Options(parallel=2, gpus=("4", "6"), max_minutes=2 / 60)
    run_sweep(sweep, options, say=quiet, command=trainer)
    seen = [p.read_text() for p in Path(sweep.out).glob("runs/*/gpu")]
    assert sorted(seen) in (["4", "4", "6"], ["4", "6", "6"])


def test_one_run_of_a_shape_compiles_for_the_others(make, trainer, monkeypatch):
    monkeypatch.setenv("FAKE", "compiles")  # and never comes to train
    sweep = make(rates=(1e-3, 2e-3))
    options = Options(parallel=4, max_minutes=1 / 60, grace_seconds=5)
    tally = run_sweep(sweep, options, say=quiet, command=trainer)
    assert len({name.split("-t")[0] for name in starts(sweep)}) == len(starts(sweep)) == 2
    assert len(tally.done) + len(tally.stopped) == 2
    monkeypatch.delenv("FAKE")
    assert len(run_sweep(sweep, Options(parallel=4), say=quiet, command=trainer).done) >= 2
    assert len(read_results(Path(sweep.out))) == 4


def test_a_main_run_waits_only_for_the_tuning_runs_of_its_size(make, trainer, monkeypatch):
    tuning = {"tokens": 1e4, "sizes": ["rung-1M", "rung-3M"]}
    sizes = ["rung-1M", "rung-3M", "rung-7M"]
    sweep = make(tuning=tuning, sizes=sizes, tokens=[2e4])
    monkeypatch.setenv("FAKE", "broken at 192")
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.done) == 3 + 1  # rung-3M is not known, and rung-7M rests on it
    assert tally.waiting == 2
    monkeypatch.delenv("FAKE")
    tally = run_sweep(sweep, Options(retry_failed=True), say=quiet, command=trainer)
    assert len(tally.done) == 3 + 2
    assert tally.waiting == 0


def test_the_longest_of_each_shape_come_first_then_the_longest(make):
    sweep = make(rates=(4e-3,), tokens=[1e4, 1e5, 1e6], sizes=["rung-1M", "rung-7M"])
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


def test_two_sweeps_at_once_do_not_run_a_run_twice(make, trainer, monkeypatch):
    sweep = make(rates=(4e-3,), sizes=["rung-1M"])
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
    run_sweep(sweep, Options(max_minutes=2.5 / 60), say=quiet, command=trainer)
    thread.join()
    assert len(tallies[0].elsewhere) == 1
    assert [len(s) for s in starts(sweep).values()] == [1]


def test_a_sweep_that_is_killed_ends_its_runs_which_keep_their_locks(make, trainer, tmp_path):
    sweep = make(rates=(4e-3,), sizes=["rung-1M"])
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


def test_shards_share_the_work_and_the_tuned_rates(make, trainer):
    sweep = make(
        tuning={"tokens": 1e4, "sizes": ["rung-1M", "rung-3M"]},
        sizes=["rung-1M", "rung-3M", "rung-7M"],
        rates=(1e-3, 2e-3, 2.667e-3, 4e-3, 8e-3),
        tokens=[1e4, 2e4],
    )
    first = run_sweep(sweep, Options(shard=(0, 2)), say=quiet, command=trainer)
    assert len(first.done) == 5
    assert first.waiting == 3
    second = run_sweep(sweep, Options(shard=(1, 2)), say=quiet, command=trainer)
    assert second.waiting == 0
    third = run_sweep(sweep, Options(shard=(0, 2)), say=quiet, command=trainer)
    done = [*first.done, *second.done, *third.done]
    assert len(done) == len(set(done)) == 10 + 6 - 2  # 2 main runs were tuning runs
    rates = {size: c.rate for (_, size), c in snapshot(sweep).choices.items()}
    assert rates["rung-1M"] == 4e-3
    assert rates["rung-3M"] == 2.667e-3
    # A power law through the two others, by parameters.
    assert 1.5e-3 < rates["rung-7M"] < 2.667e-3
    assert snapshot(sweep).choices["matmulfree", "rung-7M"].is_transferred
    mains = [r for r in read_results(Path(sweep.out)) if r["size"] == "rung-7M"]
    assert {float(r["learning_rate"]) for r in mains} == {rates["rung-7M"]}


def test_a_diverged_rate_loses_but_a_broken_one_blocks(make, trainer):
    tuning = {"tokens": 1e4}
    sweep = make(tuning=tuning, rates=(2e-3, 4e-3, 0.5), sizes=["rung-1M"], tokens=[2e4])
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.failed) == 1
    assert [
        r["learning_rate"] for r in read_results(Path(sweep.out)) if r["tokens"] == "19968"
    ] == ["0.004"]
    blocked = make(out=sweep.out + "2", tuning=tuning, rates=(2e-3, 4e-3, 0.7), sizes=["rung-1M"])
    assert run_sweep(blocked, Options(), say=quiet, command=trainer).waiting == 1


def test_another_sweep_or_other_data_in_the_folder_are_refused(make, trainer, tmp_path):
    sweep = make(rates=(4e-3,), sizes=["rung-1M"])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    train = {"batch_size": 4, "data": sweep.train["data"], "z_loss": 0.1}
    with pytest.raises(SweepError, match="with other settings"):
        snapshot(make(rates=(4e-3,), sizes=["rung-1M"], train=train))
    other = tmp_path / "other"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    words = {s: [np.arange(200, dtype=np.uint8)] for s in ("train", "heldout")}
    writer.write_dataset(other, words, identity)
    train = {"batch_size": 4, "data": {"paths": [str(other)], "seq_len": 64}}
    with pytest.raises(SweepError, match="on other data"):
        snapshot(make(rates=(4e-3,), sizes=["rung-1M"], train=train))


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


def test_checkpoints_go_only_where_the_config_says(make, trainer):
    for keep in (True, False):
        sweep = make(rates=(4e-3,), sizes=["rung-1M"], keep_checkpoints=keep)
        sweep = dataclasses.replace(sweep, out=f"{sweep.out}-{keep}")
        run_sweep(sweep, Options(), say=quiet, command=trainer)
        (run_dir,) = (Path(sweep.out) / "runs").iterdir()
        assert (run_dir / "checkpoints").exists() == keep


def config_file(tmp_path, data, rates="[0.004]"):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"out: {tmp_path / 'cli'}\nfamilies: [{{base: matmulfree, learning_rates: {rates}}}]\n"
        f"sizes: [rung-1M]\ntokens: [1e4]\ntrain:\n  batch_size: 4\n"
        f"  data: {{paths: [{data}], seq_len: 64}}\n"
    )
    return path


def test_the_commands(tmp_path, data, trainer, monkeypatch, capsys):
    monkeypatch.setattr("mmfree_jax.experiments.sweep.runner.run_sweep.__kwdefaults__",
                        {**run_sweep.__kwdefaults__, "command": trainer})  # fmt: skip
    path = config_file(tmp_path, data, "[0.002, 0.004, 0.7]")
    script = tmp_path / "repaired.py"
    script.write_text(_TRAINER.replace("rate == 0.7", "False"))

    def repaired(config: Path) -> list[str]:
        return [sys.executable, str(script), str(config)]

    assert cli.plan([str(path), "--device", "H100"]) == 0
    text = capsys.readouterr().out
    assert "all: 3 runs," in text
    assert "data sheet" in text
    with pytest.raises(SweepError, match=r"run \S+lr0.7-s0 failed \(exit code 1: RuntimeError"):
        cli.run([str(path), "--device", "H100"])
    text = capsys.readouterr().out
    assert text.index("all: 3 runs") < text.index("[1/3]")  # cost first
    assert cli.status([str(path)]) == 0
    text = capsys.readouterr().out
    assert "2 done, 1 failed" in text
    assert "RuntimeError: a bug" in text
    assert cli.report([str(path)]) == 0
    text = capsys.readouterr().out
    assert "edge" in text
    best = list(csv.DictReader((tmp_path / "cli" / "best.csv").open()))
    assert [float(r["learning_rate"]) for r in best] == [0.004]
    drawn = list(csv.DictReader((tmp_path / "cli" / "report.plot.csv").open()))
    assert [r["series"] for r in drawn] == ["loss matmulfree", "rate matmulfree"]
    assert float(drawn[0]["value"]) == float(best[0]["loss"])
    (tmp_path / "cli" / "report.png").unlink()
    assert cli.report([str(path), "--no-plot"]) == 0
    assert not (tmp_path / "cli" / "report.png").exists()
    # What stands failed is said each time, and how it is tried again.
    with pytest.raises(SweepError, match=r"lr0.7-s0 failed .* a bug\).*--retry-failed tries again"):
        cli.run([str(path), "--device", "H100"])
    text = capsys.readouterr().out
    assert "left: 0 runs" in text
    assert "1 failed before and not tried again" in text
    monkeypatch.setattr("mmfree_jax.experiments.sweep.runner.run_sweep.__kwdefaults__",
                        {**run_sweep.__kwdefaults__, "command": repaired})  # fmt: skip
    assert cli.run([str(path), "--device", "H100", "--retry-failed"]) == 0
    assert "left: 1 runs" in capsys.readouterr().out
    assert cli.run([str(path), "--device", "H100"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_the_commands_refuse_bad_input(tmp_path, data, monkeypatch):
    path = config_file(tmp_path, data)
    with pytest.raises(SweepError, match="device 'abacus' has no known peak rate"):
        cli.plan([str(path), "--device", "abacus"])
    with pytest.raises(ConfigError, match="--parallel is 0"):
        cli.plan([str(path), "--device", "H100", "--parallel", "0"])
    with pytest.raises(ConfigError, match="--max-minutes is -1"):
        cli.run([str(path), "--device", "H100", "--max-minutes", "-1"])
    with pytest.raises(DataError, match="does not exist"):
        cli.run([str(path), "--device", "H100", "--data", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="which does not exist: run the sweep first"):
        cli.report([str(path)])
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match="sbatch --array"):
        cli.plan([str(path), "--device", "H100", "--shard", "slurm"])


def test_slurm_arrays_are_shards(tmp_path, data, monkeypatch, capsys):
    path = config_file(tmp_path, data, "[0.001, 0.002, 0.004, 0.008, 0.016]")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    cli.plan([str(path), "--device", "H100", "--shard", "slurm"])
    assert "shard 1/2: 2 runs" in capsys.readouterr().out


def test_the_shipped_configs_are_sound():
    from mmfree_jax.experiments.sweep.config import load_sweep
    from mmfree_jax.experiments.sweep.plan import main_runs, tuning_runs, without_repeats

    folder = Path(cli.__file__).parents[1] / "configs"
    for name, runs in (("tiny-sweep", 4), ("loss-curves", 2), ("ablation", 8), ("study", 88)):
        sweep = load_sweep(folder / f"{name}.yaml")
        found = without_repeats(sweep, [*tuning_runs(sweep), *main_runs(sweep)])
        assert len(found) == runs, name
    assert sum(r.flops for r in found) == pytest.approx(8.68e16, rel=0.01)


def test_a_wider_list_of_rates_goes_on_from_the_old_one(make, trainer):
    tuning = {"tokens": 1e4}
    narrow = make(tuning=tuning, rates=(1e-3, 2e-3), sizes=["rung-1M"], tokens=[2e4])
    assert len(run_sweep(narrow, Options(), say=quiet, command=trainer).done) == 3
    assert snapshot(narrow).choices["matmulfree", "rung-1M"].at_edge
    wide = make(tuning=tuning, rates=(1e-3, 2e-3, 4e-3, 8e-3), sizes=["rung-1M"], tokens=[2e4])
    assert len(run_sweep(wide, Options(), say=quiet, command=trainer).done) == 3
    choice = snapshot(wide).choices["matmulfree", "rung-1M"]
    assert (choice.rate, choice.at_edge) == (4e-3, False)
    assert [float(r["learning_rate"]) for r in best_rows(snapshot(wide))] == [4e-3]
    assert "5 done; " in status_text(snapshot(wide))


def test_rates_are_added_in_the_call_that_finds_the_best_at_an_end(make, trainer):
    sweep = make(tuning={"tokens": 1e4}, rates=(1e-3, 2e-3), sizes=["rung-1M"], tokens=[2e4],
                 widen_rates=3)  # fmt: skip
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert sorted(tally.done) == [
        "matmulfree-rung-1M-t19.97K-lr0.004-s0",
        *(f"matmulfree-rung-1M-t9.984K-lr0.00{digit}-s0" for digit in (1, 2, 4, 8)),
    ]
    assert not run_sweep(sweep, Options(), say=quiet, command=trainer).done


def test_paused_runs_go_on_in_the_same_call_and_the_others_stay(make, trainer):
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    sweep = make(tuning={"tokens": 1e4}, rates=rates, sizes=["rung-1M"], tokens=[2e4],
                 halving={"eta": 2, "fraction": 0.25})  # fmt: skip
    tally = run_sweep(sweep, Options(parallel=2), say=quiet, command=trainer)
    name = "matmulfree-rung-1M-t9.984K-lr{}-s0".format
    # Pauses after 10 and 20 of 39 steps; the main run is of the best of them.
    assert sorted(tally.done) == ["matmulfree-rung-1M-t19.97K-lr0.004-s0", name(0.004)]
    legs = {run: len(s) for run, s in starts(sweep).items() if run != tally.done[-1]}
    assert legs == {name(0.001): 1, name(0.002): 2, name(0.004): 3, name(0.008): 1}
    assert len(tally.paused) == 6
    # As after a kill between a pause and its record: it is only recorded.
    out = Path(sweep.out)
    (out / "pauses" / f"{name(0.008)}.json").unlink()
    assert run_sweep(sweep, Options(), say=quiet, command=trainer).paused == [name(0.008)]
    assert sum(map(len, starts(sweep).values())) == 1 + 2 + 3 + 1 + 1


def test_a_size_may_have_rates_of_its_own(make, trainer):
    own = {"base": "matmulfree", "learning_rates": [1e-3, 2e-3],
           "learning_rates_at": {"rung-3M": [2e-3, 2.667e-3, 4e-3]}}  # fmt: skip
    sweep = make(families=[own], tuning={"tokens": 1e4}, tokens=[2e4])
    assert len(run_sweep(sweep, Options(), say=quiet, command=trainer).done) == 2 + 3 + 2
    choices = snapshot(sweep).choices
    assert choices["matmulfree", "rung-1M"].rate == 2e-3
    assert choices["matmulfree", "rung-3M"].rate == 2.667e-3
    for wrong, message in (
        ({"rung-7M": [1e-3]}, r"choose among sizes \(rung-1M, rung-3M\)"),
        ({"rung-3M": 1e-3}, "rung-3M is 0.001: give a list of rates"),
        ({"rung-3M": [0.0]}, "use values above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(families=[own | {"learning_rates_at": wrong}])


def test_one_seed_does_not_choose_for_itself(make, trainer):
    sweep = make(rates=(2e-3, 4e-3), sizes=["rung-1M"], seeds=[0, 1])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    table = Path(sweep.out) / RESULTS
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:  # on the second seed the other rate is the better one
        if row["seed"] == "1":
            row["loss"] = "1.0" if float(row["learning_rate"]) == 2e-3 else "5.0"
    with table.open("w", newline="") as stream:
        writer_ = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer_.writeheader()
        writer_.writerows(rows)
    best = best_rows(snapshot(sweep))
    assert {(r["seed"], float(r["learning_rate"])) for r in best} == {("0", 4e-3), ("1", 4e-3)}


@pytest.mark.parametrize(
    "text", ["{", "[]", '"x"', '{"kind": "error"}', '{"kind": 1, "reason": ""}']
)
def test_a_damaged_record_of_a_failure_is_named(tmp_path, text):
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "run.json").write_text(text)
    with pytest.raises(SweepError, match=r"failures/run.json .*; delete it"):
        read_failures(tmp_path)
