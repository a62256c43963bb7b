"""Every command that writes a model's folder: what it may replace, modes, a disk that is full."""

import hashlib
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from mmfree_jax.cli.main import main
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.tensor_names import tensor_map

_CONFIG = {
    "model_type": "hgrn_bit",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_heads": 1,
    "rms_norm_eps": 1e-6,
}
COMMANDS = {
    "import-hf": ["import-hf", "{source}", "{out}", "--overwrite"],
    "export-hf": ["export-hf", "{source}", "{out}", "--overwrite"],
    "export onnx": ["export", "onnx", "--model", "{source}", "--out", "{out}", "--overwrite"],
    "export stablehlo": [
        "export",
        "stablehlo",
        "--model",
        "{source}",
        "--out",
        "{out}",
        "--overwrite",
    ],
    "hardware compile": ["hardware", "compile", "--model", "{source}", "--out", "{out}"],
    "pack": ["pack", "--model", "{source}", "--out", "{out}"],
}


@pytest.fixture
def model(tmp_path):
    """A Hugging Face folder, in a folder of its own."""
    folder = tmp_path / "models" / "hf"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    slots = tensor_map(huggingface.read_config(folder).config)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=slot.shape).astype(np.float32) for name, (slot, *_) in slots.items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _contents(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in folder.rglob("*")
    }


def _run(command, source, out):
    return main([word.format(source=source, out=out) for word in COMMANDS[command]])


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "pack"])
def test_a_command_replaces_its_own_output_alone(command, model, tmp_path, capsys, monkeypatch):
    def refused(out, why):
        before = _contents(tmp_path)
        assert _run(command, model, out) == 2
        error = capsys.readouterr().err
        assert error.startswith("mmfree: error: ")
        assert error.count("\n") == 1
        assert why in error
        assert _contents(tmp_path) == before

    for out in (model, model.parent, model / "new", f"{model}/../hf/", tmp_path):
        refused(out, "is, holds or lies in")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("mine")
    refused(other, f"was not written by `mmfree {command}`")
    monkeypatch.chdir(other)
    refused(".", "is or holds the current folder")

    out = tmp_path / "out"
    old = os.umask(0o022)
    try:
        assert _run(command, model, out) == 0
    finally:
        os.umask(old)
    files = [p for p in out.rglob("*") if p.is_file()]
    assert {oct(p.stat().st_mode & 0o777) for p in files if p.suffix != ".py"} == {"0o644"}
    (out / "notes").write_text("mine")
    refused(out, "it also holds notes")
    (out / "notes").unlink()
    assert _run(command, model, f"{tmp_path}/other/../out/") == 0
    assert sorted(os.listdir(tmp_path)) == ["models", "other", "out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line_and_leaves_nothing(command, model, full_disk, capsys):
    assert _run(command, model, full_disk / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmfree: error: {full_disk}/out")
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert "make room there, or choose another place" in error
    assert [p for p in full_disk.rglob("*") if p.is_file()] == []
