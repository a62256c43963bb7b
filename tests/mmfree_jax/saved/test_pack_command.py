"""`mmfree pack` writes whole folders, and none into its own source."""

import os
import shutil
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main

OLD = Path(__file__).parent / "old"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD / "run", tmp_path / "runs/run"))


def pack(*arguments):
    return main(["pack", *map(str, arguments), "--agreement-prompts", "0"])


@pytest.mark.parametrize("out", [".", "packed", "..", "../../runs"])
def test_the_source_is_left_as_it_is(run, out, capsys):
    before = sorted(run.rglob("*"))
    assert pack("--model", run, "--out", run / out) == 2
    error = capsys.readouterr().err
    assert "is, holds or lies in" in error
    assert error.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_what_others_wrote_is_kept(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert pack("--model", run, "--out", out) == 2
    assert "was not written by `mmfree pack`" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["precious"]


def test_a_packed_model_is_not_replaced_and_not_packed_again(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert pack("--model", run, "--out", out) == 0
    assert (out / "tokenizer/byte.json").is_file()
    data = (out / "packed.safetensors").read_bytes()
    capsys.readouterr()
    assert pack("--model", run, "--out", out, "--bits", "1.6") == 2
    assert capsys.readouterr().err == (
        f"mmfree: error: {out} exists already: choose another folder, or remove it yourself\n"
    )
    assert (out / "packed.safetensors").read_bytes() == data
    assert pack("--model", out, "--out", tmp_path / "again") == 2
    assert "ternarising is not idempotent" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_the_modes_of_all_files_follow_the_umask(run, tmp_path):
    old = os.umask(0o077)
    try:
        assert pack("--model", run, "--out", tmp_path / "p") == 0
    finally:
        os.umask(old)
    assert (tmp_path / "p" / "tokenizer").is_dir()
    open_to_others = [p.name for p in (tmp_path / "p").rglob("*") if p.stat().st_mode & 0o077]
    assert not open_to_others
