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
from pathlib import Path

import pytest
import quick_compilation

from mmfree_jax.config_io import dump_yaml
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
STEPS = 120

# `mmfree train` that sends itself a signal some moments behind a step that it is told, or while a
# save is under way: from outside, on a busy machine, the run would often be over before.
_INTERRUPTED = """
import os, pathlib, sys, threading, time
number, step, moment = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
checkpoints = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]) / "checkpoints"
from mmfree_jax.cli.main import main
from mmfree_jax.saved.manifest import MANIFEST, checkpoint_steps
from mmfree_jax.train import training

def half_written():
    folders = [p for p in checkpoints.iterdir() if p.name.split(".")[0].isdecimal()]
    return any(not (p / MANIFEST).exists() for p in folders)

def interrupt():
    if moment == "save":
        while not half_written():
            time.sleep(0.0005)
    else:
        time.sleep(float(moment))
    os.kill(os.getpid(), number)

def on_step(done):
    # Steps may be quicker than the first save, which goes on beside them.
    if done >= step and not threads and checkpoint_steps(checkpoints):
        threads.append(threading.Thread(target=interrupt, daemon=True))
        threads[0].start()

threads, train = [], training.train
training.train = lambda config, **options: train(config, on_step=on_step, **options)
sys.exit(main(sys.argv[1:]))
"""


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
        f"--config {config} --mesh.fsdp 1 --checkpoint.every-steps 5 "
        "--eval.every-steps 50 --log.ternary-every-steps 0 --eval.batches 1"
    ).split()
    processes = []

    def run(run_dir, terminal=None, interrupted=(), steps=STEPS):
        program = ["-c", _INTERRUPTED, *interrupted] if interrupted else ["-m", "mmfree_jax"]
        command = [sys.executable, *program, "train", *flags, "--run-dir", str(run_dir)]
        command += ["--steps", str(steps)]
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


def _last_step(run_dir):
    # A reader may meet a line that is still being written: it is left out.
    return max((r["step"] for r in read_history(run_dir / "metrics.jsonl")), default=0)


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
    for number, kind in ((signal.SIGKILL, ""), (signal.SIGKILL, "save"), (signal.SIGTERM, "")):
        step = _last_step(run_dir) + rng.randrange(5, 25)
        moment = kind or str(rng.uniform(0, 0.02))
        process = start(run_dir, interrupted=[str(int(number)), str(step), moment])
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
    process = start(run_dir, terminal=near, steps=10**6)  # which it never gets to
    os.close(near)
    while _last_step(run_dir) < 10:
        assert process.poll() is None
        if select.select([far], [], [], 0.05)[0]:
            os.read(far, 65536)
    os.close(far)
    assert process.wait(timeout=120) == 129
    assert checkpoint_steps(run_dir / "checkpoints")[-1] == _last_step(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "SIGHUP"
