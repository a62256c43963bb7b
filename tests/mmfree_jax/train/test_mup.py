"""Maximal update parametrisation: initial sizes, rates, and what stays put across widths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model import LanguageModel, training_weights
from mmfree_jax.model.mup import query_scale
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.schedule import schedule_values

NARROW, WIDE, VOCABULARY = 64, 512, 64
DENSE_MODEL = {"mixer": "attention", "mixer_linear": DENSE, "glu_linear": DENSE,
               "head_linear": DENSE}  # fmt: skip
FAMILIES = {"matmulfree": {}, "transformer": DENSE_MODEL | {"num_heads": 4}}
CONSTANT = OptimizerConfig(learning_rate=8e-3, schedule="constant", clip_norm=None)


def make(family: str, width: int, *, mup: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_layers=1, intermediate_size=2 * width,
        compute_dtype="float32", residual_dtype="float32", remat="none", mup=mup,
        mup_base_width=NARROW, **FAMILIES[family],
    )  # fmt: skip


@functools.cache
def initial(config: ModelConfig) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(lambda key: LanguageModel(config).init(key, tokens)["params"])(jax.random.key(0))


def leaves(tree: Any) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in found}


@functools.cache
def _forward_and_gradient(family: str, width: int) -> Any:
    """One program for both parametrisations: they differ in no forward pass."""
    config = make(family, width, mup=False)

    @jax.jit
    def program(params: Any, tokens: jax.Array) -> Any:
        weights = training_weights(params, config)

        def loss(params: Any) -> Any:
            own = dataclasses.replace(weights, params=params)
            model, inputs = LanguageModel(config), tokens[:, :-1]
            stream, _ = model.apply(own, inputs, method="hidden")
            logits = model.apply(own, stream, method="logits")
            nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
            return jnp.mean(nats), (stream, logits)

        return jax.grad(loss, has_aux=True)(params)

    return program


def sizes_after(steps: int, family: str, width: int, *, mup: bool) -> dict[str, float]:
    """Root mean squares of stream and logits after some updates, and of how they changed."""
    config = make(family, width, mup=mup)
    params, optimizer = initial(config), make_optimizer(CONSTANT, config)
    state, program = optimizer.init(params), _forward_and_gradient(family, width)
    update = jax.jit(
        functools.partial(
            optimizer.update, values=schedule_values(CONSTANT, 100), scale=jnp.ones(()),
            norm=jnp.ones(()), apply=jnp.array(True),
        )
    )  # fmt: skip
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (4, 17)), jnp.int32)
    grads, before = program(params, tokens)
    for _ in range(steps):
        params, state = update(grads, state, params)
        grads, after = program(params, tokens)
    pairs = zip(("stream", "logits"), before, after, strict=True)
    found = {}
    for name, was, now in pairs:
        found[name] = float(jnp.sqrt(jnp.mean(jnp.square(now))))
        found[f"change of {name}"] = float(jnp.sqrt(jnp.mean(jnp.square(now - was))))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_keep_their_size_across_widths_with_mup_and_grow_without(family):
    narrow = sizes_after(4, family, NARROW, mup=True)
    wide = {mup: sizes_after(4, family, WIDE, mup=mup) for mup in (True, False)}
    for name, size in narrow.items():
        assert 0.6 < wide[True][name] / size < 1.4, name
        assert wide[False][name] / size > 3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_sizes_follow_the_table(family):
    ratio = WIDE / NARROW
    plain, scaled = (leaves(initial(make(family, WIDE, mup=mup))) for mup in (False, True))
    expected = {"embedding/weight": 1.0, "head/weight": 1 / ratio,
                "blocks/glu/gate_up_proj/weight": ratio**-0.5,
                "blocks/glu/down_proj/weight": ratio**-0.5}  # fmt: skip
    if family == "transformer":  # four heads of 16 channels at the base, of 128 here
        expected |= {"blocks/mixer/q_proj/weight": 1 / ratio,
                     "blocks/mixer/k_proj/weight": ratio**-0.5}  # fmt: skip
    else:  # Xavier's, which falls with the width by itself
        expected["blocks/mixer/f_proj/weight"] = 1.0
    for name, factor in expected.items():
        np.testing.assert_allclose(scaled[name], factor * plain[name], rtol=1e-6, err_msg=name)


def test_rates_follow_the_table_and_the_decay_does_not():
    shapes = jax.eval_shape(lambda: initial.__wrapped__(make("transformer", WIDE, mup=True)))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    config = dataclasses.replace(CONSTANT, weight_decay=0.5)
    steps = {}
    for mup in (False, True):
        optimizer = make_optimizer(config, make("transformer", WIDE, mup=mup))
        update = functools.partial(optimizer.update, scale=1.0, norm=1.0, apply=True)
        after, _ = jax.jit(update)(ones, optimizer.init(ones), ones, schedule_values(config, 100))
        steps[mup] = leaves(jax.tree.map(lambda x: float(1 - x.ravel()[0]), after))
    for name, step in steps[True].items():
        is_matrix = name.endswith("weight") and "embedding" not in name
        factor = 8**-1.5 if "q_proj" in name else 1 / 8
        # Adam's first step is the gradient's sign; every weight is 1.
        plain, scaled = (1.5, factor + 0.5) if is_matrix else (1.0, 1.0)
        assert steps[False][name] == pytest.approx(8e-3 * plain, rel=1e-3), name
        assert step == pytest.approx(8e-3 * scaled, rel=1e-3), name


def test_at_the_base_width_and_without_it_nothing_changes():
    plain, scaled = (make("transformer", NARROW, mup=mup) for mup in (False, True))
    params = initial(plain)
    for name, weight in leaves(params).items():
        np.testing.assert_array_equal(weight, leaves(initial(scaled))[name])
    programs = []
    for config in (None, plain, scaled):
        optimizer = make_optimizer(CONSTANT, config)
        update = functools.partial(optimizer.update, scale=1.0, norm=1.0, apply=True)
        state = jax.eval_shape(optimizer.init, params)
        given = params, state, params, schedule_values(CONSTANT, 100)
        programs.append(str(jax.make_jaxpr(update)(*given)))
    assert programs[0] == programs[1] == programs[2]


def test_heads_of_a_width_of_their_own_are_as_wide_as_at_the_base():
    wide = ModelConfig(mixer="attention", hidden_size=1024, num_heads=4, mup=True)
    assert query_scale(wide) == 0.5  # 256 channels a head, 64 of them at the base of 256
    assert query_scale(dataclasses.replace(wide, head_dim=256)) == 1.0
