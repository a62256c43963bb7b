"""Rounding by one sum, where a kernel's language has no operation for it or a slower one."""

import jax
import jax.numpy as jnp
from jax import lax

# Adding 1.5 * 2^23 rounds a small float32 to an integer, halves to even, which then stands in two's
# complement in the sum's low bits.
ROUNDER = 12582912.0
ROUNDER_BITS = 0x4B400000


def rounded(x: jax.Array) -> jax.Array:
    """float32 to the nearest integer, halves to even, for |x| below 2^22.

    Returns:
      int32 whose low byte is the integer, where that is an int8; less `ROUNDER_BITS`, the integer.
    """
    return lax.bitcast_convert_type(x + ROUNDER, jnp.int32)
