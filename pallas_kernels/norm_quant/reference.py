"""RMSNorm and per-token int8 quantisation in plain jnp: the definition and the oracle."""

import jax
import jax.numpy as jnp

from ..keep_nan import largest_along

MIN_ABSMAX = 1e-5
"""The absmax below which a token counts as zero; it bounds the quantiser's gain."""


def inverse_rms(x: jax.Array, *, eps: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis: [..., K] -> [..., 1] float32."""
    x = x.astype(jnp.float32)
    return jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    Args:
      x: [..., K], any float dtype.
      weight: [K], the learned scale.
      eps: added to the mean square.

    Returns:
      [..., K] float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
      >>> rms_norm(jnp.array([2.0, -2.0]), jnp.array([1.0, 3.0]), eps=0.0)
      Array([ 1., -3.], dtype=float32)
    """
    x = x.astype(jnp.float32)
    return x * inverse_rms(x, eps=eps) * weight.astype(jnp.float32)


def token_absmax(x: jax.Array) -> jax.Array:
    """max(max|x|, 1e-5) over the last axis: [..., K] -> [..., 1] float32; inf where one is NaN."""
    return jnp.maximum(largest_along(x.astype(jnp.float32), -1), MIN_ABSMAX)


def round_to_int8(x: jax.Array, absmax: jax.Array) -> jax.Array:
    """clip(round(x 127 / absmax), -128, 127), halves to even: [..., K] int8."""
    return jnp.clip(jnp.round(x * (127.0 / absmax)), -128, 127).astype(jnp.int8)


def quantize_int8(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises each token to int8 by its largest magnitude (arXiv 2406.02528, section 3.2).

    With s = 127 / max(max|x|, 1e-5), q = clip(round(x s), -128, 127), rounding halves to even.

    Args:
      x: [..., K], any float dtype; the arithmetic is float32.

    Returns:
      q: [..., K] int8.
      scale: [..., 1] float32, equal to 1 / s, so that x is about q * scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.norm_quant.api import quantize_int8
      >>> q, scale = quantize_int8(jnp.array([[0.5, -2.54, 0.01]]))
      >>> q
      Array([[  25, -127,    0]], dtype=int8)
      >>> scale.shape, round(float(scale[0, 0]), 4)
      ((1, 1), 0.02)
    """
    x = x.astype(jnp.float32)
    absmax = token_absmax(x)
    return round_to_int8(x, absmax), absmax / 127.0


def norm_quantize(x: jax.Array, weight: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """`quantize_int8(rms_norm(x, weight))`: what stands in front of every ternary product.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.norm_quant.api import norm_quantize
      >>> norm_quantize(jnp.array([3.0, -4.0]), jnp.ones(2), eps=1e-6)[0]
      Array([  95, -127], dtype=int8)
    """
    return quantize_int8(rms_norm(x, weight, eps=eps))
