"""Models that lie in the repository: whole, within their limits, and they write."""

import json
import tomllib
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main as mmfree
from mmfree_jax.experiments.study import publish_model
from mmfree_jax.files import sha256_file
from mmfree_jax.outputs import MARKER

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "experiments/results/models"


@pytest.fixture(params=["61M"])
def folder(request):
    return MODELS / request.param


def test_files_are_those_of_the_list_and_within_the_limits(folder):
    assert publish_model.check_sizes(folder) <= 24_000_000
    listed = {line[66:]: line[:64] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert set(listed) == files - {"SHA256SUMS", MARKER}
    assert {name: sha256_file(folder / name) for name in listed} == listed


def test_every_number_names_a_step_with_its_provenance(folder):
    record = json.loads((folder / "results.json").read_text())
    for number in record["numbers"]:
        assert number["step"]
        for name in number["step"]:
            step = record["steps"][name]
            assert all(step[key] for key in ("command", "commit", "device", "begun"))


def test_a_published_model_writes(folder, capsys):
    arguments = ["--model", str(folder), "--prompt", "It was", "--max-new-tokens", "8"]
    assert mmfree(["generate", *arguments, "--temperature", "0", "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 8


def test_a_folder_that_was_changed_is_seen(tmp_path):
    (tmp_path / "a").write_text("as it was")
    (tmp_path / "SHA256SUMS").write_text(publish_model.checksums(tmp_path))
    test_files_are_those_of_the_list_and_within_the_limits(tmp_path)
    (tmp_path / "a").write_text("changed")
    with pytest.raises(AssertionError):
        test_files_are_those_of_the_list_and_within_the_limits(tmp_path)


def test_models_are_in_neither_wheel_nor_source_distribution():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "/experiments/results" in build["targets"]["wheel"]["exclude"]
    assert "/experiments/results/models" in build["targets"]["sdist"]["exclude"]
