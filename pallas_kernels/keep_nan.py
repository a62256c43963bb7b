"""Largest magnitudes in which a NaN stays one.

Triton's maximum is the one that returns its other operand where one is NaN, and so is that of
XLA's programs for a CPU in a wide row (jax 0.10.2 and 0.11.2: from 131 columns behind a norm): a
row that holds a NaN would get a finite scale, and no guard behind it could tell. In kernels
magnitudes are therefore compared by their bits, among which NaN stands above infinity, and a bound
is laid on by a comparison, which NaN fails; for XLA, whose maxima of integers are slow on a CPU, a
NaN becomes an infinity first. Nothing of this costs more than what it replaces.
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


def largest_along(x: jax.Array, axis: int) -> jax.Array:
    """max|x| along an axis that is kept, for XLA; infinity where one is NaN."""
    magnitudes = jnp.abs(x)
    return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, magnitudes), axis=axis, keepdims=True)
