"""AdamW, its decay mask and its clipping against hand-written updates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.parameter_rules import decay_mask
from mmfree_jax.train.schedule import make_schedule, schedule_values

PARAMS = {
    "embedding": {"weight": jnp.full((3, 2), 0.5)},
    "lower_bounds": jnp.full((2, 2), 0.5),
    "blocks": {"mixer": {"i_proj": {"weight": jnp.full((2, 2), 0.5), "norm_scale": jnp.ones(2)}}},
    "head": {"weight": jnp.full((3, 2), -0.5), "norm_scale": jnp.ones(2)},
}


def test_only_matrices_but_the_embedding_decay():
    mask = decay_mask(PARAMS)
    assert mask == {
        "embedding": {"weight": False},
        "lower_bounds": False,
        "blocks": {"mixer": {"i_proj": {"weight": True, "norm_scale": False}}},
        "head": {"weight": True, "norm_scale": False},
    }


def _run(config, gradients, params=PARAMS, steps=10, scale=1.0):
    """The updates on gradients that are `1 / scale` times too large."""
    optimizer, values = make_optimizer(config), schedule_values(config, steps)
    state = optimizer.init(params)
    for gradient in gradients:
        params, state = optimizer.update(
            jax.tree.map(lambda g: g / scale, gradient),
            state,
            params,
            values,
            scale=jnp.float32(scale),
            norm=optax.tree.norm(gradient),
            apply=jnp.bool_(True),
        )
    return params, state


def _random_gradients(count):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": None, "weight_decay": 0.0, "schedule": "wsd", "moment_dtype": "bfloat16"},
    ],
    ids=["clipped", "plain"],
)
def test_updates_and_state_are_those_of_optax(changes):
    """The same numbers up to the order of products, and checkpoints of the same layout."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, warmup_steps=2)
    config = dataclasses.replace(config, **changes)
    gradients = _random_gradients(4)
    got, got_state = _run(config, gradients, scale=0.25)

    chain = optax.chain(
        *([optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []),
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype),
        *(
            [optax.add_decayed_weights(config.weight_decay, mask=decay_mask)]
            if config.weight_decay
            else []
        ),
        optax.scale_by_learning_rate(make_schedule(config, 10)),
    )
    params, state = PARAMS, chain.init(PARAMS)
    for gradient in gradients:
        updates, state = chain.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.structure(got_state) == jax.tree.structure(state)
    # optax multiplies bf16 moments in bf16; here they are widened first.
    rtol = 2e-2 if config.moment_dtype == "bfloat16" else 2e-6
    pairs = zip(*map(jax.tree.leaves, ((got, got_state), (params, state))), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=rtol, atol=1e-7)


def test_an_update_that_does_not_apply_leaves_everything():
    optimizer = make_optimizer(OptimizerConfig())
    before = optimizer.init(PARAMS)
    gradient = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), PARAMS)
    params, state = optimizer.update(
        gradient,
        before,
        PARAMS,
        schedule_values(OptimizerConfig(), 10),
        scale=jnp.float32(1),
        norm=jnp.float32(jnp.nan),
        apply=jnp.bool_(False),
    )
    jax.tree.map(np.testing.assert_array_equal, (params, state), (PARAMS, before))


def test_updates_follow_the_adamw_equations():
    config = OptimizerConfig(
        learning_rate=0.1, schedule="linear", weight_decay=0.3, clip_norm=None, b1=0.8, b2=0.9
    )
    gradients = _random_gradients(3)
    got, _ = _run(config, gradients)
    schedule = make_schedule(config, 10)
    for path, decay in ((("head", "weight"), 0.3), (("embedding", "weight"), 0.0)):
        w = np.asarray(PARAMS[path[0]][path[1]], np.float64)
        m, v = np.zeros_like(w), np.zeros_like(w)
        for t, gradient in enumerate(gradients):
            g = np.asarray(gradient[path[0]][path[1]], np.float64)
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            m_hat, v_hat = m / (1 - 0.8 ** (t + 1)), v / (1 - 0.9 ** (t + 1))
            w = w - float(schedule(t)) * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * w)
        np.testing.assert_allclose(got[path[0]][path[1]], w, rtol=2e-5)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_clipping_is_by_the_global_norm(scale):
    """eps dominates, so that an update is proportional to the clipped gradient."""
    gradient = jax.tree.map(lambda p: jnp.full(p.shape, scale), PARAMS)
    norm = scale * np.sqrt(sum(p.size for p in jax.tree.leaves(PARAMS)))
    config = OptimizerConfig(
        learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=1.0, eps=1e6
    )
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    got, _ = _run(config, [gradient], params=zeros)
    expected = -scale * min(1.0, 1.0 / norm) / 1e6
    np.testing.assert_allclose(got["head"]["weight"], expected, rtol=1e-4)


@pytest.mark.parametrize("first", ["bfloat16", "float32"])
@pytest.mark.parametrize("second", ["bfloat16", "float32"])
def test_each_moment_has_a_dtype_of_its_own(first, second):
    config = OptimizerConfig(moment_dtype=first, second_moment_dtype=second)
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = _run(config, [gradient])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[1].mu)} == {first}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state[1].nu)} == {second}
