"""Products of a training step by dtype: counts by hand, and the products of the program itself."""

import dataclasses
import math
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from mmfree_jax.config import MeshConfig
from mmfree_jax.launch.ahead.products import count_products, gathered_bytes
from mmfree_jax.launch.ahead.step_cost import executed_flops, expected_collectives
from mmfree_jax.launch.ahead.topology import parse_topology
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model.weights import training_weights
from mmfree_jax.model_config import DENSE, LinearConfig, ModelConfig
from mmfree_jax.presets import preset
from mmfree_jax.train.loss import loss_sums

# Projections of a mixer's layer 64 x 64; gate_up 320 x 64, down 64 x 160; the head 96 x 64.
MODEL = ModelConfig(
    vocab_size=96, hidden_size=64, num_layers=2, intermediate_size=160, remat="none",
    matmul_kernel="xla_int8", scan_layers=False,
)  # fmt: skip
HYBRID = dataclasses.replace(MODEL, mixer="mlgru,attention", float_attention=True)
TOKENS = (2, 8)


def test_a_hybrid_with_float_attention_by_hand():
    # Operations a token: a projection 2 * 64 * 64 = 8192, the GLU 2 * 3 * 64 * 160 = 61440,
    # the head 2 * 96 * 64 = 12288.
    forward = {"mlgru": 4 * 8192, "attention": 4 * 8192, "glus": 2 * 61440, "head": 12288}
    products = count_products(HYBRID, 8)
    assert products.int8 == 32768 + 122880 + 12288 == forward["mlgru"] + forward["glus"] + 12288
    # Two products of each in the backward pass, and those of float attention forward.
    assert products.wide == 2 * (32768 + 32768 + 122880 + 12288) + 32768
    # The first layer's MLGRU has no lower bound: 10 operations a channel. Attention: 4 * 64 a key,
    # of which a causal row of 8 has 4.5.
    assert products.mixing == 3 * (10 * 64 + 4 * 64 * 4.5)
    # All again but down (2 * 64 * 160 = 20480 a layer): the MLGRU's and the gate_ups in int8.
    full = count_products(dataclasses.replace(HYBRID, remat="full"), 8)
    assert full.int8 == products.int8 + 32768 + 2 * (61440 - 20480)
    assert full.wide == products.wide + 32768


def test_a_step_of_a_hybrid_in_bfloat16_operations_by_hand():
    config = dataclasses.replace(preset("tiny"), model=HYBRID, batch_size=4)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=8))
    a_token = 167_936 / 2 + (401_408 + 32_768) + 5_376
    assert executed_flops(config, parse_topology("h100x8")) == a_token * 4 * 8
    # A TPU v4 multiplies int8 no faster than bfloat16.
    a_token = 167_936 + (401_408 + 32_768) + 5_376
    assert executed_flops(config, parse_topology("v4-8")) == a_token * 4 * 8


def test_what_travels_by_hand():
    # A mixer 4 * 64 * 64 = 16384, a GLU 3 * 64 * 160 = 30720, the head 6144: trits of a byte,
    # float attention in bfloat16, the embedding in float32.
    assert gathered_bytes(HYBRID) == (16384 + 2 * 16384 + 2 * 30720, 4 * 6144 + 6144)
    twin = dataclasses.replace(
        MODEL, mixer="attention", mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
    )
    assert gathered_bytes(twin) == (2 * 2 * (16384 + 30720), 4 * 6144 + 2 * 6144)
    config = dataclasses.replace(preset("tiny"), model=twin, batch_size=4)
    mesh = MeshConfig(data=1, fsdp=4)
    weights, _ = expected_collectives(config, mesh, parse_topology("h100x4"))
    # Forward and backward, three quarters of it from the other devices.
    assert weights.near == (2 * 188_416 + 36_864) * 3 / 4


@pytest.mark.parametrize(
    "changes",
    [
        {"remat": "gated"},
        {"remat": "gates", "mixer": "rglru"},
        {"remat": "gates", "mixer": "attention"},
        {"remat": "full", "mixer": "mingru,attention", "float_attention": True},
        {"remat": "stream", "mixer": "rwkv4"},
        {"remat": "states", "mixer": "hgrn2", "head_linear": DENSE},
        {"remat": "projections", "mixer": "hgrn2,attention"},
        {"remat": "dots", "mixer": "attention", "mixer_linear": DENSE, "glu_linear": DENSE},
        {"remat": "full", "backward": "int8_dx"},
        {"backward": "int8", "output_gate": "none", "remat": "gated"},
        {"bitlinear": "plain", "remat": "full"},
        {"matmul_kernel": "xla_bf16"},
        {"mixer_linear": LinearConfig(int8_activations=False), "remat": "states"},
        {
            "weight_scale": "groups",
            "hidden_size": 128,
            "intermediate_size": 256,
            "remat": "full",
        },
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_counts_are_the_programs_products(changes):
    model = dataclasses.replace(MODEL, **changes)
    found, counted = _products_with_weights(model), count_products(model, TOKENS[1])
    tokens = math.prod(TOKENS)
    assert (found["int8"] / tokens, found["wide"] / tokens) == (counted.int8, counted.wide)


def _products_with_weights(model):
    """Operations of a step's products that have no batch axes, by dtype, from its jaxpr."""
    ints = jax.ShapeDtypeStruct(TOKENS, jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids"), ints)

    def loss(params, batch):
        weights = training_weights(params, model)
        return loss_sums(weights, batch, model=LanguageModel(model), chunk=16)[0]

    program = jax.make_jaxpr(jax.grad(loss))(unflatten(param_shapes(model)), batch).jaxpr
    live, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    found = Counter()
    _add_products(live, 1, found)
    return found


def _add_products(jaxpr, times, found):
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "dot_general":
            (left, _), (batched, _) = params["dimension_numbers"]
            a = equation.invars[0].aval
            size = 2 * math.prod(equation.outvars[0].aval.shape)
            size *= math.prod(a.shape[i] for i in left)
            if not batched:
                found["int8" if a.dtype == jnp.int8 else "wide"] += times * size
        elif equation.primitive.name == "cond":  # of platforms: CPUs have a branch of their own
            _add_products(params["branches"][-1].jaxpr, times, found)
        else:
            turns = times * (params["length"] if equation.primitive.name == "scan" else 1)
            for value in jax.tree.leaves(
                list(params.values()), is_leaf=lambda v: _inner(v) is not None
            ):
                if (inner := _inner(value)) is not None:
                    _add_products(inner, turns, found)


def _inner(value):
    jaxpr = getattr(value, "jaxpr", value)
    return jaxpr if hasattr(jaxpr, "eqns") else None
