"""StableHLO exports: the model's own numbers after a round trip, and refusal of what is damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.errors import CheckpointError, DataError
from mmfree_jax.export import manifest, stablehlo
from mmfree_jax.infer import load_model, prefill
from mmfree_jax.model import LanguageModel
from mmfree_jax.presets import preset
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack
from mmfree_jax.saved.packed import open_packed

TINY = preset("tiny").model
PROMPTS = [[65, 66, 67, 68, 69, 70, 71], [80, 81]]


@pytest.fixture(scope="module")
def params():
    init = jax.jit(LanguageModel(TINY).init)
    return init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def packed(params, tmp_path_factory, save_model):
    folder = tmp_path_factory.mktemp("packed")
    out = folder / "model"
    pack(save_model(folder / "master", TINY, params), out, embedding="float32")
    return out


@pytest.fixture(scope="module")
def folder(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("stablehlo") / "out"
    arguments = ["--model", str(packed), "--out", str(out), "--chunk", "8"]
    assert main(["export", "stablehlo", *arguments]) == 0
    return out


def test_reloaded_programs_give_the_models_numbers(packed, folder):
    program = stablehlo.load(folder)
    tokens_BC = np.zeros((2, 8), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens_BC[row, : len(prompt)] = prompt
    lengths = [len(prompt) for prompt in PROMPTS]
    logits_BV, state = program.prefill(tokens_BC, lengths, program.start(2))
    model, variables = load_model(packed)
    session = prefill(model, variables, PROMPTS)
    same(logits_BV, session.logits_BV)
    same(state, session.state.layers["h"])
    logits_BV, state = program.step([[90], [91]], state)
    session = prefill(model, variables, [[90], [91]], session=session)
    same(logits_BV, session.logits_BV)
    same(state, session.state.layers["h"])
    for tokens, words in (([[-1]], "id -1"), ([[90.5]], "float64"), ([90], "shape")):
        with pytest.raises(DataError, match=words):
            program.step(tokens, program.start(1))


def same(found, want):
    """Equal up to an activation or two that a last bit rounds to the other side."""
    found, want = np.asarray(found), np.asarray(want)
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(found, want, atol=0.03 * np.abs(want).max())
    assert np.median(np.abs(found - want)) < 1e-3 * np.abs(want).max()


def test_one_file_serves_all_platforms_and_holds_no_weight(folder):
    contents = json.loads((folder / "export.json").read_text())
    assert contents["platforms"] == ["cpu", "cuda", "tpu"]
    for name in (stablehlo.STEP, stablehlo.PREFILL):
        program = jax.export.deserialize(bytearray((folder / name).read_bytes()))
        assert program.platforms == ("cpu", "cuda", "tpu")
        assert "dense_resource" not in program.mlir_module()
        assert contents["files"][name]["bytes"] < 200_000
    weights = [entry["name"] for entry in contents["weights"]]
    assert weights == sorted(weights)
    assert "blocks/mixer/i_proj/packed" in weights


def test_a_model_at_fewer_bits_gives_the_same_export(packed, folder, tmp_path):
    pack(open_model(packed), tmp_path / "dense", bits="1.6")
    stablehlo.export_stablehlo(tmp_path / "dense", tmp_path / "out", chunk=8)
    weights, own = (open_packed(f).reader for f in (folder, tmp_path / "out"))
    assert sorted(own.names()) == sorted(weights.names())
    for name in own.names():
        np.testing.assert_array_equal(own.read(name), weights.read(name))


@pytest.mark.parametrize("name", ["step.stablehlo", "packed.safetensors"])
def test_damaged_files_are_refused(name, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    contents = bytearray((copy / name).read_bytes())
    contents[-5] ^= 1
    (copy / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"{name}.*checksum"):
        stablehlo.load(copy)
    (copy / name).write_bytes(contents[:-9])
    with pytest.raises(CheckpointError, match=f"{name} has"):
        stablehlo.load(copy)


def test_what_cannot_be_exported_is_refused(packed, folder, tmp_path, capsys):
    assert main(["export", "stablehlo", "--model", str(packed), "--out", str(folder)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="mmfree-onnx"):
        manifest.read(folder)
