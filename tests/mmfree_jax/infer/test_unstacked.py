"""Decoding on weights that lie layer by layer: the same tokens, states and logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.infer import decode, generate
from mmfree_jax.infer.sample import Sampling, row_keys
from mmfree_jax.model import LanguageModel, as_weights, unstacked
from mmfree_jax.model.unstacked import for_decoding, stack_state, unstack, unstack_state
from mmfree_jax.model_config import DENSE, ModelConfig

MATMULFREE = ModelConfig(
    vocab_size=37, hidden_size=24, num_layers=2, intermediate_size=32, remat="none",
    compute_dtype="float32", residual_dtype="float32",
)  # fmt: skip
TRANSFORMER = dataclasses.replace(
    MATMULFREE, mixer="attention", num_heads=4, num_kv_heads=2, head_dim=8, mixer_linear=DENSE,
    glu_linear=DENSE, head_linear=DENSE,
)  # fmt: skip


def _weights(config):
    init = jax.jit(LanguageModel(config).init)
    return as_weights(init(jax.random.key(1), jnp.zeros((1, 4), jnp.int32))["params"], config)


@pytest.mark.parametrize("config", [MATMULFREE, TRANSFORMER], ids=lambda c: c.family)
def test_the_same_tokens_and_state_as_stacked(config):
    weights, model = _weights(config), LanguageModel(config)
    apart = unstack(weights, config)
    assert len(apart.blocks) == 2
    prompts = [[1, 2, 3]]
    outs = [generate(model, w, prompts, max_new_tokens=4, temperature=0) for w in (weights, apart)]
    assert outs[0].tokens == outs[1].tokens
    for a, b in zip(*(jax.tree.leaves(out.session) for out in outs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_dense_matrices_are_rounded_once_as_their_products_round_them():
    config = dataclasses.replace(TRANSFORMER, compute_dtype="bfloat16", residual_dtype="bfloat16")
    weights = _weights(config)
    apart = unstack(weights, config)
    dense = [apart.rest.params["head"]["weight"]]
    for block in apart.blocks:
        mixer, glu = block.params["mixer"], block.params["glu"]
        dense += [tree["weight"] for tree in (*mixer.values(), *glu.values())]
    assert {x.dtype for x in dense} == {jnp.dtype("bfloat16")}
    assert len(dense) == 1 + 2 * 6
    # What is no matrix of a product keeps its bits.
    assert apart.rest.params["embedding"]["weight"].dtype == jnp.float32
    assert apart.blocks[0].params["glu_norm"]["scale"].dtype == jnp.float32
    model, tokens_BT = LanguageModel(config), jnp.arange(12).reshape(2, 6)
    wanted, found = (model.apply(w, tokens_BT) for w in (weights, apart))
    np.testing.assert_allclose(wanted, found, rtol=0, atol=2e-2)


def test_ternary_weights_keep_their_trits():
    apart = unstack(_weights(MATMULFREE), MATMULFREE)
    tree = apart.blocks[1].ternary["glu"]["down_proj"]
    assert (tree["trits"].dtype, tree["trits"].shape) == (jnp.int8, (24, 32))
    assert tree["scale"].shape == (1, 1)


def test_weights_are_unstacked_for_decoding_off_the_cpu(monkeypatch):
    weights = _weights(TRANSFORMER)
    assert for_decoding(weights, TRANSFORMER) is weights
    monkeypatch.setattr(unstacked.jax, "default_backend", lambda: "gpu")
    assert len(for_decoding(weights, TRANSFORMER).blocks) == 2
    apart = unstack(weights, TRANSFORMER)
    assert for_decoding(apart, TRANSFORMER) is apart


def test_states_go_apart_and_together():
    state = decode.init_session(TRANSFORMER, 2, 16).state
    numbered = jax.tree.map(lambda x: (x.T + jnp.arange(2, dtype=x.dtype)).T, state.layers)
    state = state.replace(layers=numbered)
    apart = unstack_state(state, TRANSFORMER)
    assert [float(layer["k"].max()) for layer in apart.layers] == [0.0, 1.0]
    again = stack_state(apart, TRANSFORMER)
    for name in ("k", "v", "start"):
        np.testing.assert_array_equal(again.layers[name], state.layers[name])


def test_the_loop_over_tokens_copies_neither_weights_nor_cache():
    config = dataclasses.replace(TRANSFORMER, scan_layers=True)
    apart = unstack(_weights(config), config)
    session = decode.init_session(config, 1, 64)
    sampling = Sampling(temperature=0)
    jaxpr = jax.make_jaxpr(
        lambda weights, session: decode.generate_chunk(
            weights,
            session,
            jnp.zeros(1, bool),
            jnp.full(1, 4, jnp.int32),
            row_keys(jnp.zeros(1, jnp.uint32), jnp.zeros((1, 2), jnp.uint32)),
            jnp.array([-1], jnp.int32),
            sampling.numbers(),
            config=config,
            filters=sampling.filters(),
            steps=4,
            early_exit=False,
        )
    )(apart, session)
    carried = [
        variable.aval.shape
        for equation in _equations(jaxpr.jaxpr)
        if equation.primitive.name in ("while", "scan")
        for variable in equation.outvars
    ]
    assert carried.count((1, 64, 2, 8)) == 4  # keys and values of two layers, each by itself
    assert (2, 1, 64, 2, 8) not in carried


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)
