"""A tokenizer that makes ids which the model does not have, in every command that reads a model."""

import dataclasses

import pytest
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import write_packed

COMMANDS = {
    "export-hf {model} out": True,
    "pack --model {model} --out out --agreement-prompts 0": True,
    "export onnx --model {model} --out out": True,
    "export stablehlo --model {model} --out out": True,
    "eval needle --model {model} --data nowhere": True,
    "generate --model {model} --prompt a": False,
    "serve --model {model} --port 0": False,
}
"""And whether the way out is the model's folder, as there is no --tokenizer."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same model trained, as a model folder, and packed, each beside 258 ids for its 61."""
    folder = tmp_path_factory.mktemp("models")
    config = dataclasses.replace(BASE, vocab_size=61)
    for name in ("trained", "packed"):
        (folder / name / "tokenizer").mkdir(parents=True)
        ByteTokenizer().save(folder / name / "tokenizer")
    write_model(folder / "trained", config, build(config)[1])
    leaf = open_model(folder / "trained").leaf
    write_packed(folder / "packed/packed.safetensors", config, leaf)
    return folder


@pytest.mark.parametrize("kind", ["trained", "packed"])
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_one_line_before_anything_is_written(
    models, command, kind, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(command.format(model=models / kind).split()) == 2
    error = capsys.readouterr().err
    assert "the tokenizer has 258 tokens, the model 61" in error
    assert "the tokenizer that the model was trained with" in error
    assert ("into its folder" in error) == COMMANDS[command]
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
