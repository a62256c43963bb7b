"""The packed product through XLA: unpack the matrix, then one dot. Right on every backend."""

import jax
import jax.numpy as jnp

from ..integer_products import MAX_FLOAT_COLUMNS, int8_dot
from .reference import unpack


def packed_matmul(x_q: jax.Array, packed: jax.Array, *, bits: str) -> jax.Array:
    """See `api.packed_matmul`."""
    columns = x_q.shape[-1]
    trits = unpack(packed, columns, bits=bits)

    def floats(x_q: jax.Array, trits: jax.Array) -> jax.Array:
        contract = (((x_q.ndim - 1,), (1,)), ((), ()))
        x, t = x_q.astype(jnp.float32), trits.astype(jnp.float32)
        return jax.lax.dot_general(x, t, contract).astype(jnp.int32)

    # On the CPU a float32 product of many rows is several times faster than one of integers.
    many = x_q.size > columns and columns < MAX_FLOAT_COLUMNS
    return jax.lax.platform_dependent(
        x_q, trits, cpu=floats if many else int8_dot, default=int8_dot
    )
