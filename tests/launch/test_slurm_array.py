"""A sweep's job array: its tasks in real processes, each with its own part of the runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pretended_sweep import pretended_sweep

from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.table import read_results
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.launch.jobs.slurm_array import SlurmArray, render_array


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A rendered array of two tasks, and the environment of a cluster that has stubs of SLURM."""
    programs = pretended_sweep(tmp_path)
    for name, says in (("sbatch", "17"), ("scontrol", "JobState=RUNNING"), ("srun", "")):
        stub = f'#!/bin/sh\necho "{name} $*" >> calls\necho {says}\n'
        (programs / name).write_text(stub)
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    words = ["slurm", "--name", "s", "--tasks", "2", "--out", "job.sbatch"]
    assert render_job([*words, "--", "sweep", "run", "sweep.yaml", "--device", "H100"]) == 0
    root = str(Path(__file__).parents[2])
    return os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": root,
                         "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_ID": "18",
                         "SLURM_JOB_NAME": "s"}  # fmt: skip


def task(env, number, **more):
    env = env | {"SLURM_ARRAY_TASK_ID": str(number)} | more
    return subprocess.Popen(["bash", "job.sbatch"], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_two_tasks_share_the_runs_of_a_stage(job):
    tasks = [task(job, number, STAGE="tuning") for number in (0, 1)]
    texts = [t.communicate(timeout=120)[0] for t in tasks]
    assert [t.returncode for t in tasks] == [0, 0], texts
    assert "shard 1/2, tuning: 1 runs" in texts[1]
    assert len(read_results(Path("out"))) == 3
    starts = {p.parent.name.rpartition("-lr")[2]: p.read_text().split()
              for p in Path("out/runs").glob("*/starts")}  # fmt: skip
    assert starts == {"0.001-s0": ["0"], "0.002-s0": ["1"], "0.004-s0": ["0"]}
    assert not Path("calls").exists()


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGUSR1])
def test_a_task_out_of_time_saves_and_is_put_back(job, told):
    going = task(job, 1, STAGE="tuning", SLOW="1")
    while not list(Path("out").glob("runs/*/starts")):
        assert going.poll() is None
        time.sleep(0.05)
    going.send_signal(told)
    text, _ = going.communicate(timeout=60)
    assert going.returncode == 143, text
    assert "1 cut off" in text
    assert Path("calls").read_text() == "scontrol show job 18\nscontrol requeue 18\n"


def test_the_script_submits_itself_stage_after_stage(job):
    shown = subprocess.check_output(["bash", "job.sbatch"], env=job, text=True)
    assert shown == "submitted tuning: 17\nsubmitted main: 17\n"
    assert Path("calls").read_text().splitlines() == [
        "sbatch --parsable --export=ALL,STAGE=tuning job.sbatch",
        "sbatch --parsable --dependency=afterany:17 --export=ALL,STAGE=main job.sbatch",
    ]
    assert "#SBATCH --array=0-1\n" in Path("job.sbatch").read_text()


def test_several_gpus_of_a_task_have_runs_of_their_own(job):
    Path("bin/mmfree").write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))"
    )
    shown, _ = task(job, 0, CUDA_VISIBLE_DEVICES="4,7").communicate()
    assert json.loads(shown)[1:] == ["sweep", "run", "sweep.yaml", "--device", "H100", "--shard",
                                     "slurm", "--stage", "all", "--gpus", "4", "7"]  # fmt: skip
    shown, _ = task(job, 0, CUDA_VISIBLE_DEVICES="4").communicate()
    assert json.loads(shown)[-1] == "all"


def test_shellcheck_has_nothing_to_say(job):
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([program, "job.sbatch"], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("values", "words", "message"),
    [
        ([], ["sweep.yaml"], "slurm needs tasks"),
        (["--tasks", "0"], ["sweep.yaml"], "tasks is 0"),
        (["--tasks", "2"], ["sweep.yaml", "--shard=0/2"], "--shard is given behind --"),
        (["--tasks", "2"], ["none.yaml"], "none.yaml: No such file"),
        (["--tasks", "2"], ["sweep.yaml", "--parallel", "0"], "parallel is 0"),
    ],
)
def test_what_cannot_run_is_not_rendered(job, values, words, message):
    with pytest.raises(MMFreeError, match=message):
        render_job(["slurm", "--name", "s", *values, "--", "sweep", "run", *words])


def test_in_a_container_the_sweep_is_a_step(job):
    words = ["slurm", "--name", "s", "--tasks", "2", "--out", "job.sbatch", "--cpus-per-gpu", "3"]
    words += ["--container-image", "a b", "--container-mounts", "/:/"]
    assert render_job([*words, "--", "sweep", "run", "sweep.yaml"]) == 0
    going = task(job, 0, STAGE="tuning")
    going.communicate(timeout=60)
    assert going.returncode == 0
    assert Path("calls").read_text() == (
        "srun --ntasks=1 --container-image=a b --container-mounts=/:/ "
        "mmfree sweep run sweep.yaml --shard slurm --stage tuning\n"
    )
    assert "export SRUN_CPUS_PER_TASK=3\n" in Path("job.sbatch").read_text()


def test_other_platforms_take_no_sweep(job):
    with pytest.raises(ConfigError, match="rendered for slurm alone"):
        render_job(["gke", "--", "sweep", "run", "sweep.yaml"])
    sweep = load_sweep("sweep.yaml")
    text = render_array(SlurmArray(name="s", tasks=1, partition="a100"), ["sweep", "run", "a b"],
                        sweep)  # fmt: skip
    assert "#SBATCH --partition=a100\n" in text
    assert "mmfree sweep run 'a b' --shard slurm" in text
