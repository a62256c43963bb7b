"""The script for TPU VMs: what it asks gcloud for, what the hosts run, and how it keeps a run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.launch.jobs.tpu_vm import TpuVm
from mmfree_jax.launch.render import render

TRAIN = ["--preset", "1.3B", "--run-dir", '/mnt/shared/o\'hara $(reboot) `x`/"run"\n\U0001f600']
VALUES = {"name": "t", "project": "p", "zone": "z", "accelerator_type": "v5litepod-256",
          "package": "/mnt/shared/my clone[tpu]", "nfs": "10.0.0.2:/v"}  # fmt: skip

# gcloud answers with the next line of `answers` where it is asked for a state or a status.
_GCLOUD = """#!{python}
import json, sys
words = sys.argv[1:]
open("calls.jsonl", "a").write(json.dumps(words) + "\\n")
if "describe" in words or any("echo new" in word for word in words):
    lines = open("answers").read().splitlines()
    open("answers", "w").write("\\n".join(lines[1:]))
    sys.exit(1) if lines[0] == "none" else print(lines[0])
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(verb, answers, **more) runs the rendered script; its exit code and gcloud's calls."""
    (tmp_path / "bin").mkdir()
    for name, text in (("gcloud", _GCLOUD.replace("{python}", sys.executable)),
                       ("sleep", "#!/bin/sh\n")):  # fmt: skip
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def run(verb, answers=(), **more):
        Path("tpu.sh").write_text(render(TpuVm(**VALUES, **more), TRAIN))
        Path("answers").write_text("\n".join(answers))
        Path("calls.jsonl").write_text("")
        done = subprocess.run(["bash", "tpu.sh", verb], env=env, timeout=60)
        calls = Path("calls.jsonl").read_text().splitlines()
        return done.returncode, [json.loads(line)[2:] for line in calls]

    return run


def _command(call):
    return next(w for w in call if w.startswith("--command=")).partition("=")[2]


def test_create_and_delete(script):
    _, [call] = script("create")
    assert call[:3] == ["tpu-vm", "create", "t"]
    assert {"--accelerator-type=v5litepod-256", "--version=v2-alpha-tpuv5-lite"} <= set(call)
    assert "--spot" not in call
    _, [call] = script("create", queued=True, spot=True)
    assert call[:3] == ["queued-resources", "create", "t"]
    assert {"--node-id=t", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(call)
    _, [call] = script("delete", queued=True)
    assert call[:3] == ["queued-resources", "delete", "t"]
    assert "--quiet" not in call, "asks"
    assert script("fly")[0] == 2


def test_every_host_runs_the_command_as_it_was_given(script, tmp_path):
    """What `train` sends to the hosts is run here, with a program in mmfree's place."""
    _, [call] = script("train")
    assert "--worker=all" in call
    host = tmp_path / "host"
    (host / "mmfree" / "bin").mkdir(parents=True)
    program = host / "mmfree" / "bin" / "mmfree"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps(sys.argv[1:]), os.getpid())\nsys.exit(7)\n"
    )
    program.chmod(0o755)
    subprocess.run(["sh", "-c", _command(call) + " wait"], cwd=host, check=True, timeout=60)
    words, _, pid = (host / "mmfree.log").read_text().rpartition(" ")
    assert json.loads(words) == ["train", *TRAIN]
    assert (host / "mmfree.pid").read_text() == pid, "the trainer's own, which `stop` signals"
    assert (host / "mmfree.code").read_text() == "7\n"


@pytest.mark.parametrize("version", ["3.10", "3.11"])
def test_setup_secures_a_python_that_is_new_enough(script, tmp_path, version):
    """What `setup` sends to the hosts is run here, with stubs in their programs' places."""
    _, [call] = script("setup")
    host = tmp_path / "host"
    (host / "bin").mkdir(parents=True)
    (host / ".local" / "bin").mkdir(parents=True)
    pip = "mkdir -p mmfree/bin; cp bin/pip mmfree/bin/pip"
    major, minor = version.split(".")
    for path, text in {
        "bin/sudo": "",
        "bin/mountpoint": "",
        "bin/curl": 'echo "curl $*" >> calls',
        "bin/pip": 'echo "pip $*" >> calls',
        "bin/python3": f'[ "$1" = -c ] && exec {sys.executable} -c "import sys; '
        f'sys.version_info = ({major}, {minor}); $(echo "$2" | sed s/import.sys.//)"\n'
        f'echo "venv $*" >> calls; {pip}',
        ".local/bin/uv": f'echo "uv $*" >> calls; {pip}',
    }.items():
        (host / path).write_text(f"#!/bin/sh\n{text}\n")
        (host / path).chmod(0o755)
    env = {"PATH": f"{host / 'bin'}:/usr/bin:/bin", "HOME": str(host)}
    for _ in range(2):  # the second time there is an environment already
        subprocess.run(["bash", "-c", _command(call)], cwd=host, env=env, check=True, timeout=60)
    installed = "pip install -q /mnt/shared/my clone[tpu]"
    calls = (host / "calls").read_text().splitlines()
    if version == "3.11":
        assert calls == ["venv -m venv mmfree", installed, installed]
    else:
        curl = "curl -LsSf https://astral.sh/uv/0.9.5/install.sh"
        uv = "uv venv -q --seed --python 3.12 mmfree"
        assert calls == [curl, uv, installed, installed]


def _did(calls):
    """The verbs of gcloud's calls that changed something."""
    said = []
    for call in calls:
        text = " ".join(call)
        if "describe" in call or "echo new" in text:
            continue
        said.append("setup" if "nfs-common" in text else "train" if "nohup" in text else call[1])
    return said


def test_spot_machines_that_are_taken_away_are_made_anew(script):
    code, calls = script("keep", [
        "none", "WAITING_FOR_RESOURCES", "ACTIVE", "new", "ACTIVE", "running",
        "SUSPENDED", "none", "ACTIVE", "new", "ACTIVE", "0",
    ], queued=True, spot=True)  # fmt: skip
    assert code == 0
    assert _did(calls) == ["create", "setup", "train", "delete", "create", "setup", "train"]
    assert next(c for c in calls if "delete" in c)[-2:] == ["--force", "--quiet"]


@pytest.mark.parametrize(
    ("ends", "code", "did"),
    [
        (["2"], 2, []),  # something to put right
        (["143"], 143, []),  # somebody's `stop`
        (["75", "0"], 0, ["train"]),
        (["lost", "0"], 0, ["train"]),
        (["137", "137", "137"], 1, ["train", "train"]),  # dies at once
    ],
)
def test_which_ends_start_the_run_again(script, ends, code, did):
    answers = [word for end in ends for word in ("READY", end)]
    ended, calls = script("keep", answers)
    assert (ended, _did(calls)) == (code, did)


@pytest.mark.parametrize("more", [{}, {"queued": True, "spot": True}])
def test_shellcheck_has_nothing_to_say(more, tmp_path):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    text = render(TpuVm(**VALUES, **more), ["--preset", "tiny", "--run-dir", "/mnt/shared/a b"])
    (tmp_path / "job").write_text(text)
    found = subprocess.run([program, tmp_path / "job"], capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_the_words_of_a_command_line_survive_two_shells(script):
    _, [call] = script("train")
    inner = shlex.split(_command(call))
    assert shlex.split(inner[inner.index("-c") + 1].partition(" & echo")[0])[2:] == TRAIN
