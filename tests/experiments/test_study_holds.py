"""What travels to a machine without a network, and arrives there."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPTS = ("experiments/study/carry.sh", "experiments/study/hold.sh")


def run(script: str, *arguments: str, cwd: Path, **env: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHON": sys.executable} | {k: str(v) for k, v in env.items()},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def repository(pytestconfig, tmp_path):
    """A repository that has the project's scripts and nothing to send."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "experiments").symlink_to(pytestconfig.rootpath / "experiments")
    (root / "mmfree_jax").symlink_to(pytestconfig.rootpath / "mmfree_jax")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run([*git, "init", "-q"], cwd=root, check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=root, check=True)
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(pytestconfig, script):
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, pytestconfig.rootpath / script], capture_output=True, text=True)
    assert not done.stdout


def test_parcels_arrive_whole_and_data_of_another_study_are_refused(repository, tmp_path):
    carry, hold = tmp_path / "carry", tmp_path / "hold"
    (carry / "site").mkdir(parents=True)
    (carry / "site" / "package.py").write_text("here = True\n")
    noise = os.urandom(20_000)
    (carry / "site" / "package.so").write_bytes(noise)
    (carry / "data" / "study" / "law").mkdir(parents=True)
    (carry / "data" / "study" / "law" / "train-00000.bin").write_bytes(noise)
    for name in ("site", "data"):
        with tarfile.open(carry / f"{name}.tar.xz", "w:xz") as archive:
            archive.add(carry / name, name)
    # What was made before is kept: only the parcels are cut anew.
    made = run(SCRIPTS[0], "make", "no-text", cwd=repository, CARRY=carry, PARCEL="8K")
    assert made.returncode == 0, made.stderr
    parcels = sorted(path.name for path in carry.glob("pa*-0*"))
    assert parcels == [f"{kind}-0{i}" for kind in ("packages", "part") for i in range(3)]

    for number in range(len(parcels)):
        loaded = run(SCRIPTS[0], "load", str(number), cwd=repository, CARRY=carry)
        assert loaded.stdout.splitlines()[-1] == f"parcel {number} of 0 to 5"
        # Each call to the machine sends one parcel; what came before has been moved aside.
        received = run(SCRIPTS[1], "receive", cwd=repository, HOLD=hold)
        assert received.returncode == 0, received.stderr
        assert (hold / "site" / "package.so").exists() == (number >= 2)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True
    ).stdout
    assert (hold / "commit").read_text() == head
    assert (hold / "site" / "package.py").read_text() == "here = True\n"
    assert (hold / "site" / "package.so").read_bytes() == noise

    unpacked = run(SCRIPTS[1], "data", cwd=repository, HOLD=hold)
    assert (hold / "data" / "study" / "law" / "train-00000.bin").read_bytes() == noise
    assert unpacked.returncode != 0
    assert "data/study/classic_books" in unpacked.stdout + unpacked.stderr


def test_what_was_measured_of_a_model_leaves_without_sweeps_and_exports(repository, tmp_path):
    hold, out = tmp_path / "hold", tmp_path / "out"
    out.mkdir()
    for name in ("after/steps.json", "after/packed/packed.safetensors", "after/scratch/model.onnx"):
        (hold / name).parent.mkdir(parents=True, exist_ok=True)
        (hold / name).write_text(name)
    (hold / "runs/61M").mkdir(parents=True)
    (hold / "runs/61M/summary.json").write_text("{}")
    done = run(SCRIPTS[1], "collect", cwd=repository, HOLD=hold, OUT=out)
    assert done.returncode == 0, done.stderr
    found = {}
    for first in out.glob("*.aa"):
        with tarfile.open(first) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
    assert found == {
        "after/steps.json": b"after/steps.json",
        "after/packed/packed.safetensors": b"after/packed/packed.safetensors",
        "runs/61M/summary.json": b"{}",
    }
