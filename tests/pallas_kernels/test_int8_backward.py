"""The backward products in 8 bits against exact integers, float64, and the bf16 program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.bitlinear import int8_backward, int8_kernels, int8_triton
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.ternary_matmul.reference import ternarize


def _integers(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Whole numbers in int8's symmetric range."""
    return rng.integers(-127, 128, shape)


@pytest.mark.parametrize("outputs", [7, 1041, 2304])
def test_the_input_gradient_of_whole_numbers_is_exact(outputs):
    rng = np.random.default_rng(outputs)
    d_MN = _integers(rng, (5, outputs))
    d_MN[:, 0] = 127  # A row's scale is then 1, and rounding changes nothing.
    trits_NK = rng.integers(-1, 2, (outputs, 33)).astype(np.int8)
    found = int8_backward.input_gradient(
        jnp.asarray(d_MN, jnp.float32), jnp.asarray(trits_NK), jnp.float32
    )
    np.testing.assert_array_equal(found, d_MN @ trits_NK.astype(np.int64))


@pytest.mark.parametrize(("tokens", "block"), [(1, 128), (1100, 2048), (1100, 128), (300, 100)])
def test_the_weight_gradient_of_whole_numbers_is_exact(tokens, block):
    rng = np.random.default_rng(tokens)
    d_MN = _integers(rng, (tokens, 6))
    d_MN[::block] = 127  # The largest of each column in each block.
    x_MK = rng.integers(-128, 128, (tokens, 9)).astype(np.int8)
    found = int8_backward.weight_gradient(
        jnp.asarray(d_MN, jnp.float32),
        jnp.asarray(x_MK),
        jnp.ones((tokens, 1)),
        jnp.float32,
        block_tokens=block,
    )
    np.testing.assert_array_equal(found, d_MN.T @ x_MK.astype(np.int64))


def test_the_inputs_scales_go_into_the_incoming_gradient():
    rng = np.random.default_rng(0)
    d_MN = rng.standard_normal((256, 8))
    x_MK = rng.integers(-127, 128, (256, 16)).astype(np.int8)
    scale_M1 = np.exp(rng.standard_normal((256, 1)))
    exact = d_MN.T @ (x_MK * scale_M1)
    found = int8_backward.weight_gradient(
        jnp.asarray(d_MN, jnp.float32), jnp.asarray(x_MK), jnp.asarray(scale_M1), jnp.float32
    )
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.03  # Rounded, and not much: half a step of 127 a value.


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(bad):
    d_MN = np.ones((4, 3), np.float32)
    d_MN[1, 2] = bad
    d_MN = jnp.asarray(d_MN)
    dx = int8_backward.input_gradient(d_MN, jnp.ones((3, 2), jnp.int8), jnp.float32)
    np.testing.assert_array_equal(np.isfinite(dx).all(-1), [True, False, True, True])
    dw = int8_backward.weight_gradient(
        d_MN, jnp.ones((4, 2), jnp.int8), jnp.ones((4, 1)), jnp.float32
    )
    np.testing.assert_array_equal(np.isfinite(dw).all(-1), [True, True, False])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("backward", "weights_differ"), [("int8_dx", False), ("int8", True)])
def test_gradients_are_near_those_of_the_wide_products(backward, weights_differ, gated):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    x = jax.random.normal(next(keys), (2, 60, 96 if gated else 48))
    ws = tuple(0.02 * jax.random.normal(next(keys), (n, 48)) for n in (40, 24))
    norms = tuple(1 + 0.1 * jax.random.normal(next(keys), (48,)) for _ in ws)
    quantised = [ternarize(w) for w in ws]
    cotangents = tuple(jax.random.normal(next(keys), (2, 60, w.shape[0])) for w in ws)

    def gradients(how: str):
        def outputs(x, norms, ws):
            return bitlinear_many(
                x, norms, ws, [t for t, _ in quantised], [s for _, s in quantised], eps=1e-6,
                gated=gated, backward=how,
            )  # fmt: skip

        return jax.vjp(outputs, x, norms, ws)[1](cotangents)

    wide, narrow = gradients("bf16"), gradients(backward)
    for a, b in zip(jax.tree.leaves(wide[:2]), jax.tree.leaves(narrow[:2]), strict=True):
        assert 1e-5 < jnp.linalg.norm(a - b) / jnp.linalg.norm(a) < 0.03
    for a, b in zip(wide[2], narrow[2], strict=True):
        error = jnp.linalg.norm(a - b) / jnp.linalg.norm(a)
        assert error < 0.03
        assert (error > 1e-5) == weights_differ


