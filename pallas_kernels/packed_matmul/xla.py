"""The packed product through XLA: unpack the matrix, then one dot. Right on every backend."""

import jax
import jax.numpy as jnp

from .reference import unpack

# A float32 sum of K products of magnitude 128 at most is exact below 2^24.
_MAX_FLOAT_COLUMNS = 2**24 // 128


def packed_matmul(x_q: jax.Array, packed: jax.Array, *, bits: str) -> jax.Array:
    """See `api.packed_matmul`."""
    columns = x_q.shape[-1]
    trits = unpack(packed, columns, bits=bits)
    contract = (((x_q.ndim - 1,), (1,)), ((), ()))

    def integers(x_q: jax.Array, trits: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x_q, trits, contract, preferred_element_type=jnp.int32)

    def floats(x_q: jax.Array, trits: jax.Array) -> jax.Array:
        x, t = x_q.astype(jnp.float32), trits.astype(jnp.float32)
        return jax.lax.dot_general(x, t, contract).astype(jnp.int32)

    # On the CPU a float32 product of many rows is several times faster than one of integers.
    many = x_q.size > columns and columns < _MAX_FLOAT_COLUMNS
    return jax.lax.platform_dependent(
        x_q, trits, cpu=floats if many else integers, default=integers
    )
