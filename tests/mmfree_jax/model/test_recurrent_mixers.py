"""RWKV-4, minGRU and RG-LRU against their printed equations, a step after another in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.model import functional
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model.mixers import MIXERS
from mmfree_jax.model.operations import Rows
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.train.flops import count_flops, count_parameters

B, T, D, E = 2, 7, 6, 9  # a state wider than the stream


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def gelu(x):
    return x / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mingru(p, u, state):
    z = sigmoid(p("z_proj", u))
    h = p("h_proj", u)
    candidate = jnp.where(h >= 0, h + 0.5, sigmoid(h))
    h = (1 - z) * state["h"] + z * candidate
    return p("o_proj", h), {"h": h}


def rglru(p, u, state):
    y = p("x_proj", u)
    r = sigmoid(p("r_proj", y) + p.vectors["r_bias"])
    i = sigmoid(p("i_proj", y) + p.vectors["i_bias"])
    a = sigmoid(p.vectors["decay"]) ** (8 * r)
    h = a * state["h"] + jnp.sqrt(1 - a**2) * i * y
    return p("o_proj", gelu(p("g_proj", u)) * h), {"h": h}


def rwkv4(p, u, state):
    def mixed(name):
        mu = p.vectors[f"{name}_mix"]
        return p(f"{name}_proj", mu * u + (1 - mu) * state["shift"])

    r, k, v = mixed("r"), mixed("k"), mixed("v")
    below = jnp.exp(state["log_weight"])
    above = below * state["average"]
    own = jnp.exp(k + p.vectors["bonus"])
    out = (above + own * v) / (below + own)
    fade = jnp.exp(-jnp.exp(p.vectors["decay"]))
    above, below = fade * above + jnp.exp(k) * v, fade * below + jnp.exp(k)
    new = {"shift": u, "average": above / below, "log_weight": jnp.log(below)}
    return p("o_proj", sigmoid(r) * out), new


class Parameters:
    """Products by the matrices of a tree, and its vectors."""

    def __init__(self, tree):
        self.vectors = tree

    def __call__(self, name, x):
        return x @ self.vectors[name]["weight"].T


EMPTY = {"h": 0.0, "shift": 0.0, "average": 0.0, "log_weight": -1e3}
EQUATIONS = {"mingru": mingru, "rglru": rglru, "rwkv4": rwkv4}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_mixer_is_its_equations(name):
    config = ModelConfig(
        vocab_size=11, hidden_size=D, expand_ratio=1.5, num_layers=3, mixer=name,
        mixer_linear=DENSE, compute_dtype="float32", residual_dtype="float32", remat="none",
        use_lower_bound=False,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
    reset, padding = functional.document_edges(ids)
    rows = Rows(jnp.zeros((B, T), jnp.int32), ids, reset, padding)
    mixer = MIXERS[name]
    start = {
        key: jnp.asarray(rng.normal(size=x.shape[1:]), jnp.float32)
        for key, x in mixer.state(config, (1, B), None).items()
    }
    x, norm = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (D,)))
    module = mixer.module(config)
    of_layer = OfLayer(None, jnp.int32(1))
    params = jax.jit(module.init)(jax.random.key(0), x, norm, rows, of_layer, start)["params"]
    if name == "rwkv4":
        np.testing.assert_allclose(params["decay"][jnp.asarray([0, -1])], [-5, 3], atol=1e-6)
    params = jax.tree.map(
        lambda a: a * 3 if a.ndim == 2 else a + jnp.asarray(rng.normal(size=a.shape) / 4), params
    )
    held = ~padding[..., None]
    weights = rng.normal(size=x.shape) * held
    end_weights = {key: rng.normal(size=value.shape) for key, value in start.items()}

    def objective(y, state):
        ends = jax.tree.map(lambda s, w: jnp.sum(s * w), state, end_weights)
        return jnp.sum(y * weights) + sum(ends.values()), (y * held, state)

    def ours(params, x, norm, state):
        _, y, state = module.apply({"params": params}, x, norm, rows, of_layer, state)
        return objective(y, state)

    def theirs(params, x, norm, state):
        u = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * norm
        updates = []
        for t in range(T):
            before = {k: jnp.where(reset[:, t, None], EMPTY[k], v) for k, v in state.items()}
            update, new = EQUATIONS[name](Parameters(params), u[:, t], before)
            updates.append(update)
            state = {k: jnp.where(padding[:, t, None], state[k], v) for k, v in new.items()}
        return objective(jnp.stack(updates, axis=1), state)

    def run(function, *args):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3), has_aux=True))(*args)

    found = run(ours, params, x, norm, start)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, norm, start)
        )
        expected = jax.tree.map(np.asarray, run(theirs, *wide))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=3e-5), found, expected
    )


def test_operations_and_parameters_by_hand():
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_layers": 3, "intermediate_size": 24}
    rest = 1600 * 2 + 3 * (3 * 16 * 24 + 2 * 16 + 16 + 24) + 16 + 16
    # Matrices with a norm for the inputs of each, vectors, operations of a channel.
    for mixer, matrices, vectors, operations in (
        ("mingru", 3, 0, 7),
        ("rglru", 5, 3, 17),
        ("rwkv4", 4, 5, 29),
    ):
        config = ModelConfig(mixer=mixer, **sizes)
        counted = count_parameters(config)
        assert counted.mixer == 3 * (matrices * 256 + vectors * 16)
        assert counted.total == rest + 3 * (matrices * (256 + 16) + vectors * 16)
        assert count_flops(config, seq_len=8).mixing == 3 * 16 * operations
        assert count_flops(config, seq_len=8).mixer == 2 * 3 * matrices * 256
        assert config.family == f"matmulfree-{mixer}"
