"""RWKV-4's weighted average: its definition by the printed sums, the op by its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.wkv import reference, xla
from mmfree_jax.pallas_kernels.wkv.api import NOTHING, wkv


def make_inputs(shape, *, optional, spread=2.0):
    """Float64 arrays of [B, T, D]; state and resets only when `optional`."""
    B, T, D = shape
    rng = np.random.default_rng(sum(shape))
    arrays = {
        "k": rng.normal(0, spread, shape),
        "v": rng.normal(size=shape),
        "decay": rng.uniform(0.01, 3, D),
        "bonus": rng.normal(size=D),
    }
    reset = None
    if optional:
        arrays |= {"average": rng.normal(size=(B, D)), "log_weight": rng.normal(size=(B, D))}
        reset = jnp.asarray(rng.random((B, T)) < 0.2).at[0, 0].set(True)
    cotangents = (rng.normal(size=shape), rng.normal(size=(B, D)), rng.normal(size=(B, D)))
    return arrays, reset, cotangents


def run(function, arrays, reset, cotangents, dtype, **options):
    """Outputs and gradients by name."""

    def of(p):
        return function(
            p["k"],
            p["v"],
            p["decay"],
            p["bonus"],
            average_BD=p.get("average"),
            log_weight_BD=p.get("log_weight"),
            reset_BT=reset,
            **options,
        )

    @jax.jit
    def both(p, cotangents):
        outputs, pullback = jax.vjp(of, p)
        return outputs, pullback(cotangents)[0]

    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (arrays, cotangents))
    return both(*cast)


@pytest.mark.parametrize(("shape", "optional"), [((2, 13, 5), True), ((1, 1, 3), False)])
def test_the_definition_is_the_printed_sums(shape, optional):
    arrays, reset, _ = make_inputs(shape, optional=optional)
    with jax.enable_x64(True):
        out, average, log_weight = reference.wkv(
            *(jnp.asarray(arrays[name]) for name in ("k", "v", "decay", "bonus")),
            average_BD=arrays.get("average"),
            log_weight_BD=arrays.get("log_weight"),
            reset_BT=reset,
        )
    B, T, _ = shape
    k, v, w, u = (arrays[name] for name in ("k", "v", "decay", "bonus"))
    for b in range(B):
        for t in range(T + 1):  # at T what is left after the last step
            resets = np.flatnonzero(reset[b, : t + 1]) if optional else []
            begin = max(resets, default=0)
            weights = [np.exp(k[b, i] - (t - 1 - i) * w) for i in range(begin, t)]
            values = list(v[b, begin:t])
            if optional and not len(resets):
                weights.append(np.exp(arrays["log_weight"][b] - t * w))
                values.append(arrays["average"][b])
            if t < T:
                weights.append(np.exp(k[b, t] + u))
                values.append(v[b, t])
            found = out[b, t] if t < T else average[b]
            total = np.sum(weights, axis=0)
            np.testing.assert_allclose(found, np.sum(np.multiply(weights, values), 0) / total)
            if t == T:
                # After the last step nothing has faded since: one decay less than before a step.
                np.testing.assert_allclose(log_weight[b], np.log(total))


@pytest.mark.parametrize(
    ("shape", "optional"), [((2, 37, 5), True), ((3, 8, 1), False), ((1, 1, 7), True)]
)
def test_values_and_gradients_are_those_of_float64(shape, optional, monkeypatch):
    arrays, reset, cotangents = make_inputs(shape, optional=optional)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float32), (arrays, cotangents))
    with jax.enable_x64(True):
        expected = run(reference.wkv, rounded[0], reset, rounded[1], jnp.float64)
    found = run(wkv, rounded[0], reset, rounded[1], jnp.float32)
    compare(found, expected)
    scanned = []

    def scan(*operands):  # what accelerators run
        scanned.append(True)
        return xla._scan(*operands)

    monkeypatch.setattr(xla, "_loop", scan)
    compare(run(wkv, rounded[0], reset, rounded[1], jnp.float32), expected)
    assert bool(scanned) == (shape[1] > 1)


def compare(found, expected):
    def close(a, b):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a / scale, b / scale, atol=3e-6)

    jax.tree.map(close, found, jax.tree.map(np.asarray, expected))


def test_keys_of_any_size_give_finite_averages_and_gradients():
    """A softmax of the keys as they are would overflow from 89 on."""
    arrays, reset, cotangents = make_inputs((2, 11, 3), optional=True, spread=300.0)
    outputs, gradients = run(wkv, arrays, reset, cotangents, jnp.float32)
    for x in jax.tree.leaves((outputs, gradients)):
        assert np.isfinite(x).all()
    largest = max(np.abs(arrays[name]).max() for name in ("v", "average"))
    assert np.abs(outputs[0]).max() <= largest * 1.00001  # an average


def test_padding_holds_the_state_and_half_a_row_goes_on_from_the_other():
    arrays, reset, _ = make_inputs((2, 10, 4), optional=True)
    k, v, decay, bonus, average, log_weight = (jnp.asarray(x, jnp.float32) for x in arrays.values())
    whole = wkv(k, v, decay, bonus, average_BD=average, log_weight_BD=log_weight, reset_BT=reset)
    padding = jnp.asarray([[False] * 6 + [True] * 2] * 2)
    first = wkv(
        k[:, :8],
        v[:, :8],
        decay,
        bonus,
        average_BD=average,
        log_weight_BD=log_weight,
        reset_BT=reset[:, :8] & ~padding,
        padding_BT=padding,
    )
    rest = wkv(
        k[:, 6:], v[:, 6:], decay, bonus,
        average_BD=first[1], log_weight_BD=first[2], reset_BT=reset[:, 6:],
    )  # fmt: skip
    out = jnp.concatenate([first[0][:, :6], rest[0]], axis=1)
    for a, b in zip((out, *rest[1:]), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_what_does_not_fit_is_refused():
    x = jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=r"k_BTD \(1, 2, 3\) and v_BTD \(1, 2, 4\)"):
        wkv(x, jnp.zeros((1, 2, 4)), jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"bonus_D has shape \(2,\); it must be \(3,\)"):
        wkv(x, x, jnp.ones(3), jnp.ones(2))
    nothing = wkv(x, x, jnp.ones(3), jnp.ones(3), reset_BT=jnp.asarray([[False, True]]))
    assert nothing[2].shape == (1, 3)
    assert NOTHING < -1e29
