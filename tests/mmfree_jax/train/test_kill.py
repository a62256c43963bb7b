"""Real processes, killed at random moments and restarted, against one left alone."""

import fcntl
import json
import os
import random
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import quick_compilation

from mmfree_jax.config_io import dump_yaml
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import MANIFEST, checkpoint_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STEPS = 120


@pytest.fixture(scope="module")
def start(small_run, tmp_path_factory):
    """Starts `mmfree train` in a process of its own; programs are compiled once."""
    folder = tmp_path_factory.mktemp("kill")
    config = folder / "config.yaml"
    config.write_text(dump_yaml(small_run))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": quick_compilation.FLAGS,
        **quick_compilation.cached_in(str(folder / "compiled")),
    }
    flags = (
        f"--config {config} --steps {STEPS} --mesh.fsdp 1 --checkpoint.every-steps 5 "
        "--eval.every-steps 50 --log.ternary-every-steps 0 --eval.batches 1"
    ).split()
    processes = []

    def run(run_dir, terminal=None):
        command = [sys.executable, "-m", "mmfree_jax", "train", *flags, "--run-dir", str(run_dir)]
        log = (folder / "log.txt").open("a")
        out = log if terminal is None else terminal
        process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=terminal, stdout=out, stderr=out,
            start_new_session=terminal is not None,
            preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        log.close()
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()
    print((folder / "log.txt").read_text()[-3000:])


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert start(run_dir).wait(timeout=300) == 0
    return run_dir


def _wait(process, condition):
    """Polls until the condition holds or the process ends."""
    while process.poll() is None:
        if condition():
            return
        time.sleep(0.0005)


def _last_step(run_dir):
    # A reader may meet a line that is still being written: it is left out.
    return max((r["step"] for r in read_history(run_dir / "metrics.jsonl")), default=0)


def _half_written(folder):
    """Whether a save is under way."""
    if not folder.is_dir():
        return False
    return any(
        p.name.split(".")[0].isdecimal() and not (p / MANIFEST).exists() for p in folder.iterdir()
    )


def _losses(run_dir):
    return [
        (r["kind"], r["step"], r["loss"], r.get("grad_norm"), r.get("learning_rate"))
        for r in read_history(run_dir / "metrics.jsonl")
        if r["kind"] in ("train", "eval")
    ]


def test_killed_runs_continue_bit_for_bit(start, undisturbed, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    interrupted = []
    for number, kind in ((signal.SIGKILL, "step"), (signal.SIGKILL, "save"), (signal.SIGTERM, "")):
        process = start(run_dir)
        since = _last_step(run_dir)
        target = since + rng.randrange(5, 25)
        # Steps may be quicker than the first save, which goes on beside them.
        _wait(
            process,
            lambda target=target: _last_step(run_dir) >= target and checkpoint_steps(checkpoints),
        )
        if kind == "save":
            _wait(process, lambda: _half_written(checkpoints))
        else:
            time.sleep(rng.uniform(0, 0.02))
        process.send_signal(number)
        code = process.wait(timeout=120)
        assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL)
        interrupted.append(_last_step(run_dir))
        assert checkpoint_steps(checkpoints)
        if number == signal.SIGTERM:
            assert checkpoint_steps(checkpoints)[-1] == interrupted[-1]
    assert interrupted == sorted(interrupted)
    assert interrupted[-1] < STEPS, "the run was over before it was interrupted"
    assert start(run_dir).wait(timeout=300) == 0
    assert _losses(run_dir) == _losses(undisturbed)
    assert [r[1] for r in _losses(run_dir) if r[0] == "train"] == list(range(1, STEPS + 1))


def test_a_run_whose_terminal_is_closed_saves_and_leaves(start, tmp_path):
    run_dir = tmp_path / "run"
    far, near = os.openpty()
    process = start(run_dir, terminal=near)
    os.close(near)
    while _last_step(run_dir) < 10:
        assert process.poll() is None
        if select.select([far], [], [], 0.05)[0]:
            os.read(far, 65536)
    os.close(far)
    assert process.wait(timeout=120) == 129
    assert checkpoint_steps(run_dir / "checkpoints")[-1] == _last_step(run_dir) < STEPS
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGHUP"
