"""Recurrent mixers against their printed equations, a step after another in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import functional, init_state
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.operations import Rows
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.parallel.sharding import check_divisible, make_mesh
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


def hgrn2(p, u, state):
    forget = p.lower_bound + (1 - p.lower_bound) * sigmoid(p("f_proj", u))
    q = p("q_proj", u) * sigmoid(p("q_proj", u))
    in_heads = (x.reshape(B, 3, 3) for x in (forget, 1 - forget, q, p("i_proj", u)))
    f, k, q, v = in_heads
    outer = f[..., None] * state["outer"] + k[..., None] * v[..., None, :]
    y = jnp.einsum("bhk,bhkv->bhv", q, outer).reshape(B, E) / np.sqrt(3)
    normed = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    return p("o_proj", normed * p.vectors["out_norm"]["scale"]), {"outer": outer}


class Parameters:
    """Products by the matrices of a tree, and its vectors."""

    def __init__(self, tree, lower_bound):
        self.vectors, self.lower_bound = tree, lower_bound

    def __call__(self, name, x):
        return x @ self.vectors[name]["weight"].T


EMPTY = {"h": 0.0, "shift": 0.0, "average": 0.0, "log_weight": -1e3, "outer": 0.0}
EQUATIONS = {"mingru": mingru, "rglru": rglru, "rwkv4": rwkv4, "hgrn2": hgrn2}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_mixer_is_its_equations(name):
    config = ModelConfig(
        vocab_size=11, hidden_size=D, expand_ratio=1.5, num_layers=3, mixer=name,
        mixer_linear=DENSE, compute_dtype="float32", residual_dtype="float32", remat="none",
        use_lower_bound=False, state_expansion=3 if name == "hgrn2" else None,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0]])
    reset, padding = functional.document_edges(ids)
    rows = Rows(jnp.zeros((B, T), jnp.int32), ids, reset, padding)
    mixer = mixer_of(name)
    start = {
        key: jnp.asarray(rng.normal(size=x.shape[1:]), jnp.float32)
        for key, x in mixer.state(config, (1, B), None).items()
    }
    x, norm = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, T, D), (D,)))
    module = mixer.module(config)
    bound = jnp.asarray(rng.uniform(size=E) * (np.arange(E) > 0), jnp.float32)  # and none at all
    of_layer = OfLayer(bound, jnp.int32(1))
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

    def ours(params, x, norm, state, bound):
        of_layer = OfLayer(bound, jnp.int32(1))
        _, y, state = module.apply({"params": params}, x, norm, rows, of_layer, state)
        return objective(y, state)

    def where(mask_B, a, b):
        return jnp.where(mask_B.reshape(-1, *[1] * (b.ndim - 1)), a, b)

    def theirs(params, x, norm, state, bound):
        u = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * norm
        updates = []
        for t in range(T):
            before = {k: where(reset[:, t], EMPTY[k], v) for k, v in state.items()}
            update, new = EQUATIONS[name](Parameters(params, bound), u[:, t], before)
            updates.append(update)
            state = {k: where(padding[:, t], state[k], v) for k, v in new.items()}
        return objective(jnp.stack(updates, axis=1), state)

    def run(function, *args):
        return jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2, 3, 4), has_aux=True))(*args)

    found = run(ours, params, x, norm, start, bound)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a, np.float64)), (params, x, norm, start, bound)
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


def test_an_hgrn2_counts_its_state_and_its_bounds():
    """A state of 8 numbers a channel at 5 operations each; bounds in all layers but the first."""
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_layers": 3, "intermediate_size": 24}
    config = ModelConfig(mixer="hgrn2", state_expansion=8, **sizes)
    counted = count_parameters(config)
    assert counted.mixer == 3 * (4 * 256 + 16)
    assert counted.norms == 3 * (2 * 16 + 16 + 4 * 16 + 16 + 24) + 16 + 16
    assert count_flops(config, seq_len=8).mixing == 16 * (3 * (5 + 5 * 8) + 2 * 2)
    both = dataclasses.replace(config, mixer="mlgru,hgrn2", num_layers=4)
    assert count_flops(both, seq_len=8).mixing == 16 * (10 + 12 + 2 * (5 + 5 * 8 + 2))
    assert count_parameters(both).mixer == 4 * (4 * 256 + 16)
    assert config.family == "ternary-hgrn2"
    state = jax.eval_shape(lambda: init_state(config, 5)).layers["outer"]
    assert (state.shape, state.dtype) == ((3, 5, 2, 8, 8), jnp.float32)


@pytest.mark.parametrize(("width", "expansion"), [(1024, 128), (640, 128), (192, 64), (66, 2)])
def test_heads_without_a_size_divide_the_channels(width, expansion):
    config = ModelConfig(mixer="hgrn2", hidden_size=width)
    assert (config.head_expansion, config.state_heads) == (expansion, width // expansion)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"state_expansion is 96: set --model\.state-exp"):
        ModelConfig(mixer="hgrn2", state_expansion=96)
    with pytest.raises(ConfigError, match="it is HGRN2's; leave it out with mixer mingru"):
        ModelConfig(mixer="mingru", state_expansion=64)
    with pytest.raises(ConfigError, match=r"expand_ratio is 2\.0: set --model\.no-use-lower-bound"):
        ModelConfig(mixer="hgrn2", expand_ratio=2.0)
    config = TrainConfig(model=ModelConfig(mixer="hgrn2", hidden_size=384), batch_size=8)
    message = "state_expansion is 128, which makes 3 heads: set --mesh.tensor to a divisor of that"
    with pytest.raises(ConfigError, match=message):
        check_divisible(config, make_mesh(MeshConfig(tensor=2)))
    with pytest.raises(ConfigError, match=r"hgrn2 needs whole rows; set --mesh\.sequence 1"):
        check_divisible(config, make_mesh(MeshConfig(sequence=8)))
