"""SLURM job files: their directives, what they start, and which ends go back into the queue."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.cli.render import render_job
from mmfree_jax.launch.jobs.slurm import Slurm
from mmfree_jax.launch.render import render

# Everything that a shell could stumble over.
TRAIN = [
    "--preset",
    "1.3B",
    "--run-dir",
    '/shared/o\'hara $(reboot) `x`/"run"\n\U0001f600',
    "--steps",
    "9",
]
ALL = Slurm(
    name="mm",
    nodes=4,
    partition="gpu",
    account="lab",
    qos="high",
    mem="900G",
    constraint="h100&(ib|roce)",
    container_image="registry#team/mmfree:1",
    container_mounts="/shared:/shared,/my scratch:/scratch",
    setup="source /shared/venv/bin/activate",
)

# srun runs one task here, as it would; what it starts says what it was given and ends as told.
_SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
at = next(i for i, word in enumerate(words) if not word.startswith("-"))
with open("srun", "a") as file:
    file.write(repr((words[:at], os.environ.get("SRUN_CPUS_PER_TASK"))) + "\\n")
os.execvp(words[at], words[at:])
"""
_MMFREE = """#!{python}
import os, signal, sys
if os.environ.get("TOLD"):  # as all processes of the step are, this one's shell among them
    os.kill(os.getppid(), getattr(signal, os.environ["TOLD"]))
open("mmfree", "a").write(repr(sys.argv[1:]) + "\\n")
code = int(os.environ["CODE"])
sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)
"""
_SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$*" >> requeued
[ "$1" = show ] && echo "JobId=7 JobState=$STATE Reason=None"
exit 0
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job(values, CODE="2", ...) runs a rendered job to its end."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", _SRUN), ("mmfree", _MMFREE), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text.replace("{python}", sys.executable))
        (folder / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mm",
           "STATE": "RUNNING"}  # fmt: skip

    def run(values, **more):
        done = subprocess.run(["bash"], input=render(values, TRAIN), text=True, env=env | more,
                              capture_output=True, timeout=60)  # fmt: skip
        print(done.stdout, done.stderr)
        return done.returncode

    return run


def test_every_process_gets_the_command_as_it_was_given(job):
    assert job(ALL, CODE="0") == 0
    options, cpus = eval(Path("srun").read_text())
    assert options == ["--label", "--kill-on-bad-exit=1",
                       "--container-image=registry#team/mmfree:1",
                       "--container-mounts=/shared:/shared,/my scratch:/scratch"]  # fmt: skip
    assert cpus == "8"
    assert eval(Path("mmfree").read_text()) == ["train", *TRAIN]


def test_directives():
    text = render(ALL, TRAIN)
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
    assert directives == {
        "job-name": "mm",
        "nodes": "4",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "8",
        "time": "24:00:00",
        "partition": "gpu",
        "account": "lab",
        "qos": "high",
        "mem": "900G",
        "constraint": "h100&(ib|roce)",
        "output": "%x-%j.log",
        "open-mode": "append",
        "signal": "TERM@120",
    }
    assert text.index("#SBATCH --requeue") < text.index("set -uo"), "sbatch stops at a command"
    bare = render(Slurm(name="mm", nodes=1), TRAIN)
    given = {"partition", "account", "qos", "mem", "constraint"}
    assert not given & set(re.findall(r"^#SBATCH --([\w-]+)", bare, re.MULTILINE))


