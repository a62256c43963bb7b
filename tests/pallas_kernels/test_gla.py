"""Gated linear attention: its definition by the printed sums, the op by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.gla import reference, xla
from mmfree_jax.pallas_kernels.gla.api import gla

NAMES = ("q", "k", "v", "log_decay")


def make_inputs(shape, *, optional, fastest=3.0):
    """Float32 arrays of (B, T, H, K, V); a state and resets only when `optional`; cotangents."""
    B, T, H, K, V = shape
    rng = np.random.default_rng(sum(shape))
    arrays = {
        "q": rng.normal(size=(B, T, H, K)),
        "k": rng.normal(size=(B, T, H, K)),
        "v": rng.normal(size=(B, T, H, V)),
        "log_decay": -rng.exponential(size=(B, T, H, K)) * rng.uniform(0, fastest, (1, T, 1, K)),
    }
    reset = None
    if optional:
        arrays["state"] = rng.normal(size=(B, H, K, V))
        reset = jnp.asarray(rng.random((B, T)) < 0.1).at[0, 0].set(True)
    cotangents = (rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V)))
    return *jax.tree.map(lambda x: x.astype(np.float32), (arrays, cotangents)), reset


def run(function, arrays, cotangents, **options):
    """Outputs and gradients by name."""

    @jax.jit
    def both(arrays, cotangents):
        def of(p):
            return function(*(p[name] for name in NAMES), state_BHKV=p.get("state"), **options)

        outputs, pullback = jax.vjp(of, arrays)
        return outputs, pullback(cotangents)[0]

    return both(arrays, cotangents)


def wide(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


def compare(found, expected, tolerance=3e-6):
    def close(a, b):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=tolerance)

    jax.tree.map(close, found, jax.tree.map(np.asarray, expected))


def test_the_definition_is_the_printed_sum():
    """out_t = sum_{i <= t} (q_t . prod_{i < j <= t} decay_j . k_i) v_i within a document."""
    (B, T, H, K, V) = shape = (2, 6, 2, 3, 4)
    arrays, _, reset = make_inputs(shape, optional=True)
    with jax.enable_x64(True):
        operands = [wide(arrays[name]) for name in NAMES]
        out, last = reference.gla(*operands, state_BHKV=wide(arrays["state"]), reset_BT=reset)
    q, k, v, log_decay, start = (np.float64(arrays[name]) for name in (*NAMES, "state"))
    for b in range(B):
        for t in range(T):
            resets = np.flatnonzero(reset[b, : t + 1])
            begin = max(resets, default=0)
            state = np.zeros((H, K, V))
            if not len(resets):
                state += np.exp(log_decay[b, : t + 1].sum(0))[..., None] * start[b]
            for i in range(begin, t + 1):
                key = k[b, i] * np.exp(log_decay[b, i + 1 : t + 1].sum(0))
                state += np.einsum("hk,hv->hkv", key, v[b, i])
            np.testing.assert_allclose(out[b, t], np.einsum("hk,hkv->hv", q[b, t], state))
        np.testing.assert_allclose(last[b], state)


@pytest.mark.parametrize(
    ("shape", "optional"),
    [
        ((2, 77, 2, 5, 3), True),  # two chunks, the second filled up
        ((2, 100, 1, 64, 64), True),  # crashed XLA's CPU compiler in another form of the sums
        ((2, 11, 3, 4, 1), True),  # a chunk of its own size
        ((2, 1, 2, 3, 5), True),  # the one-token form
    ],
)
def test_values_and_gradients_are_those_of_float64(shape, optional):
    arrays, cotangents, reset = make_inputs(shape, optional=optional)
    with jax.enable_x64(True):
        expected = run(reference.gla, wide(arrays), wide(cotangents), reset_BT=reset)
    compare(run(gla, arrays, cotangents, reset_BT=reset), expected)


def test_decays_of_any_size_neither_overflow_nor_lose_what_follows():
    """A chunk's decays, taken from its start alone, would reach e^-3000 and its inverse e^3000."""
    arrays, cotangents, _ = make_inputs((1, 70, 1, 4, 3), optional=True)
    fast = np.where(np.arange(70) % 3 == 0, 0, -60.0)[None, :, None, None]
    slow = np.where(np.arange(70) < 40, -60.0, -1e-3)[None, :, None, None]
    log_decay = np.concatenate([fast, slow, slow / 60, 0 * slow], axis=-1).astype(np.float32)
    arrays["log_decay"] = log_decay
    with jax.enable_x64(True):
        expected = run(reference.gla, wide(arrays), wide(cotangents))
    found = run(gla, arrays, cotangents)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    compare(found, expected)
    nothing_passes = np.where(log_decay <= -60, -np.inf, log_decay)
    shut, gradients = run(gla, arrays | {"log_decay": nothing_passes}, cotangents)
    compare(shut, expected[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_padding_holds_the_state_and_half_a_row_goes_on_from_the_other():
    arrays, _, reset = make_inputs((2, 10, 2, 3, 4), optional=True)
    steps = [jnp.asarray(arrays[name]) for name in NAMES]
    compiled = jax.jit(gla)
    out, last = compiled(*steps, state_BHKV=arrays["state"], reset_BT=reset)
    padding = jnp.asarray([[False] * 6 + [True] * 2] * 2)
    first, middle = compiled(
        *(x[:, :8] for x in steps),
        state_BHKV=arrays["state"],
        reset_BT=reset[:, :8] & ~padding,
        padding_BT=padding,
    )
    rest, end = compiled(*(x[:, 6:] for x in steps), state_BHKV=middle, reset_BT=reset[:, 6:])
    found = jnp.concatenate([first[:, :6], rest], axis=1)
    compare((found, end), (out, last))


def test_the_chunked_form_meets_its_boundaries_wherever_they_lie(monkeypatch):
    """Chunks of 8 steps: many states between them, resets on both sides of an edge."""
    arrays, cotangents, _ = make_inputs((1, 37, 1, 3, 2), optional=True)
    reset = jnp.zeros((1, 37), bool).at[0, jnp.asarray([7, 16, 31])].set(True)
    with jax.enable_x64(True):
        expected = run(reference.gla, wide(arrays), wide(cotangents), reset_BT=reset)
    monkeypatch.setattr(xla, "CHUNK", 8)
    compare(run(gla, arrays, cotangents, reset_BT=reset), expected)


def test_what_does_not_fit_is_refused():
    x, wider = jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 3, 5))
    assert gla(x, x, wider, x)[1].shape == (1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"log_decay_BTHK has shape \(1, 2, 3, 5\); it must be"):
        gla(x, x, x, wider)
    with pytest.raises(ValueError, match=r"state_BHKV has shape \(1, 3, 4, 4\); it must be"):
        gla(x, x, wider, x, state_BHKV=jnp.zeros((1, 3, 4, 4)))
    with pytest.raises(ValueError, match="splits time"):
        gla(x, x, x, x, partition=jax.sharding.PartitionSpec("data", "sequence", "tensor"))
