"""Operations of the decode kernels that Triton or XLA has no name for."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .. import triton as pltriton
from ..rounding import ROUNDER


def round_half_even(x: jax.Array, *, emulate: bool) -> jax.Array:
    """x to the nearest integer, halves to even, for |x| below 2^22.

    Triton has no such operation, and XLA would simplify the sum away.
    """
    return jnp.round(x) if emulate else (x + ROUNDER) - ROUNDER


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


def quantize4(xs: Sequence[jax.Array], factor: jax.Array, *, emulate: bool) -> jax.Array:
    """Four float32 arrays times a factor, rounded half to even, as four int8 in one int32.

    Args:
      xs: four float32 arrays of one shape; the first goes to the lowest byte.
      factor: float32 of that shape; no product is above 127.
      emulate: compute it in plain jnp; else by the GPU's instructions.
    """
    if emulate:
        out = jnp.zeros(xs[0].shape, jnp.int32)
        for byte, x in enumerate(xs):
            out |= (jnp.round(x * factor).astype(jnp.int32) & 255) << (8 * byte)
        return out
    # The sum with the rounder holds the integer in its low bits, whose bytes are then joined.
    rounded = " ".join(f"fma.rn.f32 t{i}, ${i + 1}, $5, 0f4B400000;" for i in range(4))
    (out,) = pltriton.elementwise_inline_asm(
        "{ .reg .b32 t0, t1, t2, t3; " + rounded + " prmt.b32 t0, t0, t1, 0x0040;"
        " prmt.b32 t2, t2, t3, 0x0040; prmt.b32 $0, t0, t2, 0x5410; }",
        args=[*xs, factor],
        constraints="=r,f,f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(xs[0].shape, jnp.int32)],
    )
    return out