@pytest.mark.parametrize(
    ("code", "ends_with", "requeued"),
    [
        ("0", 0, False),
        ("2", 2, False),  # something to put right
        ("127", 127, False),  # no such command
        ("126", 126, False),
        ("130", 130, False),  # somebody's Ctrl-C
        ("143", 143, True),  # the time limit: saved
        ("75", 75, True),  # a process was lost
        ("1", 1, True),  # srun could not start it
        ("-9", 137, True),  # out of memory
        ("-6", 134, True),  # its coordinator was killed
        ("-15", 143, True),  # the limit came before it was ready to save
    ],
)
def test_which_ends_go_back_into_the_queue(job, code, ends_with, requeued):
    assert job(Slurm(name="mm", nodes=1), CODE=code) == ends_with
    assert Path("requeued").exists() == requeued
    if requeued:
        assert Path("requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("told", "code"), [("SIGTERM", "143"), ("SIGUSR1", "138")])
def test_a_signal_leaves_each_process_its_time_to_save(job, told, code):
    assert job(Slurm(name="mm", nodes=1), CODE=code, TOLD=told) == 143
    assert Path("mmfree").exists(), "the shell around it did not end before it"
    assert Path("requeued").read_text() == "requeue 7\n"
    assert not Path("mm-7.failures").exists(), "it did not fail"


def test_what_is_cancelled_stays_out_of_the_queue(job):
    assert job(Slurm(name="mm", nodes=1), CODE="143", STATE="COMPLETING") == 143
    assert not Path("requeued").exists()


def test_a_job_that_dies_at_once_goes_round_a_few_times_only(job):
    values = Slurm(name="mm", nodes=1, failures=3)
    times = []
    for code in ("75", "-9", "143", "75", "-6", "75"):  # one that was told to stop starts anew
        job(values, CODE=code)
        times.append(len(Path("requeued").read_text().splitlines()))
    assert times == [1, 2, 3, 4, 5, 5]
    assert not Path("mm-7.failures").exists(), "submitted again, it begins at none"


def test_restarts_bound_the_ends_by_time(job):
    values = Slurm(name="mm", nodes=1, restarts=2)
    job(values, CODE="143", SLURM_RESTART_COUNT="1")
    assert Path("requeued").exists()
    Path("requeued").unlink()
    job(values, CODE="143", SLURM_RESTART_COUNT="2")
    assert not Path("requeued").exists()


@pytest.mark.parametrize("values", [ALL, Slurm(name="mm", nodes=1)], ids=["all", "few"])
def test_shellcheck_has_nothing_to_say(values, tmp_path):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    values = dataclasses.replace(values, setup="module load python")  # no file to follow
    (tmp_path / "job").write_text(render(values, ["--run-dir", "/shared/o'hara; reboot #\n"]))
    found = subprocess.run([program, tmp_path / "job"], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None, "nodes": None}, "slurm needs name, nodes: give --name, --nodes, or a"),
        ({"name": "a b"}, "name is 'a b': use A to Z"),
        ({"name": "a/b"}, "name is 'a/b'"),  # the log's name too
        ({"name": "é"}, "name is 'é'"),
        ({"nodes": 0}, "nodes is 0"),
        ({"failures": 0}, "failures is 0"),
        ({"time": "tomorrow"}, "time is 'tomorrow': give hours:minutes:seconds"),
        ({"time": "2"}, "time is '2': give more than the 120 s before its end"),
        ({"time": "0:02:00"}, "time is '0:02:00': give more than the 120 s"),
        ({"time": "1:2:3:4"}, "time is '1:2:3:4'"),
        ({"partition": "x\n#SBATCH --y"}, "partition is .*: give one line"),
        ({"partition": "a b"}, "partition is 'a b'"),
        ({"qos": "$(x)"}, r"qos is '\$\(x\)': use A to Z"),
        ({"mem": "lots"}, "mem is 'lots': give a number and K, M, G or T, as in 900G"),
        ({"constraint": "a b"}, "constraint is 'a b': give features"),
        (
            {"container_image": "i"},
            "container_image is 'i' and nothing is mounted in it: give --co",
        ),
        ({"container_mounts": "/a"}, "container_mounts is '/a' without an image: give --container"),
        ({"setup": "if then"}, "not valid: .* see the value of setup"),
        ({"setup": "a\x85b"}, "setup is .*: give one line"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ConfigError, match=message):
        render(Slurm(**({"name": "mm", "nodes": 1} | change)), TRAIN)


@pytest.mark.parametrize("time", ["3", "10:00", "1:00:00", "1-0", "2-12:30", "1-1:1:1", "120:30"])
def test_time_limits_as_sbatch_reads_them(time):
    assert f"#SBATCH --time={time}\n" in render(Slurm(name="mm", nodes=1, time=time), TRAIN)


def test_a_run_directory_that_a_container_does_not_see_is_refused(capsys):
    argv = ["slurm", "--name", "a", "--nodes", "1", "--container-image", "i",
            "--container-mounts", "/data:/in,/shared"]  # fmt: skip
    for run_dir in ("/data/runs", "runs/a", "/in/../runs"):
        with pytest.raises(ConfigError, match=r"outside of container_mounts \(/in, /shared\)"):
            render_job([*argv, "--", "--preset", "tiny", "--run-dir", run_dir])
    for run_dir in ("/in/runs", "/shared/a"):
        assert render_job([*argv, "--", "--preset", "tiny", "--run-dir", run_dir]) == 0
