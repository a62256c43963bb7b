"""The dense product of float layers: its derivative, and the dtypes that it multiplies."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.model.quantize import product


def operands(shape, dtype, features=5, weight_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    w = jnp.asarray(rng.normal(size=(features, shape[-1])), weight_dtype)
    return x, w, jnp.asarray(rng.normal(size=(*shape[:-1], features)), dtype)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
def test_the_derivative_is_that_of_the_product(shape):
    x, w, dy = operands(shape, jnp.float32)
    y, back = jax.vjp(product, x, w)
    expected, exact = jax.vjp(lambda x, w: x @ w.T, x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(back(dy), exact(dy), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
def test_all_three_products_are_of_the_compute_dtype(weight_dtype):
    x, w, dy = operands((2, 4, 3), jnp.bfloat16, weight_dtype=weight_dtype)

    def both(x, w, dy):
        y, back = jax.vjp(product, x, w)
        return y, *back(dy)

    text = jax.jit(both).lower(x, w, dy).as_text()
    dots = re.findall(r"dot_general.*: \((tensor<\S+>), (tensor<\S+>)\) -> (tensor<\S+>)", text)
    assert len(dots) == 3
    for a, b, out in dots:
        assert a.endswith("xbf16>")
        assert b.endswith("xbf16>")
        assert out.endswith("xf32>")
    y, dx, dw = both(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, weight_dtype)
    exact = jnp.einsum("btn,btk->nk", *(a.astype(jnp.float32) for a in (dy, x)))
    tolerance = 1e-6 if weight_dtype == jnp.float32 else 1e-2  # the weight's gradient: unrounded
    np.testing.assert_allclose(dw.astype(jnp.float32), exact, rtol=tolerance, atol=tolerance)
