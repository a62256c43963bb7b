"""The ternary product as one XLA dot: int8 operands, or float operands that hold integers."""

import jax
import jax.numpy as jnp
from jax import lax

from ..integer_products import MAX_FLOAT_COLUMNS, int8_dot
from .reference import GROUP

OPERAND_DTYPES = {"xla_int8": jnp.int8, "xla_bf16": jnp.bfloat16, "xla_f32": jnp.float32}


def integer_matmul(x_q: jax.Array, trits: jax.Array, *, implementation: str) -> jax.Array:
    """x_q @ trits^T, exactly: [..., K] and [N, K] int8 -> [..., N] int32 or float32."""
    operand = OPERAND_DTYPES[implementation]
    if operand == jnp.int8:
        return int8_dot(x_q, trits)
    if x_q.shape[-1] >= MAX_FLOAT_COLUMNS:
        raise ValueError(
            f"implementation={implementation!r} is exact for fewer than {MAX_FLOAT_COLUMNS} "
            f"columns, got {x_q.shape[-1]}: use 'xla_int8'"
        )
    return jax.lax.dot_general(
        x_q.astype(operand),
        trits.astype(operand),
        (((x_q.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    implementation: str,
) -> jax.Array:
    """See `api.ternary_matmul`."""
    if w_scale.size > 1:
        sums = scaled_sums(x_q, trits, w_scale, implementation=implementation)
        return (sums * x_scale).astype(out_dtype)
    accumulator = integer_matmul(x_q, trits, implementation=implementation)
    scale = x_scale * w_scale.astype(jnp.float32).reshape(())
    return (accumulator.astype(jnp.float32) * scale).astype(out_dtype)


def scaled_sums(
    x_q: jax.Array, trits: jax.Array, w_scale: jax.Array, *, implementation: str
) -> jax.Array:
    """x_q @ (trits * scales)^T with a scale a group: integer sums within a group, float32 across.

    Args:
      x_q: [..., K] int8.
      trits: [N, K] int8.
      w_scale: [N, K / GROUP] float32.
      implementation: of the integer sums.

    Returns:
      [..., N] float32.
    """
    n, groups = w_scale.shape
    lead = x_q.shape[:-1]
    operands = (
        jnp.moveaxis(x_q.reshape(*lead, groups, GROUP), -2, 0),
        jnp.moveaxis(trits.reshape(n, groups, GROUP), 1, 0),
        w_scale.astype(jnp.float32).T,
    )

    def add(total: jax.Array, group: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x, t, scale_N = group
        sums = integer_matmul(x, t, implementation=implementation).astype(jnp.float32)
        return total + sums * scale_N, None

    # Unrolled as far as programs stay small: a loop would copy each group out of its stack.
    return lax.scan(add, jnp.zeros((*lead, n), jnp.float32), operands, unroll=min(groups, 8))[0]
