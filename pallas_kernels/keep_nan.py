"""Largest magnitudes in which a NaN stays one, for GPU kernels.

Triton's maximum is the one that returns its other operand where one is NaN: a row that holds a
NaN would get a finite scale, and no guard behind it could tell. Magnitudes are therefore compared
by their bits, among which NaN stands above infinity, and a bound is laid on by a comparison,
which NaN fails. Neither costs more than what it replaces.
"""

import jax
import jax.numpy as jnp


def magnitude(x: jax.Array) -> jax.Array:
    """int32 in the order of |x|, for float32 x; that of NaN is above all."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF


def from_magnitude(bits: jax.Array) -> jax.Array:
    """The |x| float32 of which these are the `magnitude`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def largest_magnitude(x: jax.Array) -> jax.Array:
    """max|x| over all elements of a float32 array; NaN where one is."""
    return from_magnitude(jnp.max(magnitude(x)))


def at_least(x: jax.Array, bound: float) -> jax.Array:
    """The larger of x and the bound; NaN where x is."""
    return jnp.where(x < bound, bound, x)
