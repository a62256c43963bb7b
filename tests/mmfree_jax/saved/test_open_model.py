"""The one door: what a folder is, what is refused, and that each kind gives its weights."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model import LanguageModel, Master, Packed, Ternary
from mmfree_jax.model.parameters import flatten, param_shapes
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack
from mmfree_jax.saved.pretrained import load_model, load_pretrained

OLD = Path(__file__).parent / "old"
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    intermediate_size=24,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(LanguageModel(CONFIG).init)
    return init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.fixture(scope="module")
def folders(params, tmp_path_factory, save_model):
    """One model as a model folder, a Hugging Face folder and a packed model; and an old run."""
    root = tmp_path_factory.mktemp("models")
    model = save_model(root / "model", CONFIG, params)
    export_hf(root / "model", root / "huggingface")
    pack(model, root / "packed", embedding="float32")
    shutil.copytree(OLD / "run", root / "run")
    return root


def test_each_kind_is_known(folders):
    found = {name: open_model(folders / name) for name in ("model", "huggingface", "packed", "run")}
    assert [saved.kind for saved in found.values()] == [
        "model folder",
        "huggingface",
        "packed",
        "run",
    ]
    assert found["run"].trained_length == 16
    assert found["huggingface"].trained_length == 2048
    assert found["packed"].trained_length is None
    assert found["run"].config.hidden_size == 16
    tokenizer = found["run"].tokenizer()
    assert tokenizer is not None
    assert tokenizer.kind == "byte"
    assert found["model"].tokenizer() is None


@pytest.mark.parametrize("form", ["master", "ternary", "packed", None])
def test_every_form_of_every_kind_gives_the_same_logits(folders, params, form):
    want = np.asarray(LanguageModel(CONFIG).apply({"params": params}, TOKENS))
    kinds = {"master": Master, "ternary": Ternary, "packed": Packed, None: Ternary}
    for name in ("model", "huggingface", "packed"):
        saved = open_model(folders / name)
        weights = saved.weights(form)
        assert isinstance(weights, kinds[form])
        logits = np.asarray(saved.model("float32").apply(weights, TOKENS))
        np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_one_leaf_is_one_parameter(folders, params):
    want = flatten(params)
    for name in ("model", "huggingface"):
        saved = open_model(folders / name)
        for leaf in param_shapes(CONFIG):
            np.testing.assert_array_equal(saved.leaf(leaf), want[leaf], err_msg=leaf)
    trits, scale = open_model(folders / "model").ternary("blocks/glu/down_proj/weight")
    again = open_model(folders / "packed").ternary("blocks/glu/down_proj/weight")
    np.testing.assert_array_equal(trits, again[0])
    np.testing.assert_array_equal(scale, again[1])
    assert set(np.unique(trits)) == {-1, 0, 1}


def test_the_call_decides_the_form_not_the_folder(folders):
    for name in ("model", "huggingface", "packed", "run"):
        _, params = load_pretrained(folders / name)
        assert params["head"]["weight"].dtype == jnp.float32
        _, weights = load_model(folders / name)
        assert isinstance(weights, Ternary)  # on a CPU; a packed model stays packed elsewhere


def test_a_mesh_lays_out_a_packed_model_too(folders):
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    alone = open_model(folders / "packed").weights("master")
    shared = open_model(folders / "packed").weights("master", mesh)
    jax.tree.map(np.testing.assert_array_equal, alone, shared)
    with pytest.raises(ConfigError, match="one device"):
        open_model(folders / "packed").weights("packed", mesh)


@pytest.mark.parametrize("second", ["packed.safetensors", "model.yaml", "config.json"])
def test_a_folder_of_two_models_is_refused_by_every_command(folders, tmp_path, second, capsys):
    both = tmp_path / "both"
    shutil.copytree(folders / "run", both)
    source = {"packed.safetensors": "packed", "model.yaml": "model", "config.json": "huggingface"}
    shutil.copy(folders / source[second] / second, both / second)
    with pytest.raises(CheckpointError, match=rf"config.yaml .* and {second} .* two models"):
        open_model(both)
    for command in (
        ["generate", "--model", both, "--prompt-ids", "1"],
        ["pack", "--model", both, "--out", tmp_path / "out"],
        ["export-hf", both, tmp_path / "out"],
        ["eval", "--model", both, "--data", tmp_path],
        ["hardware", "compile", "--model", both, "--out", tmp_path / "out"],
    ):
        assert main(list(map(str, command))) == 2, command
        error = capsys.readouterr().err
        assert "two models" in error, command
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").write_text("x")
    for folder, match in (
        ("empty", "holds no model"),
        ("nowhere", "is not a folder"),
        ("weights.bin", "is pickled"),
    ):
        for command in (
            ["generate", "--prompt-ids", "1"],
            ["pack", "--out", str(tmp_path / "out")],
            ["eval", "--data", str(tmp_path)],
        ):
            assert main([*command, "--model", str(tmp_path / folder)]) == 2
            error = capsys.readouterr().err
            assert match in error
            assert error.count("\n") == 1


def test_a_step_is_of_a_run(folders):
    with pytest.raises(ConfigError, match=r"--step is 3, but .*packed is not a training run"):
        open_model(folders / "packed", step=3)
    with pytest.raises(CheckpointError, match="no checkpoint of step 3: it has 300"):
        open_model(folders / "run", step=3).weights()


def test_a_run_of_other_shapes_is_refused(folders, tmp_path):
    shutil.copytree(folders / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("intermediate_size: 32", "intermediate_size: 64"))
    with pytest.raises(CheckpointError, match=r"down_proj.*the config is of another run"):
        open_model(tmp_path / "run").weights("master")


def test_compute_dtype_is_one_of_three(folders):
    saved = open_model(folders / "model")
    assert saved.model(jnp.bfloat16).config == dataclasses.replace(
        CONFIG, compute_dtype="bfloat16", residual_dtype="bfloat16"
    )
    with pytest.raises(ConfigError, match="compute_dtype is 'int8'"):
        saved.model("int8")


def test_a_damaged_config_is_one_line(folders, tmp_path):
    for name, file in (("model", "model.yaml"), ("huggingface", "config.json")):
        copy = Path(shutil.copytree(folders / name, tmp_path / name))
        for text in ("", "[", "[1]", json.dumps({"hidden_size": "x"})):
            (copy / file).write_text(text)
            with pytest.raises(ConfigError) as error:
                open_model(copy)
            assert "\n" not in str(error.value)
