"""Ternary weights and their product with int8 activations in plain jnp: the oracle."""

import jax
import jax.numpy as jnp

# The mean magnitude below which a matrix counts as zero; it bounds the quantiser's gain.
MIN_ABSMEAN = 1e-5


GROUP = 128
"""Inputs of an output that share a scale where a matrix has more than one."""


def ternarize_groups(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`ternarize` with a scale for each `GROUP` inputs of each output.

    Args:
      w: [..., N, K] float weights, K a multiple of GROUP.

    Returns:
      trits: [..., N, K] int8 in {-1, 0, +1}.
      scale: [..., N, K / GROUP] float32.
    """
    rows = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, GROUP)
    scale = jnp.maximum(jnp.mean(jnp.abs(rows), axis=-1), MIN_ABSMEAN)
    trits = jnp.clip(jnp.round(rows * (1.0 / scale)[..., None]), -1, 1).astype(jnp.int8)
    return trits.reshape(w.shape), scale


def scaled(trits: jax.Array, scale: jax.Array) -> jax.Array:
    """trits * scale in float32, [..., N, K], for one scale a matrix or one a group."""
    if scale.shape[-2:] == (1, 1) or scale.size == 1:
        return trits * scale
    return trits * jnp.repeat(scale, GROUP, axis=-1)


def ternarize(w: jax.Array, log_factor: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Rounds a matrix to {-1, 0, +1} times one scale (arXiv 2406.02528, section 3.1).

    With s = 1 / max(mean|W|, 1e-5), t = clip(round(W s), -1, 1), rounding halves to even.
    The mean is over the whole matrix: under a sharded jit it is a global reduction.
    Not idempotent: ternarising t * scale again keeps t and shrinks the scale.

    Args:
      w: [..., N, K] float weights, one matrix for each leading index.
      log_factor: [..., 1, 1]; the scale is the mean times its exponential. None: the mean.

    Returns:
      trits: [..., N, K] int8 in {-1, 0, +1}.
      scale: [..., 1, 1] float32, equal to 1 / s, so that w is about trits * scale.
    """
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.mean(jnp.abs(w), axis=(-2, -1), keepdims=True), MIN_ABSMEAN)
    if log_factor is not None:
        scale = scale * jnp.exp(log_factor.astype(jnp.float32))
    trits = jnp.clip(jnp.round(w * (1.0 / scale)), -1, 1).astype(jnp.int8)
    return trits, scale


def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """(x_q @ trits^T) * x_scale * w_scale, accumulated in int32.

    Args:
      x_q: [..., K] int8 activations.
      x_scale: [..., 1] float32.
      trits: [N, K] int8 in {-1, 0, +1}.
      w_scale: float32 with one element, or [N, K / GROUP].
      out_dtype: dtype of the result.

    Returns:
      [..., N] of out_dtype. The integers are exact.
    """
    if w_scale.size > 1:
        groups = w_scale.shape[-1]
        sums = jnp.einsum(
            "...gk,ngk->...ng",
            x_q.reshape(*x_q.shape[:-1], groups, GROUP),
            trits.reshape(-1, groups, GROUP),
            preferred_element_type=jnp.int32,
        )
        scaled_sums = jnp.sum(sums.astype(jnp.float32) * w_scale, axis=-1)
        return (scaled_sums * x_scale).astype(out_dtype)
    accumulator = jax.lax.dot_general(
        x_q,
        trits,
        (((x_q.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return (accumulator.astype(jnp.float32) * (x_scale * w_scale.reshape(()))).astype(out_dtype)
