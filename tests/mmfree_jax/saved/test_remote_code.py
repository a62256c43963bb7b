"""What is exported for PyTorch beside the weights; `tests/interop_torch` runs it."""

import ast
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfree_jax.cli.main import main
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack

CONFIG = ModelConfig(vocab_size=32, hidden_size=18, num_layers=2, intermediate_size=10)
CODE = {
    "checks_mmfree.py",
    "configuration_mmfree.py",
    "linear_mmfree.py",
    "modeling_mmfree.py",
    "recurrence_mmfree.py",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, save_model):
    init = jax.jit(LanguageModel(CONFIG).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return save_model(tmp_path_factory.mktemp("m") / "ours", CONFIG, params)


def test_the_code_is_complete_and_imports_nothing_of_ours(saved, tmp_path):
    export_hf(saved.path, tmp_path / "hf")
    assert {file.name for file in (tmp_path / "hf").glob("*.py")} == CODE
    for name in CODE:
        for node in ast.walk(ast.parse((tmp_path / "hf" / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert f"{node.module}.py" in CODE
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [] if names else [alias.name for alias in node.names]
                roots = {str(name).split(".")[0] for name in names}
                assert roots <= {"collections", "dataclasses", "math", "torch", "transformers",
                                 "typing"}  # fmt: skip


def test_a_transformer_has_no_code_with_it(tmp_path, save_model):
    config = dataclasses.replace(
        CONFIG, mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE,
        num_heads=3,
    )  # fmt: skip
    init = jax.jit(LanguageModel(config).init)
    params = init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    export_hf(save_model(tmp_path / "ours", config, params).path, tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "hf/config.json").read_text())


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_a_packed_export_holds_the_trits(saved, tmp_path, bits):
    pack(saved, tmp_path / "packed", bits=bits, embedding="int8")
    assert main(["export-hf", str(tmp_path / "packed"), str(tmp_path / "hf")]) == 0
    tensors = load_file(tmp_path / "hf/model.safetensors")
    trits, scale = saved.ternary("blocks/glu/down_proj/weight")
    packed = tensors["model.layers.1.mlp.down_proj.packed"]
    assert (packed.dtype, packed.shape) == (np.uint8, (18, 3))
    planes = [(packed >> shift & 3).astype(int) - 1 for shift in (0, 2, 4, 6)]
    np.testing.assert_array_equal(np.concatenate(planes, axis=1)[:, :10], trits[1])
    assert tensors["model.layers.1.mlp.down_proj.scale"] == scale[1]
    assert tensors["lm_head.packed"].shape == (32, 5)
    assert not [name for name in tensors if name.endswith("proj.weight")]
    # The int8 table and its scales become one float table again.
    table = tensors["model.embeddings.weight"]
    np.testing.assert_allclose(table, saved.leaf("embedding/weight"), atol=5e-4)


def test_an_export_at_two_bits_is_not_taken_for_one_of_floats(saved, tmp_path):
    pack(saved, tmp_path / "packed")
    export_hf(tmp_path / "packed", tmp_path / "hf")
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "hgrn_bit_packed"
    with pytest.raises(ConfigError, match="give the packed model that it was made from"):
        open_model(tmp_path / "hf")
