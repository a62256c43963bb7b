"""Real processes with collectives over Gloo: same losses, and what happens when one fails."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.files import lock
from mmfree_jax.launch.local import Plan, environment, mmfree_command
from mmfree_jax.parallel.processes import EXIT_LOST
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps, verify
from mmfree_jax.train.training import train

# Float32 sums in another order, over 72 steps. A batch with its rows in another order, or one
# update lost or made twice, moves a loss by over 1e-3.
TOLERANCE = 2e-5
STEPS = 72


def last_step(run_dir: Path) -> int:
    """The last step on record."""
    return max((r["step"] for r in read_history(run_dir / "metrics.jsonl")), default=0)


def losses(run_dir: Path) -> dict[tuple[str, int], float]:
    """Loss by kind of record and step."""
    return {
        (r["kind"], r["step"]): r["loss"]
        for r in read_history(run_dir / "metrics.jsonl")
        if "loss" in r
    }


@pytest.fixture(scope="module")
def alone(pod_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process, of eight devices on a mesh of another shape."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    log = dataclasses.replace(pod_config.log, progress="none")
    mesh = MeshConfig(data=4, fsdp=2)
    train(dataclasses.replace(pod_config, run_dir=str(run_dir), mesh=mesh, log=log))
    return run_dir


def _assert_same_losses(run_dir: Path, alone: Path, steps: int = STEPS) -> None:
    actual, expected = losses(run_dir), losses(alone)
    expected = {key: loss for key, loss in expected.items() if key[1] <= steps}
    assert actual.keys() == expected.keys()
    assert [key for key in actual if key[0] == "train"] == [
        ("train", step) for step in range(1, steps + 1)
    ]
    for key, loss in expected.items():
        np.testing.assert_allclose(actual[key], loss, rtol=TOLERANCE, err_msg=str(key))


@pytest.mark.slow
def test_two_processes_survive_a_kill_a_signal_and_a_stop(launch, alone, tmp_path):
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"

    # One is killed: the other names it and ends; the launcher says which and how.
    first = launch(2, run_dir, "--mesh.fsdp", "2")
    # A save goes on beside the steps, and may end long behind the step that it is of.
    first.until(lambda: last_step(run_dir) >= 12 and bool(checkpoint_steps(checkpoints)))
    pid = first.processes[1].pid
    first.processes[1].kill()
    assert first.wait() == 128 + signal.SIGKILL
    assert f"[launch] process 1 (pid {pid}) was killed by SIGKILL" in first.text
    assert (
        f"[0] mmfree: error: process 1 (pid {pid} on {os.uname().nodename}) is gone" in first.text
    )
    assert f"process 0 (pid {first.processes[0].pid}) ended with {EXIT_LOST}" in first.text

    # A signal to one alone: both save the same step and leave. On another mesh.
    second = launch(2, run_dir, "--mesh.sequence", "2")
    second.until(lambda: "resumed from checkpoint" in second.text)
    resumed = checkpoint_steps(checkpoints)[-1]
    second.until(lambda: last_step(run_dir) >= resumed + 8)
    second.processes[1].send_signal(signal.SIGTERM)
    assert second.wait() == 128 + signal.SIGTERM
    assert [p.returncode for p in second.processes] == [143, 143]
    step = last_step(run_dir)
    assert checkpoint_steps(checkpoints)[-1] == step
    assert verify(checkpoints / str(step)).step == step

    # One stands still: the other gives up with an exit code of its own, and names it.
    third = launch(2, run_dir, grace=1.0, silent_seconds=8)
    third.until(lambda: last_step(run_dir) >= step + 3)
    os.kill(third.processes[1].pid, signal.SIGSTOP)
    assert third.wait() == EXIT_LOST
    assert f"error: process 1 (pid {third.processes[1].pid} on" in third.text
    assert "is gone or stopped: no sign of life for" in third.text
    assert "[launch] killing process 1, still there" in third.text

    # And to the end: as if nothing had happened. Now both processes share each matrix.
    last = launch(2, run_dir, "--mesh.tensor", "2")
    assert last.wait() == 0
    assert "[0] complete at step" in last.text
    _assert_same_losses(run_dir, alone)


@pytest.mark.slow
def test_three_processes_go_on_as_two_and_as_three_again(pod_environment, alone, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log.txt"
    argv = ["launch", "local", "-n", "3", "--elastic", "--grace-seconds", "60", "--", "train"]
    argv += ["--config", str(alone / "config.yaml"), "--run-dir", str(run_dir)]
    argv += ["--mesh.data", "3", "--mesh.fsdp", "1", "--log.progress", "plain"]
    argv += ["--processes.beat-seconds", "0.5", "--processes.silent-seconds", "120"]
    with log.open("w") as out:
        launcher = subprocess.Popen(
            mmfree_command(argv), env=pod_environment, stdout=out, stderr=subprocess.STDOUT
        )

    def until(condition: Callable[[str], object]) -> str:
        while not condition(text := log.read_text()):
            assert launcher.poll() is None, text
            time.sleep(0.01)
        return text

    try:
        checkpoints = run_dir / "checkpoints"
        until(lambda text: last_step(run_dir) >= 12 and checkpoint_steps(checkpoints))
        started = re.search(r"started 3 of 3 processes \(pids ([\d, ]+)\)", log.read_text())
        os.kill(int(started.group(1).split(", ")[1]), signal.SIGKILL)
        resumed = re.compile(r"(\d+)/72  resumed from checkpoint")
        text = until(resumed.search)
        until(lambda text: last_step(run_dir) >= int(resumed.search(text).group(1)) + 8)
        launcher.send_signal(signal.SIGUSR2)
        assert launcher.wait(timeout=240) == 0, log.read_text()
    finally:
        launcher.kill()
        launcher.wait()
    assert re.findall(r"started (\d) of 3", log.read_text()) == ["3", "2", "3"]
    assert "fewer processes than planned (2): 24 rows in 2 micro-batches of 12 on 2 x 1" in text
    _assert_same_losses(run_dir, alone)
    goodput = json.loads((run_dir / "summary.json").read_text())["goodput"]
    assert goodput["attempts"] == 3
    assert goodput["lost_s"] > 0


@pytest.mark.slow
def test_without_process_0_the_others_end_at_once(launch, tmp_path):
    run_dir = tmp_path / "run"
    one = launch(2, run_dir)
    one.until(lambda: last_step(run_dir) >= 3)
    one.processes[0].kill()
    assert one.wait() == 128 + signal.SIGKILL
    assert "was killed by SIGKILL; 1 more to end within" in one.text
    # JAX's client does not outlive its coordinator, and says so; nobody had to kill it.
    assert one.processes[1].returncode not in (0, -signal.SIGKILL)
    assert "killing process" not in one.text


def test_a_run_directory_in_use_is_refused_on_all(launch, tmp_path):
    run_dir = tmp_path / "run"
    with lock(run_dir / ".lock", "it"):
        second = launch(2, run_dir)
        assert second.wait() == 2
    assert second.text.count(f"run_dir {run_dir} is in use by another job") == 1, second.text
    assert not (run_dir / "checkpoints").exists()


def test_processes_started_differently_are_told_which_and_how(
    pod_config, pod_environment, tmp_path
):
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(pod_config))
    processes = []
    for i in range(3):
        argv = ["train", "--config", str(config), "--run-dir", str(tmp_path / "run")]
        argv += ["--optimizer.b2", "0.5"] if i == 1 else []
        plan = Plan(mmfree_command(argv), 3)
        env = environment(plan, i, 18231, pod_environment)
        processes.append(subprocess.Popen(plan.command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2]
    expected = f"process 1 (pid {processes[1].pid} on {os.uname().nodename}) has "
    expected += "config.optimizer.b2 0.5, process 0 0.95: start all with the same"
    assert expected in errors[0]
    assert not any("error" in text for text in errors[1:]), "said once, by process 0"


def test_data_missing_on_one_host_ends_all_and_names_it(pod_config, pod_environment, tmp_path):
    # Both ask for ./data, and only the first one's folder has it.
    processes = []
    config = dataclasses.replace(
        pod_config, data=dataclasses.replace(pod_config.data, paths=("data",))
    )
    for i in range(2):
        host = tmp_path / f"host{i}"
        host.mkdir()
        (host / "config.yaml").write_text(dump_yaml(config))
        plan = Plan(mmfree_command(["train", "--config", "config.yaml"]), 2)
        env = environment(plan, i, 18233, pod_environment)
        processes.append(
            subprocess.Popen(plan.command, env=env, cwd=host, stderr=subprocess.PIPE, text=True)
        )
    (tmp_path / "host0" / "data").symlink_to(pod_config.data.paths[0])
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert f"process 1 (pid {processes[1].pid} on " in errors[0]
    assert "): data folder data does not exist" in errors[0]


def test_a_process_that_never_comes_is_not_waited_for_long(pod_config, pod_environment, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(pod_config))
    argv = ["train", "--config", str(config), "--processes.join-seconds", "4"]
    plan = Plan(mmfree_command(argv), 2)
    env = environment(plan, 0, 18232, pod_environment)
    done = subprocess.run(plan.command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == EXIT_LOST
    line = [text for text in done.stderr.splitlines() if text.startswith("mmfree: error")]
    assert len(line) == 1
    assert "the 2 processes did not all meet at 127.0.0.1:18232 within 4 s" in line[0]
