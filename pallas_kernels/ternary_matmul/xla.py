"""The ternary product as one XLA dot: int8 operands, or float operands that hold integers."""

import jax
import jax.numpy as jnp

from ..integer_products import MAX_FLOAT_COLUMNS, int8_dot

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
    accumulator = integer_matmul(x_q, trits, implementation=implementation)
    scale = x_scale * w_scale.astype(jnp.float32).reshape(())
    return (accumulator.astype(jnp.float32) * scale).astype(out_dtype)
