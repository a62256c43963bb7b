"""Continuous integration beside the tests: which Python it finds, how long it may take."""

import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
OLDER = f"{sys.version_info.major}.{sys.version_info.minor - 1}"


@pytest.fixture
def found(tmp_path):
    """What `.ci/newest_python` prints where only `bin` is on PATH and pyenv's folder is `pyenv`."""
    for tool in ("bash", "dirname", "grep", "sort", "tail"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    env = {"PATH": str(tmp_path / "bin"), "PYENV_ROOT": str(tmp_path / "pyenv")}

    def find(than):
        command = ["bash", str(ROOT / ".ci" / "newest_python"), than]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout

    return find


def script(file: Path, line: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{line}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize("place", ["bin/python{}", "pyenv/versions/{}.9/bin/python3"])
def test_a_newer_python_is_found(found, tmp_path, place):
    assert found(OLDER) == ""
    python = script(tmp_path / place.format(VERSION), f'exec {sys.executable} "$@"')
    assert found(OLDER).strip() in (str(python), python.name)
    assert found(VERSION) == ""


def test_a_name_behind_which_there_is_no_python_of_that_version_is_passed_over(found, tmp_path):
    script(tmp_path / "bin/python3.13", "exit 127")
    script(tmp_path / "pyenv/versions/3.13.0/bin/python3", "exit 1")
    assert found("3.12") == ""


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize(
    "module", ["mmfree_jax.train.step", "tests.test_ci", "jax._src.core", "flax.linen", "optax",
               "orbax.checkpoint", "grain._src"],
)  # fmt: skip
def test_what_will_go_is_an_error(category, module):
    with pytest.raises(category):
        warnings.warn_explicit("old", category, "file.py", 1, module=module)


def test_python_versions_are_said_alike():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    assert versions == ["3.11", "3.12", "3.13"]
    assert project["requires-python"] == f">={versions[0]}"


def test_the_budgets_of_all_steps_are_below_an_hour():
    steps = re.findall(r'^step "(.+)" (\d+) ', (ROOT / ".ci" / "run").read_text(), re.M)
    assert len(steps) == 7
    assert sum(int(seconds) for _, seconds in steps) <= 3600
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_half_an_environment_is_made_anew(tmp_path):
    """As Debian's python3 leaves it where python3-venv is not installed."""
    half = f'mkdir -p "$3/bin"; ln -s {sys.executable} "$3/bin/python"; exit 1'
    python = script(tmp_path / "python", f'[ "$1" = -m ] || exec {sys.executable} "$@"; {half}')
    command = ["make", f"VENV={tmp_path}/venv", f"PYTHON={python}", f"{tmp_path}/venv/bin/python"]
    for _ in range(2):
        made = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        assert made.returncode == 2
