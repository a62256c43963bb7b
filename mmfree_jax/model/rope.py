"""Rotary positions (arXiv 2104.09864).

Shapes: B rows, T time steps, H heads, K channels a head, F = K / 2 frequencies.
"""

import math

import jax
import jax.numpy as jnp

from mmfree_jax.rope_scaling import RopeScaling


def frequencies(channels: int, *, theta: float, scaling: RopeScaling) -> jax.Array:
    """Angles by which a position turns each pair of channels.

    Args:
      channels: K, even.
      theta: base of the angles.
      scaling: of the frequencies theta^(-2 j / K).

    Returns:
      [F] float32, radians.
    """
    half = channels // 2
    frequency_F = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "linear":
        return frequency_F / scaling.factor
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns_F = frequency_F * (scaling.original_length / (2 * math.pi))
        kept_F = jnp.clip((turns_F - low) / (high - low), 0.0, 1.0)
        return frequency_F * (kept_F + (1.0 - kept_F) / scaling.factor)
    return frequency_F


def rotate(x_BTHK: jax.Array, positions_BT: jax.Array, frequency_F: jax.Array) -> jax.Array:
    """Turns queries or keys by their positions, halves rotated as in Llama.

    Args:
      x_BTHK: queries or keys; K even.
      positions_BT: int32.
      frequency_F: as `frequencies` gives them.

    Returns:
      [B, T, H, K] in x's dtype; angles in float32.
    """
    angle_BT1F = positions_BT[..., None, None].astype(jnp.float32) * frequency_F
    cos, sin = jnp.cos(angle_BT1F), jnp.sin(angle_BT1F)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
