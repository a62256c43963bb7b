"""Other quantisers and activations of the layers than the released models': models by the maths."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.config_io import model_identity
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import quantized
from mmfree_jax.export.supported import check_supported
from mmfree_jax.model import LanguageModel, Master, functional
from mmfree_jax.model.linear import LinearWeights, linears
from mmfree_jax.model.packing import pack
from mmfree_jax.model.parameters import flatten, param_shapes
from mmfree_jax.model.weights import as_weights, training_weights
from mmfree_jax.model_config import BITLINEAR, DENSE, ModelConfig
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternary_matmul
from mmfree_jax.parallel.sharding import check_divisible, make_mesh, param_shardings
from mmfree_jax.presets import names_vocabulary, preset
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.kinds import PACKED_FILE
from mmfree_jax.saved.pack import write_packed
from mmfree_jax.saved.packed import open_packed, read_master, read_packed, read_ternary
from mmfree_jax.train.flops import count_parameters
from mmfree_jax.train.loss import loss_sums

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


# Scales of groups, and learnt ones. The oracle is numpy in float64, written from the definitions.

BASE = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_layers=1,
    intermediate_size=256,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
GROUPS = dataclasses.replace(BASE, weight_scale="groups")
LEARNED = dataclasses.replace(BASE, weight_scale="learned")


def rounded(x):
    """Q8 of normalised rows: integers, and a scale a row."""
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scale) * scale


def trits_and_scales(w, kind, log_scale):
    """Of the definition, [N, K] each."""
    if kind == "groups":
        means = np.abs(w.reshape(len(w), -1, 128)).mean(axis=-1)
        s = np.repeat(means, 128, axis=1)
    else:
        s = np.full_like(w, np.abs(w).mean() * np.exp(log_scale))
    return np.clip(np.rint(w / s), -1, 1), s


@pytest.mark.parametrize("program", ["fused", "plain"])
@pytest.mark.parametrize("kind", ["groups", "learned"])
def test_scales_and_all_gradients_are_those_of_the_definition(kind, program):
    config = dataclasses.replace(BASE, weight_scale=kind, bitlinear=program)
    rng = np.random.default_rng(3)
    x, w, d = rng.normal(size=(5, 256)), rng.normal(size=(7, 256)), rng.normal(size=(5, 7))
    w[:, 128:] *= 3  # groups unlike each other
    log_scale = 0.4 if kind == "learned" else 0.0
    trits, s = trits_and_scales(w, kind, log_scale)
    q = rounded(x)

    def apply(x, w, log_scale):
        layer = LinearWeights(
            w, jnp.ones(256), None, None, BITLINEAR,
            log_scale=log_scale if kind == "learned" else None,
        )  # fmt: skip
        return linears(config, [layer], x)[1][0]

    given = [jnp.asarray(a, jnp.float32) for a in (x, w, np.full((1, 1), log_scale))]
    found, pull = jax.vjp(apply, *given)
    np.testing.assert_allclose(found, q @ (trits * s).T, rtol=1e-4, atol=1e-3)
    d_x, d_w, d_log = pull(jnp.asarray(d, jnp.float32))
    np.testing.assert_allclose(d_w, d.T @ q, rtol=1e-4, atol=1e-4)
    u = w / s
    slope = np.where(np.abs(u) < 1, np.rint(u) - u, np.sign(u))  # arXiv 1902.08153, equation 3
    expected = np.sum((d.T @ q) * slope * s) if kind == "learned" else 0.0
    np.testing.assert_allclose(float(d_log[0, 0]), expected, rtol=1e-4, atol=1e-4)
    # Through the norm without weights: of n = x r the derivative is r (d - n mean(d n)).
    d_n, r = d @ (trits * s), 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    n = x * r
    np.testing.assert_allclose(
        d_x, r * (d_n - n * np.mean(d_n * n, axis=-1, keepdims=True)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("config", [GROUPS, LEARNED], ids=["groups", "learned"])
def test_head_loss_is_that_of_the_logits(config):
    """Chunks of the loss and the logits that decoding makes come from the same integers."""
    model, params = LanguageModel(config), weights_of(config)
    batch = {
        "tokens": jnp.arange(12, dtype=jnp.int32).reshape(2, 6),
        "targets": jnp.arange(12, dtype=jnp.int32).reshape(2, 6) + 3,
        "segment_ids": jnp.ones((2, 6), jnp.int32),
    }

    def loss(params):
        return loss_sums(training_weights(params, config), batch, model=model, chunk=4)[0]

    def by_logits(params):
        logits = model.apply({"params": params}, batch["tokens"])
        return -jnp.sum(
            jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
        )

    (value, grads), (expected, its) = (
        jax.jit(jax.value_and_grad(f))(params) for f in (loss, by_logits)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in flatten(its):
        a, b = flatten(grads)[name], flatten(its)[name]
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(np.abs(b).max()) + 1e-6)
    moved = {name: x for name, x in flatten(grads).items() if name.endswith("log_scale")}
    assert len(moved) == (7 if config is LEARNED else 0)
    assert all(float(np.abs(x).max()) > 0 for x in moved.values())


def weights_of(config):
    init = jax.jit(LanguageModel(config).init)
    tree = init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.2 if path[-1].key == "log_scale" else x, tree
    )


@pytest.mark.parametrize("config", [GROUPS, LEARNED], ids=["groups", "learned"])
def test_packed_models_give_the_logits_of_the_trained_one(config, tmp_path):
    params, tokens = weights_of(config), jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    expected = jax.jit(LanguageModel(config).apply)({"params": params}, tokens)
    forms = [as_weights(params, config)]
    forms.append(pack(forms[0], config))
    leaves = flatten(params)
    write_packed(tmp_path / PACKED_FILE, config, lambda name: np.asarray(leaves[name]))
    file = open_packed(tmp_path)
    assert file.config.weight_scale == ("groups" if config is GROUPS else "matrix")
    scale = (1, 256, 2) if config is GROUPS else (1, 1, 1)
    assert file.reader.read("blocks/glu/down_proj/scale", scale).dtype == np.float32
    forms += [read_ternary(file), read_packed(file), Master(read_master(file))]
    for form in forms:
        logits = jax.jit(LanguageModel(file.config).apply)(form, tokens)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    counted = sum(math.prod(x.shape) for x in param_shapes(config).values())
    assert count_parameters(config).total == counted


@pytest.mark.parametrize("config", [GROUPS, LEARNED], ids=["groups", "learned"])
def test_shards_of_groups_and_learnt_scales_give_the_gradients_of_one_device(config):
    params, tokens = weights_of(config), jnp.arange(20, dtype=jnp.int32).reshape(4, 5)

    def loss(params):
        x_BTD, _ = LanguageModel(config).apply(
            training_weights(params, config), tokens, method="hidden"
        )
        return jnp.mean(jnp.square(x_BTD) * (1 + tokens[..., None]))

    step = jax.value_and_grad(loss)
    value, grads = jax.jit(step)(params)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        on_mesh, its = jax.jit(step)(jax.device_put(params, param_shardings(mesh, params)))
    np.testing.assert_allclose(on_mesh, value, rtol=1e-5)
    for name, x in flatten(grads).items():
        error = np.linalg.norm(flatten(its)[name] - x)
        assert error <= 0.02 * np.linalg.norm(x) + 1e-6, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"backward": "int8_dx"},
            "backward int8_dx needs one scale a matrix; set --",
        ),
        ({"matmul_kernel": "pallas_triton"}, "matmul_kernel pallas_triton needs one scale"),
        ({"hidden_size": 192}, "hidden_size is 192; set a multiple of 128"),
        ({"intermediate_size": 200}, "intermediate_size is 200"),
        (
            dict.fromkeys(("mixer_linear", "glu_linear", "head_linear"), DENSE),
            "no layer is ternary; set --model.weight-scale matrix",
        ),
    ],
)
def test_what_groups_do_not_go_with_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"model.weight_scale is 'groups': .*{message}"):
        dataclasses.replace(GROUPS, **changes)


def test_shards_hold_whole_groups():
    config = TrainConfig(model=GROUPS, batch_size=8)
    with pytest.raises(ConfigError, match=r"model\.hidden_size is 256, 2 groups .*--mesh\.fsdp"):
        check_divisible(config, make_mesh(MeshConfig(fsdp=4), jax.devices()[:4]))
    check_divisible(config, make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]))


def test_kernels_without_scales_of_groups_refuse_them():
    x, trits = jnp.ones((2, 256), jnp.int8), jnp.ones((3, 256), jnp.int8)
    with pytest.raises(ValueError, match="'pallas_triton' takes one scale a matrix"):
        ternary_matmul(x, jnp.ones((2, 1)), trits, jnp.ones((3, 2)), implementation="pallas_triton")
    with pytest.raises(ConfigError, match=r"model\.weight_scale is 'groups'.*is exported"):
        check_supported(GROUPS)
    with pytest.raises(ConfigError, match=r"model\.weight_scale is 'learned'.*layers alone"):
        huggingface.write_config(LEARNED, dtype="float32", packed=False, max_length=8)
