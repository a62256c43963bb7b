"""BitLinear in plain jnp, differentiable by JAX itself: the definition and the oracle."""

import jax
import jax.numpy as jnp

from ..norm_quant.reference import quantize_int8, rms_norm
from ..ternary_matmul.reference import ternarize


def straight_through(value: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized` in the forward, the identity on `value` in the backward."""
    return value + jax.lax.stop_gradient(quantized - value)


def bitlinear(
    x: jax.Array,
    norm_weight: jax.Array | None,
    w: jax.Array,
    *,
    eps: float,
    int8_activations: bool = True,
) -> jax.Array:
    """Q8(RMSNorm(x)) @ T(W)^T with straight-through gradients (arXiv 2406.02528, section 3.2).

    Args:
      x: [..., K], any float dtype; the arithmetic is float32.
      norm_weight: [K]; None leaves the norm out.
      w: [N, K] float master weights.
      eps: the norm's.
      int8_activations: False leaves the activations' quantiser out.

    Returns:
      [..., N] float32.
    """
    n = x.astype(jnp.float32)
    if norm_weight is not None:
        n = rms_norm(n, norm_weight, eps=eps)
    if int8_activations:
        q, scale = quantize_int8(n)
        n = straight_through(n, q * scale)
    w = w.astype(jnp.float32)
    trits, w_scale = ternarize(w)
    w = straight_through(w, trits * w_scale)
    return jnp.matmul(n, w.T, precision=jax.lax.Precision.HIGHEST)
