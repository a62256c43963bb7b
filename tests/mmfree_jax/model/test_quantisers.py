"""Other quantisers and activations of the layers than the released models': models by the maths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config_io import model_identity
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import quantized
from mmfree_jax.export.supported import check_supported
from mmfree_jax.model import functional
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.presets import names_vocabulary, preset
from mmfree_jax.saved import huggingface
from mmfree_jax.train.flops import count_parameters

RELU2 = ModelConfig(glu_activation="relu2")


def test_squared_relu_and_its_gradient_are_those_of_the_definition():
    gate_up = np.random.default_rng(0).normal(size=(3, 10))
    cotangent = np.random.default_rng(1).normal(size=(3, 5))
    found, pull = jax.vjp(functional.relu2_glu, jnp.asarray(gate_up, jnp.float32))
    gate, up = gate_up[:, :5], gate_up[:, 5:]
    open_gate = np.where(gate > 0, gate, 0.0)
    np.testing.assert_allclose(found, open_gate**2 * up, rtol=1e-6)
    expected = np.concatenate([2 * open_gate * up * cotangent, open_gate**2 * cotangent], axis=1)
    np.testing.assert_allclose(pull(jnp.asarray(cotangent, jnp.float32))[0], expected, rtol=1e-5)


def test_layers_that_others_cannot_hold_are_refused_by_name():
    refused = r"model\.glu_activation is 'relu2'"
    with pytest.raises(ConfigError, match=f"{refused}.*is exported"):
        check_supported(RELU2)
    for config in (
        RELU2,
        dataclasses.replace(
            RELU2, mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
        ),
    ):
        with pytest.raises(ConfigError, match=f"{refused}.*released models' layers alone"):
            huggingface.write_config(config, dtype="float32", packed=False, max_length=8)
    with pytest.raises(ConfigError, match=f"{refused}.*layers as released"):
        quantized.check_supported(RELU2)


def test_models_of_before_keep_their_names():
    """Sessions and tables compare these fields, which older files do not have."""
    assert "glu_activation" not in model_identity(ModelConfig())
    assert model_identity(RELU2)["glu_activation"] == "relu2"


def test_a_float_head_is_a_preset_and_is_counted():
    """370M's head has 1024 x 32000 weights, and a BitLinear there a norm of its own."""
    ternary, float_head = preset("370M").model, preset("370M-float-head").model
    assert float_head == dataclasses.replace(ternary, head_linear=DENSE)
    before, after = count_parameters(ternary), count_parameters(float_head)
    assert before.ternary - after.ternary == 1024 * 32000
    assert before.norms - after.norms == 1024
    assert after.head == before.head
    assert names_vocabulary("370M-float-head")
    assert not names_vocabulary("rung-7M-float-head")
