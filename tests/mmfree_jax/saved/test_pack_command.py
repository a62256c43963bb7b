"""`mmfree pack` writes whole folders, and none into its own source."""

import os
import shutil
from pathlib import Path

import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.saved.packed import StreamAgreement, open_packed, record_agreement
from mmfree_jax.saved.tensor_file import Reader

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


def test_a_packed_model_is_not_replaced(run, tmp_path, capsys):
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


@pytest.mark.parametrize("embedding", ["float32", "bfloat16", "int8"])
def test_a_packed_model_is_packed_again_with_its_own_numbers(run, tmp_path, capsys, embedding):
    straight, other, back = (tmp_path / name for name in ("straight", "other", "back"))
    options = ["--embedding", embedding]
    assert main(["pack", "--model", str(run), "--out", str(straight), *options,
                 "--agreement-prompts", "1", "--agreement-tokens", "4"]) == 0  # fmt: skip
    assert pack("--model", straight, "--out", other, "--bits", "1.6") == 0
    assert pack("--model", other, "--out", back) == 0
    first, second, third = (
        (folder / "packed.safetensors").read_bytes() for folder in (straight, other, back)
    )
    assert first != second
    assert first == third
    assert (back / "tokenizer/byte.json").is_file()
    assert open_packed(other).agreement == open_packed(straight).agreement is not None
    changed = {"float32": "int8", "bfloat16": "float32", "int8": "bfloat16"}[embedding]
    capsys.readouterr()
    assert pack("--model", other, "--out", tmp_path / "n", "--embedding", changed) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmfree: error: --embedding is {changed}, but the packed model")
    assert f"kept it in {embedding} alone" in error
    assert not (tmp_path / "n").exists()


def test_the_modes_of_all_files_follow_the_umask(run, tmp_path):
    old = os.umask(0o077)
    try:
        assert pack("--model", run, "--out", tmp_path / "p") == 0
    finally:
        os.umask(old)
    assert (tmp_path / "p" / "tokenizer").is_dir()
    open_to_others = [p.name for p in (tmp_path / "p").rglob("*") if p.stat().st_mode & 0o077]
    assert not open_to_others


def test_an_embedding_is_read_once_however_often_its_dtype_is_asked_for(run, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    assert pack("--model", run, "--out", packed) == 0
    agreement = StreamAgreement(4, (4, 2), "two")
    record_agreement(packed / "packed.safetensors", agreement)
    read, names = Reader.read, []

    def noted(self, name, shape=None):
        names.append(name)
        return read(self, name, shape)

    monkeypatch.setattr(Reader, "read", noted)
    assert pack("--model", tmp_path / "packed", "--out", tmp_path / "again", "--bits", "1.6") == 0
    assert names.count("embedding/weight") == 1
    assert open_packed(tmp_path / "again").agreement == agreement
    names.clear()
    edge = ["--out", str(tmp_path / "edge"), "--no-web"]
    assert main(["export", "onnx", "--model", str(tmp_path / "packed"), *edge]) == 0
    assert names.count("embedding/weight") == 1