def test_unknown_and_senseless_options_are_refused():
    w = jnp.ones((4, 8))
    trits, scale = ternarize(w)
    x = jnp.ones((2, 8))
    with pytest.raises(ValueError, match=r"backward='fp8' is unknown; choose one of bf16"):
        bitlinear_many(x, None, (w,), (trits,), (scale,), eps=1e-6, backward="fp8")
    with pytest.raises(ValueError, match="needs int8_activations"):
        bitlinear_many(
            x, None, (w,), (trits,), (scale,), eps=1e-6, backward="int8", int8_activations=False
        )


def _uneven_gradient(m: int, n: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(m + n)
    d_MN = rng.standard_normal((m, n)) * np.exp(rng.standard_normal((m, 1)))
    return jnp.asarray(d_MN, jnp.bfloat16), jnp.asarray(np.exp(rng.standard_normal(m)), jnp.float32)


@pytest.mark.parametrize(("m", "n"), [(256, 384), (64, 128), (1100, 131)])
def test_the_kernel_rounds_rows_as_the_definition_does(m, n):
    d_MN, x_scale_M = _uneven_gradient(m, n)
    q_MN, scale_M, largest_N = int8_triton.quantize_rows(d_MN, x_scale_M, interpret=True)
    expected_q, expected_scale = int8_backward.quantize(d_MN, -1)
    np.testing.assert_array_equal(q_MN, expected_q)
    np.testing.assert_allclose(scale_M, expected_scale[:, 0], rtol=1e-6)
    folded_MN = np.asarray(d_MN, np.float32) * np.asarray(x_scale_M)[:, None]
    np.testing.assert_array_equal(largest_N, np.abs(folded_MN).max(0))
    without = int8_triton.quantize_rows(d_MN, None, interpret=True)
    np.testing.assert_array_equal(without[0], q_MN)
    assert without[2] is None


@pytest.mark.parametrize(("m", "n"), [(64, 128), (192, 384)])
def test_the_kernel_rounds_columns_into_the_transpose(m, n):
    d_MN, x_scale_M = _uneven_gradient(m, n)
    folded_MN = d_MN.astype(jnp.float32) * x_scale_M[:, None]
    expected_q, expected_scale = int8_backward.quantize(folded_MN, 0)
    q_NM, scale_N = int8_triton.quantize_columns(
        d_MN, x_scale_M, jnp.abs(folded_MN).max(0), interpret=True
    )
    np.testing.assert_array_equal(q_NM, np.asarray(expected_q).T)
    np.testing.assert_allclose(scale_N, expected_scale[0], rtol=1e-6)
    np.testing.assert_array_equal(
        int8_triton.transpose(expected_q, interpret=True), np.asarray(expected_q).T
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_kernels_mark_rows_and_columns_that_are_not_finite(bad):
    d_MN, x_scale_M = _uneven_gradient(64, 128)
    d_MN = d_MN.at[5, 7].set(bad)
    _, scale_M, largest_N = int8_triton.quantize_rows(d_MN, x_scale_M, interpret=True)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scale_M)), [5])
    _, scale_N = int8_triton.quantize_columns(d_MN, x_scale_M, largest_N, interpret=True)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(scale_N)), [7])


def test_the_kernels_take_the_sizes_that_they_were_made_for():
    named = {"implementation": "pallas_mosaic_gpu"}
    assert int8_kernels.fit(16384, 11264, 2048, **named)
    assert not int8_kernels.fit(16384, 11264, 2048, implementation="xla_int8")
    assert not int8_kernels.fit(100, 11264, 2048, **named)  # Rows of a tile that is turned.
    assert not int8_kernels.fit(16384, 1000, 2048, **named)
    # So many products of -128 by -128 overflow an int32 sum.
    assert not int8_kernels.fit(131072, 1024, 1024, **named)
    assert not int8_kernels.fit(16384, 1024, 1024, implementation=None)  # No Hopper here.


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu", "pallas_tpu"])
def test_the_norms_backward_gives_the_quantised_inputs_of_the_forward(implementation, gated):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (6, 256 if gated else 128))
    weights = tuple(1 + 0.1 * jax.random.normal(key, (128,)) for key in keys[1:3])
    gradients = (jax.random.normal(keys[3], (6, 128)),) * 2
    ones = (jnp.ones((1, 1)),) * 2
    options = {"implementation": implementation, "interpret": True, "gated": gated}
    _, qs, _, stats = norm_quant.norm_quant(x, weights, eps=1e-6, **options)
    inputs = norm_quant.norm_backward(
        x, weights, None, stats, gradients, ones, eps=1e-6, input_dtype=jnp.int8, **options
    )[3]
    for found, q in zip(inputs, qs, strict=True):
        assert found.dtype == jnp.int8
        np.testing.assert_array_equal(found, q)
