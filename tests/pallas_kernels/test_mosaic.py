"""The kernels in Pallas Mosaic GPU, under JAX's interpreter, against XLA's and the definition.

The interpreter runs the copies and their barriers, but knows no layouts of registers: that these
are found, for every width of the models, `test_aot.py` tells.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels import mosaic
from mmfree_jax.pallas_kernels.cross_entropy import pallas_gpu as cross_entropy
from mmfree_jax.pallas_kernels.cross_entropy import reference as softmax
from mmfree_jax.pallas_kernels.errors import MosaicError
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.norm_quant import pallas_gpu as norms
from mmfree_jax.pallas_kernels.recurrence import pallas_gpu as recurrence
from mmfree_jax.pallas_kernels.recurrence import reference
from mmfree_jax.pallas_kernels.recurrence import xla as recurrence_xla

WIDE = 128


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture
def plan(monkeypatch):
    """Sets how many rows a program works on at a time."""

    def with_rows(rows):
        chosen = norms.Plan(rows, stages=2, blocks=1)
        monkeypatch.setattr(norms, "_plan", lambda k, backward: chosen)
        monkeypatch.setattr(mosaic, "MULTIPROCESSORS", 2)  # Each with several groups of rows.

    return with_rows


# Three groups of four rows for two programs, the last not full.
@pytest.mark.parametrize(
    ("form", "consumers", "rows", "input_dtype"),
    [
        ("residual", 2, 2, None),
        ("times_silu", 1, 1, jnp.int8),
        ("gated", 1, 4, None),
        ("plain", 0, 1, None),
    ],
)
def test_norms_equal_xlas(form, consumers, rows, input_dtype, plan):
    plan(rows)
    # XLA rounds a gated product to x's type before the norm.
    dtype = jnp.float32 if form in ("plain", "gated") else jnp.bfloat16
    x = normal(10, 2 * WIDE if form == "gated" else WIDE, dtype=dtype)
    weights = tuple(1 + 0.2 * normal(WIDE, seed=j + 1) for j in range(consumers)) or (None,)
    outer = 1 + 0.2 * normal(WIDE, seed=9) if form in ("residual", "times_silu") else None
    beside = normal(10, WIDE, dtype=dtype, seed=4)
    options = {"gated": {"gated": True}, "times_silu": {"times_silu": beside}}.get(form, {})
    added = form == "residual"
    gradients = tuple(normal(10, WIDE, dtype=dtype, seed=20 + j) for j in range(len(weights)))
    scales = tuple(jnp.full((1, 1), 0.2 + 0.3 * j) for j in range(len(weights)))

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, x):
        how = {"implementation": implementation, "interpret": True, **options}
        forward = norm_quant.norm_quant(
            x, weights, outer, eps=0.1, residual=beside if added else None, **how
        )
        return forward, norm_quant.norm_backward(
            forward[0], weights, outer, forward[3], gradients, scales, eps=0.1,
            d_skip=beside if added else None, input_dtype=input_dtype, **how,
        )  # fmt: skip

    got, expected = both("pallas_gpu", x), both("xla", x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
        assert relative_rms(g, e) < (1e-5 if dtype == jnp.float32 else 2e-3)
    if form == "plain":
        np.testing.assert_array_equal(got[0][1][0], expected[0][1][0])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_nan_stays_in_its_row(rows, plan):
    plan(rows)
    x = normal(8, WIDE).at[3, 100].set(jnp.nan)
    weight = jnp.ones(WIDE)
    scales = norm_quant.norm_quant(
        x, (weight,), weight, eps=1e-6, implementation="pallas_gpu", interpret=True
    )[2][0]
    np.testing.assert_array_equal(jnp.flatnonzero(jnp.isnan(scales[:, 0])), [3])


# 37 steps: two tiles of 16 and a part of a third.
@pytest.mark.parametrize("optional", [False, True])
def test_the_mlgru_equals_the_definition(optional):
    B, T, D = 2, 37, 32
    i, f, dh = (normal(B, T, D, seed=seed) for seed in range(3))
    bound = jnp.linspace(0, 0.9, D) if optional else None
    reset = jnp.asarray(np.random.default_rng(3).random((B, T)) < 0.2) if optional else None
    h0 = normal(B, D, seed=4) if optional else None
    dh_last = normal(B, D, seed=5)
    config = recurrence.Config(unroll=4, channels=32, stages=2)
    expected = reference.mlgru_recurrence(i, f, bound, reset_BT=reset, h0_BD=h0)
    got = jax.jit(
        lambda: recurrence.mlgru_forward(i, f, bound, reset, h0, config=config, interpret=True)
    )()
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)
    arguments = (i, f, bound, expected[0], reset, h0, dh, dh_last)
    expected = recurrence_xla.mlgru_backward(*arguments)
    got = jax.jit(lambda: recurrence.mlgru_backward(*arguments, config=config, interpret=True))()
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 1e-5


@pytest.mark.parametrize(
    ("unroll", "tokens", "expected"),
    [
        (16, 16, 4), (16, 32, 8), (16, 48, 4), (16, 64, 16), (16, 96, 8), (16, 192, 16),
        (32, 64, 16), (32, 192, 16), (16, 512, 16), (32, 512, 32), (32, 2048, 32),
        (16, 37, 16), (16, 80, 16), (16, 1000, 16), (32, 500, 32),
    ],
)  # fmt: skip
def test_stretches_are_as_long_as_a_short_row_has_steps(unroll, tokens, expected):
    config = recurrence.Config(unroll=unroll, stages=3)
    assert recurrence.even(config, tokens) == recurrence.Config(unroll=expected, stages=3)


@pytest.mark.parametrize("tokens", [16, 48])
def test_short_rows_equal_the_definition(tokens):
    B, D = 1, 32
    i, f, h0 = normal(B, tokens, D), normal(B, tokens, D, seed=1), normal(B, D, seed=2)
    held = jnp.arange(tokens)[None] >= tokens - 5
    expected = reference.mlgru_recurrence(i[:, :-5], f[:, :-5], None, h0_BD=h0)
    states, last = jax.jit(
        lambda: recurrence.mlgru_forward(i, f, None, None, h0, held_BT=held, interpret=True)
    )()
    np.testing.assert_allclose(states[:, :-5], expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last, expected[1], rtol=1e-5, atol=1e-6)


def test_the_recurrence_equals_the_definition():
    B, T, D = 1, 16, 64
    f, x, dh = jax.nn.sigmoid(normal(B, T, D)), normal(B, T, D, seed=1), normal(B, T, D, seed=2)
    config = recurrence.Config(unroll=2, channels=64, stages=3)
    expected = reference.linear_recurrence(f, x)
    got = jax.jit(lambda: recurrence.forward(f, x, None, None, config=config, interpret=True))()
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-5, atol=1e-6)
    arguments = (f, expected[0], None, None, dh, jnp.ones((B, D)))
    got = jax.jit(lambda: recurrence.backward(*arguments, config=config, interpret=True))()
    for g, e in zip(got, recurrence_xla.backward(*arguments), strict=True):
        assert relative_rms(g, e) < 1e-5


# Six rows for two programs of four, in pieces that the ring holds less than two rows of.
def test_rows_of_logits_equal_the_definition(monkeypatch):
    monkeypatch.setattr(cross_entropy, "_WIDEST", WIDE)
    monkeypatch.setattr(cross_entropy, "_MOST_SLOTS", 5)
    P, V = 6, 3 * WIDE
    # Of equals the first counts: here two of one thread, in two pieces.
    logits = (2 * normal(P, V)).at[4, 7].set(jnp.nan)
    logits = logits.at[1, 10].set(9.0).at[1, 10 + WIDE].set(9.0)
    targets = jnp.asarray([-1, 10, 5, 200, 7, 300])
    loss, correct, lse, gradient = jax.jit(
        lambda: cross_entropy.softmax_rows(logits, targets, 1e-2, jnp.float32, interpret=True)
    )()
    expected = softmax.cross_entropy(logits, targets, z_loss=1e-2)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
    np.testing.assert_allclose(lse, expected[2], rtol=1e-6)
    assert np.isnan(loss[4])
    assert correct.tolist()[:2] == [False, True]
    np.testing.assert_array_equal(np.delete(correct, 4), np.delete(expected[1], 4))
    slope = jax.grad(lambda x: softmax.cross_entropy(x, targets, z_loss=1e-2)[0].sum())(logits)
    np.testing.assert_allclose(np.delete(gradient, 4, 0), np.delete(slope, 4, 0), atol=1e-6)
    assert np.isnan(gradient[4]).all()


def test_shapes_that_do_not_fit_are_named():
    x = jnp.ones((4, 100))
    with pytest.raises(MosaicError, match="100 columns are no multiple of 128"):
        norm_quant.norm_quant(x, (jnp.ones(100),), eps=1e-6, implementation="pallas_gpu")
    with pytest.raises(MosaicError, match="48 channels are no multiple of 32"):
        recurrence.forward(jnp.ones((1, 8, 48)), jnp.ones((1, 8, 48)), None, None)
    with pytest.raises(MosaicError, match="a row of 65536 logits does not fit"):
        cross_entropy.softmax_rows(jnp.ones((1, 65536)), jnp.zeros(1, jnp.int32), 0.0, None)


@pytest.mark.parametrize("capability", [8.9, 10.0])
def test_a_gpu_that_is_no_hopper_is_refused(capability, monkeypatch):
    monkeypatch.setattr(mosaic, "compute_capability", lambda: capability)
    with pytest.raises(MosaicError, match=r"compute capability 9\.0, which cpu is not"):
        recurrence.forward(jnp.ones((1, 8, 64)), jnp.ones((1, 8, 64)), None, None)
