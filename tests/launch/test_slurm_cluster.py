"""Rendered jobs on a real SLURM cluster of one node: limits, kills, cancelling, arrays."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from pretended_sweep import pretended_sweep
from slurm_cluster import Cluster, UnavailableError, cluster

from mmfree_jax.config_io import dump_yaml
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.table import read_results
from mmfree_jax.launch.jobs.slurm import Slurm
from mmfree_jax.launch.jobs.slurm_array import SlurmArray, render_array
from mmfree_jax.launch.render import render
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps, verify

pytestmark = pytest.mark.slow
REQUEUED = "job: exit code {} after "


@pytest.fixture(scope="module")
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # short: a socket's path is
    try:
        with contextlib.ExitStack() as stack:
            try:
                running = stack.enter_context(cluster(folder))
            except UnavailableError as e:
                pytest.skip(f"no SLURM cluster: {e}")
            yield running
    finally:
        shutil.rmtree(folder)


def written(folder: Path, name: str, text: str) -> Path:
    """An executable file."""
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def programs(folder: Path, mmfree: str) -> str:
    """A setup line that puts a program `mmfree` first on PATH."""
    (folder / "bin").mkdir()
    written(folder / "bin", "mmfree", mmfree)
    return f"export PATH='{folder}/bin':$PATH"


def log(slurm: Cluster, number: str) -> str:
    return Path(slurm.job(number)["StdOut"]).read_text()


def last_step(run_dir: Path) -> int:
    return max((r["step"] for r in read_history(run_dir / "metrics.jsonl")), default=0)


def process(run_dir: Path, rank: int) -> int:
    """The process id of the trainer that is this rank of the step."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words, env = ((folder / n).read_bytes().split(b"\0") for n in ("cmdline", "environ"))
            is_trainer = words[1:4] == [b"-m", b"mmfree_jax", b"train"] and bytes(run_dir) in words
            if is_trainer and f"SLURM_PROCID={rank}".encode() in env:
                return int(folder.name)
    raise AssertionError(f"no process {rank}")


def test_two_processes_train_through_kills_and_the_limit_until_it_is_cancelled(
    slurm, pod_config, pod_environment, tmp_path
):
    run_dir = tmp_path / "a run"
    (tmp_path / "config.yaml").write_text(dump_yaml(pod_config))
    train = ["--config", "config.yaml", "--run-dir", str(run_dir), "--steps", "1000000",
             "--checkpoint.every-steps", "50", "--eval.every-steps", "0",
             "--processes.beat-seconds", "0.5", "--processes.silent-seconds", "8"]  # fmt: skip
    setup = programs(tmp_path, f'#!/bin/sh\nexec {sys.executable} -m mmfree_jax "$@"\n')
    values = Slurm(name="two", nodes=1, gpus_per_node=2, time="10:00", setup=setup, failures=9)
    script = written(tmp_path, "job.sbatch", render(values, train))
    number = slurm.submit(script, **pod_environment)

    def trains_beyond(step: int) -> None:
        slurm.wait(number, lambda job: last_step(run_dir) > step)

    # The limit is near: both save the same step and leave. (SLURM looks every 30 s.)
    trains_beyond(60)
    slurm.command("scontrol", "update", f"JobId={number}", "TimeLimit=2")
    slurm.wait(number, lambda job: job["JobState"] == "PENDING")
    assert REQUEUED.format(143) in log(slurm, number)
    step = last_step(run_dir)
    assert checkpoint_steps(run_dir / "checkpoints")[-1] == step
    assert verify(run_dir / "checkpoints" / str(step)).step == step
    slurm.command("scontrol", "update", f"JobId={number}", "TimeLimit=10")

    # Out of memory: the kernel kills one.
    trains_beyond(step + 60)
    os.kill(process(run_dir, 1), signal.SIGKILL)
    slurm.wait(number, lambda job: REQUEUED.format(137) in log(slurm, number))
    step = last_step(run_dir)

    # The coordinator is killed: JAX's client aborts the other.
    trains_beyond(step + 20)
    os.kill(process(run_dir, 0), signal.SIGKILL)
    slurm.wait(number, lambda job: job["JobState"] == "PENDING")
    assert slurm.job(number)["Restarts"] == "3"
    slurm.command("scancel", number)
    assert slurm.ended(number)["JobState"] == "CANCELLED"
    steps = [r["step"] for r in read_history(run_dir / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, steps[-1] + 1)), "every step once"
    assert log(slurm, number).count("resumed from checkpoint") == 2


