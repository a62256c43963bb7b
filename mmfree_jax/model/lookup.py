"""Rows of the embedding table, and their gradient between devices.

Shapes: V words, D channels, B rows, T tokens of each.
"""

import functools

import jax
import jax.numpy as jnp

from mmfree_jax.pallas_kernels.over_tokens import partial_sums, total
from mmfree_jax.parallel.sharding import token_axes, whole_rows


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """`table_VD[tokens_BT]`.

    The gradient is added up over a device's tokens in float32, and over devices in the table's
    dtype.

    Args:
      table_VD: float.
      tokens_BT: int32.

    Returns:
      [B, T, D] in the table's dtype.
    """
    static = token_axes(tokens_BT.shape), table_VD.shape[0], table_VD.dtype
    return _lookup(static, table_VD, tokens_BT)


_Static = tuple[tuple[str, ...], int, jnp.dtype]  # the mesh axes that split B, V, the dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(static: _Static, table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    del static
    return jnp.take(whole_rows(table_VD), tokens_BT, axis=0)


def _forward(
    static: _Static, table_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _lookup(static, table_VD, tokens_BT), tokens_BT


def _backward(static: _Static, tokens_BT: jax.Array, d_BTD: jax.Array) -> tuple[jax.Array, None]:
    axes, V, dtype = static

    def add(d_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        zeros_VD = jnp.zeros((V, d_BTD.shape[-1]), jnp.promote_types(dtype, jnp.float32))
        return zeros_VD.at[tokens_BT].add(d_BTD.astype(zeros_VD.dtype)).astype(dtype)

    return total(partial_sums(add, axes, 2)(d_BTD, tokens_BT)), None


_lookup.defvjp(_forward, _backward)
