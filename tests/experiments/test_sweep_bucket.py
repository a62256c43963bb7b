"""Sweeps whose folder lies in a bucket: one table for several machines, and what is cut off."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from bucket_files import do_not_wait, wait_for
from bucket_servers import Bucket
from faulty_proxy import Fault

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.data import writer
from mmfree_jax.errors import StorageError
from mmfree_jax.experiments.scaling.assumed import read_assumed
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.sweep.config import SweepConfig, load_sweep
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.folder import open_folder
from mmfree_jax.experiments.sweep.options import Options
from mmfree_jax.experiments.sweep.runner import run_sweep
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import COLUMNS, append_result
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.leases import take_lease
from mmfree_jax.storage import delete, list_below, list_names, parse_url, read_bytes, write_bytes

# Writes what a trainer does, under its lease; the first start of a run at the rate 0.5 waits.
_TRAINER = """
import json, os, signal, sys, yaml
from mmfree_jax.errors import MMFreeError
from mmfree_jax.leases import lease
from mmfree_jax.storage import find_object, parse_url, read_bytes, write_bytes
text = open(sys.argv[1]).read()
config = yaml.safe_load(text)
url, steps = parse_url(config["run_dir"]), config["steps"]
rate = config["optimizer"]["learning_rate"]
try:
    with lease(url / ".lease.json", f"run_dir {url}", "a trainer"):
        starts = read_bytes(url / "starts") if find_object(url / "starts") else b""
        write_bytes(url / "starts", starts + b"x")
        write_bytes(url / "config.yaml", text.encode())
        write_bytes(url / "metrics.jsonl", b'{"kind": "train", "step": 1}\\n')
        print("step 1/9  loss 4.0000", flush=True)
        if rate == 0.5 and not starts:
            signal.pause()
        for kept in [*config["checkpoint"]["at_steps"], steps]:
            write_bytes(url / "checkpoints" / str(kept) / "manifest.json", b"{}")
        source = config["branch_from"]
        if source:
            trunk, step = source.rsplit("@", 1)
            read_bytes(parse_url(trunk) / "checkpoints" / step / "manifest.json")
        summary = {"status": "complete", "step": steps, "tokens": steps * 256,
          "eval_loss": 3 + rate if config["eval"]["batches"] else None, "training_flops": 1e9,
          "origin": {"step": int(step), "tokens": int(step) * 256} if source else None,
          "parameters": {"total": 17000, "non_embedding": 16000, "ternary": 15000},
          "device": {"kind": "cpu", "count": 1}, "versions": {}}
        write_bytes(url / "summary.json", json.dumps(summary).encode())
except MMFreeError as e:
    print(f"mmfree: error: {e}")
    sys.exit(2)
"""
_SWEEP = """
import sys
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.options import Options
from mmfree_jax.experiments.sweep.runner import run_sweep
run_sweep(load_sweep(sys.argv[1]), Options(), command=lambda c: [sys.executable, sys.argv[2], c])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "bytes"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    tokens = [np.zeros(500, np.uint8)]
    writer.write_dataset(folder, {"train": tokens, "heldout": tokens}, identity)
    return folder


@pytest.fixture
def make(s3_bucket: Bucket, data, tmp_path, monkeypatch):
    """Makes a sweep in a bucket, with leases that run out soon."""
    monkeypatch.setenv("MMFREE_LEASE_SECONDS", "2")
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))

    def build(rates=(1e-3, 2e-3), **values) -> SweepConfig:
        base = {
            "out": f"{s3_bucket.url}/sweeps/a b",
            "families": [{"base": "matmulfree", "learning_rates": list(rates)}],
            "sizes": ["rung-1M"],
            "tokens": [1e4],
            "train": {"batch_size": 4, "data": {"paths": [str(data)], "seq_len": 64}},
        }
        return from_dict(SweepConfig, {**base, **values})

    return build


@pytest.fixture
def trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    return lambda config: [sys.executable, str(script), str(config)]


def _file(sweep: SweepConfig, tmp_path: Path) -> str:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(to_dict(sweep)))
    return str(path)


def _row(run: str, **values: str) -> dict[str, str]:
    return {column: {"run": run, **values}.get(column, "") for column in COLUMNS}


def _table(out: str) -> list[str]:
    """The names of the runs in a table."""
    lines = read_bytes(parse_url(out) / "results.csv").decode().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    return sorted(line.split(",")[0] for line in lines[1:])