_FAILS = """#!/bin/sh
echo started >> starts-$SLURM_JOB_ID
case $2-$SLURM_PROCID in
wrong-0) exit 2 ;;       # and the other is ended in the midst of its work
dies-0) kill -9 $$ ;;
absent-0) exit 127 ;;
esac
exec sleep 600
"""


def test_what_a_restart_does_not_mend_fails_and_what_dies_at_once_does_so_twice(slurm, tmp_path):
    setup = programs(tmp_path, _FAILS)
    values = Slurm(name="fails", nodes=1, gpus_per_node=2, setup=setup, failures=2)
    numbers = [
        slurm.submit(written(tmp_path, f"{how}.sbatch", render(values, [how])))
        for how in ("dies", "wrong", "absent")
    ]
    jobs = [slurm.ended(number) for number in numbers]
    found = [(job["JobState"], job["ExitCode"], job["Restarts"]) for job in jobs]
    assert found == [("FAILED", "137:0", "1"), ("FAILED", "2:0", "0"), ("FAILED", "127:0", "0")]
    starts = [len((tmp_path / f"starts-{n}").read_text().splitlines()) for n in numbers]
    assert starts == [4, 2, 2]
    assert "failed 2 times in a row, each soon after its start" in log(slurm, numbers[0])


def test_an_array_runs_a_sweep_stage_after_stage(slurm, tmp_path):
    script = _array(tmp_path)
    shown = slurm.command("bash", script.name, cwd=tmp_path)
    numbers = [line.rpartition(" ")[2] for line in shown.splitlines()]
    assert [line.split()[1] for line in shown.splitlines()] == ["tuning:", "main:"]
    for number in numbers:
        for task in ("0", "1"):
            job = slurm.ended(f"{number}_{task}")
            assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "0"), log(slurm, number)
    rows = read_results(tmp_path / "out")
    assert len(rows) == 4  # three rates at the first budget, the best of them at the second
    starts = {path.parent.name: path.read_text() for path in tmp_path.glob("out/runs/*/starts")}
    assert len(starts) == 4
    assert set("".join(starts.values()).split()) == {"0", "1"}, "either task had its part"


def test_a_task_that_is_told_to_stop_goes_on_later_and_one_that_is_cancelled_does_not(
    slurm, tmp_path
):
    script = _array(tmp_path)
    number = slurm.submit(script, "--array=0", STAGE="tuning", SLOW="1")

    def starts() -> int:
        return sum(len(p.read_text().split()) for p in tmp_path.glob("out/runs/*/starts"))

    slurm.wait(number, lambda job: starts() == 1)
    slurm.command("scancel", "--batch", "--signal=TERM", number)  # as the limit does
    slurm.wait(number, lambda job: starts() == 2)
    assert slurm.job(number)["Restarts"] == "1"
    assert "1 cut off" in log(slurm, number)
    # Here both SLURM and the job file tell the sweep, which saves and ends as before.
    slurm.command("scancel", number)
    job = slurm.ended(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1")
    slurm.wait(number, lambda job: log(slurm, number).count("1 cut off") == 2)
    assert log(slurm, number).count("requeued") == 1


def _array(folder: Path) -> Path:
    """A job file for an array of two tasks whose runs are pretended ones."""
    values = SlurmArray(name="s", tasks=2, setup=f"export PATH='{pretended_sweep(folder)}':$PATH",
                        time="10:00", cpus_per_gpu=1)  # fmt: skip
    with contextlib.chdir(folder):
        sweep = load_sweep("sweep.yaml")
    text = render_array(values, ["sweep", "run", "sweep.yaml", "--device", "H100"], sweep)
    return written(folder, "job.sbatch", text)
