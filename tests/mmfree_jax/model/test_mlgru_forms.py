"""The MLGRU's printed forms and candidates, and ternary queries and keys, by their equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.export.supported import check_supported
from mmfree_jax.model import functional
from mmfree_jax.model.attention import Attention
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model.mlgru import MLGRU
from mmfree_jax.model.operations import Rows
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.saved import huggingface
from mmfree_jax.train.flops import count_flops, count_parameters

FLOAT = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    num_layers=2,
    intermediate_size=8,
    mixer_linear=DENSE,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
FORMS = [("authors", "silu"), ("text", "silu"), ("figure", "linear"), ("none", "tanh")]


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def normed(x, scale):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def by_the_equations(p, x, norm, bound, h, reset, padding, gate, candidate):
    """The update and the last state, a step after another."""
    u = normed(x, norm)
    updates = []
    for t in range(x.shape[1]):
        i, f = (u[:, t] @ p[f"{name}_proj"]["weight"].T for name in "if")
        c = {"silu": i * sigmoid(i), "linear": i, "tanh": jnp.tanh(i)}[candidate]
        forget = bound + (1 - bound) * sigmoid(f)
        before = jnp.where(reset[:, t, None], 0, h)
        h = jnp.where(padding[:, t, None], h, forget * before + (1 - forget) * c)
        if gate == "none":
            o = h
        else:
            g = u[:, t] @ p["g_proj"]["weight"].T
            o = {
                "authors": lambda g, h: normed(g, p["gate_norm"]["scale"]) * h * sigmoid(h),
                "text": lambda g, h: g * sigmoid(h),
                "figure": lambda g, h: h * sigmoid(g),
            }[gate](g, h)
        updates.append(o @ p["o_proj"]["weight"].T)
    return jnp.stack(updates, axis=1), h


@pytest.mark.parametrize(("gate", "candidate"), FORMS)
def test_each_form_is_its_equations(gate, candidate):
    config = dataclasses.replace(FLOAT, output_gate=gate, candidate=candidate)
    rng = np.random.default_rng(1)
    x, norm, bound, h0 = (
        jnp.asarray(a, jnp.float32)
        for a in (rng.normal(size=(2, 7, 6)), rng.normal(size=6), rng.random(6), rng.random((2, 6)))
    )
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
    reset, padding = functional.document_edges(ids)
    rows = Rows(jnp.zeros((2, 7), jnp.int32), ids, reset, padding)
    args = (x, norm, rows, OfLayer(bound), {"h": h0})
    module = MLGRU(config)
    params = module.init(jax.random.key(0), *args)["params"]
    params = jax.tree.map(lambda a: a * 3, params)  # so that gates open and close
    held = ~padding[..., None]
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32) * held

    def ours(params, x, bound, h0):
        _, y, state = module.apply({"params": params}, x, norm, rows, OfLayer(bound), {"h": h0})
        return jnp.sum(y * weights) + jnp.sum(jnp.sin(state["h"])), (y * held, state["h"])

    def theirs(params, x, bound, h0):
        y, h = by_the_equations(params, x, norm, bound, h0, reset, padding, gate, candidate)
        return jnp.sum(y * weights) + jnp.sum(jnp.sin(h)), (y * held, h)

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3), has_aux=True))(params, x, bound, h0)
        for f in (ours, theirs)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
    )
    assert sorted(params) == sorted(
        ["f_proj", "i_proj", "o_proj"]
        + (["g_proj"] if gate != "none" else [])
        + (["gate_norm"] if gate == "authors" else [])
    )


def test_forms_are_counted():
    plain = ModelConfig(vocab_size=100, hidden_size=16, num_layers=3, intermediate_size=24)
    figure = dataclasses.replace(plain, output_gate="figure", candidate="linear")
    none = dataclasses.replace(plain, output_gate="none")
    total = count_parameters(plain).total
    assert total - count_parameters(figure).total == 3 * 16  # the gate's norm
    assert total - count_parameters(none).total == 3 * (16 + 256 + 16)  # and g with its norm
    # sigmoid 1, 1 - f 1, product 1, recurrence 2, gate 2, and 2 for the bound of two layers
    assert count_flops(figure, seq_len=8).mixing == 16 * (7 + 9 + 9)
    assert count_flops(none, seq_len=8).mixing == 16 * (7 + 9 + 9)  # silu 2, no gate
    assert count_flops(none, seq_len=8).mixer == 2 * 3 * 3 * 256


def test_forms_that_others_cannot_hold_are_refused():
    printed = ModelConfig(output_gate="text")
    with pytest.raises(ConfigError, match=r"model\.output_gate is 'text'.*only the MLGRU of the"):
        check_supported(printed)
    with pytest.raises(ConfigError, match=r"model\.output_gate is 'text'.*hgrn_bit folders"):
        huggingface.write_config(printed, dtype="float32", packed=False, max_length=8)
    ternary_qk = dataclasses.replace(
        TERNARY_QK, mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
    )
    with pytest.raises(ConfigError, match="or ternary_qk"):
        huggingface.write_config(ternary_qk, dtype="float32", packed=False, max_length=8)
    with pytest.raises(ConfigError, match=r"model\.candidate is 'tanh'.*with mixer attention"):
        ModelConfig(mixer="attention", candidate="tanh")
    with pytest.raises(ConfigError, match=r"model\.ternary_qk is True.*set --model\.mixer att"):
        ModelConfig(ternary_qk=True)


TERNARY_QK = ModelConfig(
    mixer="attention",
    ternary_qk=True,
    vocab_size=13,
    hidden_size=8,
    num_heads=2,
    num_layers=2,
    intermediate_size=8,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)


def test_ternary_scores_are_of_rounded_queries_and_keys():
    config = dataclasses.replace(TERNARY_QK, mixer_linear=DENSE)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    rows = Rows(jnp.zeros((1, 5), jnp.int32), None, None, None)  # position 0 rotates nothing
    module = Attention(config)
    params = module.init(jax.random.key(0), x, jnp.ones(8), rows, OfLayer(), None)["params"]
    params = jax.tree.map(lambda a: a * 50, params)

    def rounded(heads):
        """[B, T, H, K] to {-s, 0, s}, s the head's mean magnitude; gradient of the identity."""
        s = jnp.mean(jnp.abs(heads), axis=-1, keepdims=True)
        ternary = s * jnp.where(jnp.abs(heads) > s / 2, jnp.sign(heads), 0)
        return heads + jax.lax.stop_gradient(ternary - heads)

    def theirs(params):
        u = normed(x, jnp.ones(8))
        q, k, v = ((u @ params[f"{n}_proj"]["weight"].T).reshape(1, 5, 2, 4) for n in "qkv")
        scores = jnp.einsum("bthk,bshk->bhts", rounded(q), rounded(k)) / 2
        scores = jnp.where(jnp.tril(jnp.ones((5, 5), bool)), scores, -jnp.inf)
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v).reshape(1, 5, 8)
        return out @ params["o_proj"]["weight"].T

    def ours(params):
        return module.apply({"params": params}, x, jnp.ones(8), rows, OfLayer(), None)[1]

    weights = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
    found, expected = (
        jax.jit(jax.value_and_grad(lambda p, f=f: jnp.sum(f(p) * weights)))(params)
        for f in (ours, theirs)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected
    )
    assert np.abs(expected[1]["q_proj"]["weight"]).max() > 1e-3  # straight through


def test_ternary_transformer_is_a_hybrid_and_has_no_folder():
    assert TERNARY_QK.family == "hybrid"
    float_layers = dataclasses.replace(
        TERNARY_QK, mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
    )
    assert float_layers.family == "hybrid"
    assert dataclasses.replace(float_layers, ternary_qk=False).family == "transformer"
