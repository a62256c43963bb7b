"""Two operations of the decode kernels that Triton or XLA has no name for."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

# Adding 1.5 * 2^23 rounds a small float32 to an integer, halves to even.
_ROUNDER = 12582912.0


def round_half_even(x: jax.Array, *, emulate: bool) -> jax.Array:
    """x to the nearest integer, halves to even, for |x| below 2^22.

    Triton has no such operation, and XLA would simplify the sum away.
    """
    return jnp.round(x) if emulate else (x + _ROUNDER) - _ROUNDER


def dot4(x: jax.Array, codes: jax.Array, sums: jax.Array, *, emulate: bool) -> jax.Array:
    """sums + the dot product of four signed bytes of x with four unsigned bytes of codes.

    Args:
      x, codes, sums: int32 of one shape.
      emulate: compute it in plain jnp; else by the GPU's instruction.
    """
    if emulate:
        for byte in range(4):
            signed = (x << (24 - 8 * byte)) >> 24
            sums += signed * ((codes >> (8 * byte)) & 255)
        return sums
    (sums,) = pltriton.elementwise_inline_asm(
        "dp4a.s32.u32 $0, $1, $2, $3;",
        args=[x, codes, sums],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(sums.shape, jnp.int32)],
    )
    return sums