def test_no_row_of_writers_at_the_same_time_is_lost(bucket: Bucket):
    out = parse_url(bucket.url) / "out"
    threads = [threading.Thread(target=append_result, args=(out, _row(f"r{i}"))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _table(str(out)) == ["r0", "r1", "r2", "r3", "r4", "r5"]
    append_result(out, _row("r3", loss="9"))
    assert len(_table(str(out))) == 6
    with pytest.raises(SweepError, match=r"out/results\.csv holds run r3 with another config"):
        append_result(out, _row("r3", config_hash="b"))
    write_bytes(out / "results.csv", b"run,loss\n")
    with pytest.raises(SweepError, match=r"out/results\.csv has other columns"):
        append_result(out, _row("r9"))


def test_a_sweep_is_run_reported_and_fitted_in_a_bucket(make, trainer, tmp_path, capsys):
    sweep = make()
    out = parse_url(sweep.out)
    lines: list[str] = []
    tally = run_sweep(sweep, Options(), say=lines.append, command=trainer)
    assert len(tally.done) == 2, lines
    assert _table(sweep.out) == sorted(tally.done)
    assert list_names(out) == ["configs", "logs", "results.csv", "runs"]
    name = tally.done[0]
    assert f"run_dir: {out}/runs/{name}\n" in read_bytes(out / f"configs/{name}.yaml").decode()
    assert b"step 1/9  loss 4.0000" in read_bytes(out / f"logs/{name}.log")
    again = run_sweep(sweep, Options(), say=lines.append, command=trainer)
    assert (again.done, again.failed) == ([], {})
    assert read_bytes(out / "runs" / name / "starts") == b"x"
    file = _file(sweep, tmp_path)
    assert main(["sweep", "status", file]) == 0
    assert "2 done; " in capsys.readouterr().out
    assert main(["sweep", "report", file]) == 0
    assert f"{out}/best.csv" in capsys.readouterr().out
    assert main(["sweep", "report", file]) == 0  # in the place of the first
    frame = read_runs([f"{out}/results.csv", f"{out}/best.csv"])
    assert sorted(frame.loss) == [3.001, 3.001, 3.002]
    assert not list(Path().glob("s3:*"))


def test_a_sweep_that_was_killed_goes_on(make, trainer, tmp_path):
    sweep = make(rates=(0.25, 0.5))
    out = parse_url(sweep.out)
    file = _file(sweep, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", _SWEEP, file, trainer("")[1]], env=os.environ | {"HOME": "/"}
    )
    (waiting,) = (f"runs/{run.name}" for run in snapshot_runs(sweep) if run.learning_rate == 0.5)

    def has_begun() -> bool:
        assert process.poll() is None
        return "metrics.jsonl" in list_names(out / waiting)

    wait_for(has_begun)
    with open_folder(sweep, trusting=True) as folder:
        found = snapshot(folder.sweep)
        assert {found.status(run) for run in found.runs} == {"done", "running"}
    process.send_signal(signal.SIGKILL)
    process.wait()
    tally = run_sweep(sweep, Options(), say=lambda _: None, command=trainer)
    assert len(tally.done) == 1
    assert read_bytes(out / waiting / "starts") == b"xx"
    assert len(_table(sweep.out)) == 2
    assert read_bytes(out / "logs" / f"{waiting.removeprefix('runs/')}.log").count(b"=== ") >= 1


def snapshot_runs(sweep: SweepConfig):
    """The runs of a sweep's plan."""
    with open_folder(sweep) as folder:
        return snapshot(folder.sweep).runs


def test_a_run_that_another_machine_is_at_is_left_to_it(make, trainer):
    sweep = make()
    out = parse_url(sweep.out)
    theirs, ours = snapshot_runs(sweep)
    held = take_lease(out / "runs" / theirs.name / ".lease.json", "run_dir x", "there")
    held.start()
    try:
        tally = run_sweep(sweep, Options(), say=lambda _: None, command=trainer)
    finally:
        held.release()
    assert (tally.done, tally.elsewhere, tally.failed) == ([ours.name], [theirs.name], {})
    assert _table(sweep.out) == [ours.name]
    assert "failures" not in list_names(out)


def test_a_holder_counts_while_it_is_seen_to_live(make):
    sweep, now = make(), [0.0]
    lease = parse_url(sweep.out) / "runs" / snapshot_runs(sweep)[0].name / ".lease.json"

    def write(beat: int, owner: str = "there") -> None:
        write_bytes(lease, b'{"owner": "%s", "seconds": 60, "beat": %d}' % (owner.encode(), beat))

    write(0)
    with open_folder(sweep, clock=lambda: now[0]) as folder:

        def status() -> str:
            folder.refresh()
            found = snapshot(folder.sweep)
            return found.status(found.runs[0])

        assert status() == "pending"  # who wrote it may be dead: the trainer finds out
        write(1)
        assert status() == "running"
        now[0] += 59
        assert status() == "running"
        now[0] += 2
        assert status() == "pending"
        write(2)
        assert status() == "running"
        write(3, owner="")
        assert status() == "pending"
        write(4)
        assert status() == "running"
        write_bytes(lease, b"torn")  # somebody wrote it: whoever it is has 60 s
        assert status() == "running"
        now[0] += 61
        assert status() == "pending"
        delete(lease)
    with open_folder(sweep, trusting=True) as folder:
        assert {snapshot(folder.sweep).status(r) for r in snapshot(folder.sweep).runs} == {
            "pending"
        }


def test_a_bucket_that_fails_ends_the_sweep_in_one_line(make, trainer, s3_bucket, monkeypatch):
    do_not_wait(monkeypatch)
    sweep = make(rates=(1e-3,))
    s3_bucket.proxy.add(Fault(match="PUT .*results.csv", status=403))
    with pytest.raises(StorageError, match=r"results\.csv cannot be written: permission denied"):
        run_sweep(sweep, Options(), say=lambda _: None, command=trainer)
    s3_bucket.proxy.clear()
    assert len(run_sweep(sweep, Options(), say=lambda _: None, command=trainer).done) == 1
    assert len(_table(sweep.out)) == 1


def test_budgets_branch_from_trunks_in_the_bucket(make, trainer):
    sweep = make(
        rates=(4e-3,), sizes=["2x64"], tokens=[2560, 5120], schedule="wsd-branched",
        warmup_fraction=0.2, keep_checkpoints=False,
    )  # fmt: skip
    out, trunk = parse_url(sweep.out), "matmulfree-2x64-trunk-lr0.004-s0"
    short, long = ("matmulfree-2x64-t2.56K-lr0.004-s0", "matmulfree-2x64-t5.12K-lr0.004-s0")
    lines: list[str] = []
    tally = run_sweep(sweep, Options(), say=lines.append, command=trainer)
    assert (tally.failed, sorted(tally.done)) == ({}, sorted([short, long, trunk])), lines
    assert _table(sweep.out) == [short, long]
    # 10 and 20 steps, of which 8 and 16 at full rate.
    for name, step in ((short, 8), (long, 16)):
        config = read_bytes(out / f"configs/{name}.yaml").decode()
        assert f"\nbranch_from: {out}/trunks/{trunk}@{step}\n" in config
    left = [o.url.key for o in list_below(out) if o.url.name == "manifest.json"]
    assert left == []
    again = run_sweep(sweep, Options(), say=lines.append, command=trainer)
    assert (again.done, again.failed) == ([], {})


def test_a_run_does_not_take_another_whose_name_begins_so_along(make, trainer):
    sweep = make()
    url = parse_url(sweep.out)
    for name in ("a-s1", "a-s10"):
        write_bytes(url / f"runs/{name}/summary.json", b"{}")
    with open_folder(sweep) as folder:
        folder.refresh("runs/a-s1")
        assert (folder.path / "runs/a-s10/summary.json").is_file()


def test_what_is_wrong_in_the_bucket_is_named_as_it_lies_there(make, s3_bucket, tmp_path):
    sweep = make()
    write_bytes(parse_url(sweep.out) / "failures" / "x.json", b"{")
    with pytest.raises(SweepError, match=rf"^{sweep.out}/failures/x\.json cannot be read"):
        snapshot_runs(sweep)
    with pytest.raises(StorageError, match="there is no bucket 'none-such'"):
        snapshot_runs(make(out="s3://none-such/x"))


def test_an_array_is_rendered_without_looking_into_the_bucket(make, s3_bucket, tmp_path):
    file = _file(make(), tmp_path)
    s3_bucket.proxy.clear()
    job = tmp_path / "job.sbatch"
    words = ["slurm", "--name", "s", "--tasks", "2", "--out", str(job)]
    assert render_job([*words, "--", "sweep", "run", file]) == 0
    assert "mmfree sweep run" in job.read_text()
    assert load_sweep(file).out == make().out
    assert s3_bucket.proxy.requests() == []


def test_the_laws_of_a_design_come_from_fits_in_a_bucket(make, s3_bucket):
    url = f"{s3_bucket.url}/fits/a.json"
    parameters = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
    fit = {"law": "chinchilla", "parameters": parameters, "interval_level": 0.95,
           "conventions": {"params": "total", "flops": "exact"}}  # fmt: skip
    write_bytes(parse_url(url), json.dumps(fit).encode())
    for text in (url, f"matmulfree:{url}"):
        laws, counted = read_assumed([text], ["matmulfree"], shares_floor=False)
        assert (laws.parameters.tolist(), counted) == ([[*parameters.values()]], "total")
