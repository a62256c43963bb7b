"""The textbook BitLinear: straight-through quantisers around a dense product.

The quantisers themselves are defined once, in `pallas_kernels`; here they get their
gradient. `mmfree_jax.pallas_kernels.bitlinear` computes the same layer in less memory and time,
and is tested against this one.
"""

import jax
import jax.numpy as jnp

from mmfree_jax.model_config import WeightScale
from mmfree_jax.pallas_kernels.norm_quant.api import quantize_int8, rms_norm
from mmfree_jax.pallas_kernels.ternary_matmul.api import scaled, ternarize, ternarize_groups


@jax.custom_jvp
def straight_through(x: jax.Array, quantized: jax.Array) -> jax.Array:
    """`quantized`, with the gradient of the identity in `x` (Bengio et al., arXiv 1308.3432)."""
    del x
    return quantized


@straight_through.defjvp
def _straight_through_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    _, quantized = primals
    x_dot, _ = tangents
    return quantized, x_dot.astype(quantized.dtype)


def fake_quantize_int8(x: jax.Array, strength: jax.Array | None = None) -> jax.Array:
    """[..., K] rounded to each token's int8 grid, in x's dtype; gradient straight through.

    Args:
      x: what is rounded.
      strength: how far, from 0 (not at all) to 1, as by None.
    """
    q, scale = quantize_int8(jax.lax.stop_gradient(x))
    return _towards(x, q.astype(jnp.float32) * scale, strength)


def fake_ternarize(
    w: jax.Array,
    weight_scale: WeightScale = "matrix",
    log_scale: jax.Array | None = None,
    strength: jax.Array | None = None,
) -> jax.Array:
    """[..., N, K] rounded to {-s, 0, s}, s by `ternarise`; gradient straight through.

    `strength` as in `fake_quantize_int8`.
    """
    trits, scale = ternarise(jax.lax.stop_gradient(w), weight_scale, log_scale)
    if log_scale is not None:
        w = hand_to_scale(w, log_scale, scale)
    return _towards(w, scaled(trits, scale), strength)


def _towards(x: jax.Array, quantized: jax.Array, strength: jax.Array | None) -> jax.Array:
    """x + strength (quantized - x), in x's dtype; gradient straight through."""
    if strength is not None:
        wide = x.astype(jnp.float32)
        quantized = wide + strength * (quantized - wide)
    return straight_through(x, quantized.astype(x.dtype))


def ternarise(
    w: jax.Array, weight_scale: WeightScale, log_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Trits and scales of a float weight, without a gradient.

    Args:
      w: [..., N, K].
      weight_scale: see `ModelConfig`.
      log_scale: [..., 1, 1], the logarithm of a learnt scale over the mean magnitude; None: 0.

    Returns:
      [..., N, K] int8, and float32 [..., 1, 1], or [..., N, K / 128] for groups.
    """
    if weight_scale == "groups":
        return ternarize_groups(w)
    return ternarize(w, None if log_scale is None else jax.lax.stop_gradient(log_scale))


@jax.custom_vjp
def hand_to_scale(w: jax.Array, log_scale: jax.Array, scale: jax.Array) -> jax.Array:
    """w, whose gradient, that of the rounded weight, is handed to its learnt scale too.

    Learned step size quantisation (Esser et al., arXiv 1902.08153, equation 3): with u = w / s the
    rounded weight moves with s by round(u) - u where |u| < 1, and by the sign of u beyond. Its
    factor of the gradient is left out, as AdamW's steps do not depend on it, and the weight's own
    gradient stays straight through everywhere, as with the other scales. The mean magnitude that
    s is a multiple of counts as a constant.

    Args:
      w: [..., N, K].
      log_scale: [..., 1, 1], of s over the mean magnitude.
      scale: [..., 1, 1], s.
    """
    del log_scale, scale
    return w


def _hand_to_scale_forward(
    w: jax.Array, log_scale: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return w, (w, log_scale, scale)


def _hand_to_scale_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], d: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    w, log_scale, scale = residuals
    u = w.astype(jnp.float32) / scale
    slope = jnp.where(jnp.abs(u) < 1, jnp.round(u) - u, jnp.sign(u))
    d_scale = jnp.sum(d.astype(jnp.float32) * slope, axis=(-2, -1), keepdims=True)
    return d, (d_scale * scale).astype(log_scale.dtype), jnp.zeros_like(scale)


hand_to_scale.defvjp(_hand_to_scale_forward, _hand_to_scale_backward)


def linear(
    x: jax.Array,
    weight: jax.Array,
    norm_scale: jax.Array | None,
    *,
    eps: float,
    ternary_weights: bool,
    int8_activations: bool,
    strength: jax.Array | None = None,
    weight_scale: WeightScale = "matrix",
    log_scale: jax.Array | None = None,
) -> jax.Array:
    """Q8(RMSNorm(x)) @ T(W)^T (arXiv 2406.02528, section 3.2), each part optional.

    Args:
      x: [..., K] in the compute dtype.
      weight: [N, K] master weights.
      norm_scale: [K], the layer's own RMSNorm; None leaves the norm out.
      eps: of that norm.
      ternary_weights: round the weights.
      int8_activations: round the input,
      strength: so far, see `fake_quantize_int8`; weights are rounded wholly.
      weight_scale, log_scale: of the rounded weights, see `ternarise`.

    Returns:
      [..., N] in x's dtype.
    """
    dtype = x.dtype
    if norm_scale is not None:
        x = rms_norm(x, norm_scale, eps=eps)
    if int8_activations:
        x = fake_quantize_int8(x, strength)
    if ternary_weights:
        weight = fake_ternarize(weight, weight_scale, log_scale)
    return product(x.astype(dtype), weight)


@jax.custom_vjp
def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x @ W^T for x [..., K] and W [N, K], all three products in x's dtype, sums in float32.

    The derivative that JAX would take of it multiplies float32 cotangents, at half the speed or
    less. Here they are rounded to x's dtype, and the weight's gradient is not rounded at all.
    """
    return _contract(x, weight.astype(x.dtype), (x.ndim - 1, 1)).astype(x.dtype)


def _product_forward(
    x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    rounded = weight.astype(x.dtype)
    like = jnp.zeros((), weight.dtype)
    return _contract(x, rounded, (x.ndim - 1, 1)).astype(x.dtype), (x, rounded, like)


def _product_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, rounded, like = residuals
    dx = _contract(dy, rounded, (dy.ndim - 1, 0)).astype(x.dtype)
    rows = tuple(range(x.ndim - 1))
    dw = _contract(dy, x, (rows, rows)).astype(like.dtype)
    return dx, dw


product.defvjp(_product_forward, _product_backward)


def _contract(
    a: jax.Array, b: jax.Array, axes: tuple[int | tuple[int, ...], int | tuple[int, ...]]
) -> jax.Array:
    """The product over the axes given, of a and of b, with sums in float32 or wider."""
    of_a, of_b = ((x,) if isinstance(x, int) else x for x in axes)
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, ((of_a, of_b), ((), ())), preferred_element_type=wide)
