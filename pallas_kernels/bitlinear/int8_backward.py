"""The two products of BitLinear's backward pass in 8 bits; the definition, in XLA.

A ternary layer is the best case for 8-bit gradients: its weights (trits) and its inputs (int8)
are exact, so that only the incoming gradient dY is rounded.

    dX = dY T(W):           dY to int8 with one scale a token
    dW = dY^T Q8(x):        x's scale a token goes into dY, which is rounded to int8 with one
                            scale a column in each block of tokens; int32 sums inside a block,
                            float32 across blocks

Values lie in [-127, 127]: the range is symmetric, so that rounding has no bias (arXiv
2510.25602).

Shapes: M tokens, N outputs of the layer, K inputs, S tokens of a block.
"""

import jax
import jax.numpy as jnp

from ..integer_products import int8_dot
from ..keep_nan import largest_along

# Tokens that share a column's scale: all, as far as their int32 sum cannot overflow (2^31 by
# 127 * 128). Shorter blocks round less (experiments/results/backward8), and need float32 sums
# beside the int32 ones: the tensor cores' kernel then took 0.18 ms where it takes 0.11.
BLOCK_TOKENS = 1 << 17
LARGEST = 127.0
TINY = 1e-30  # Keeps a row of zeros from dividing by zero.


def quantize(values: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Values to int8 with one scale along `axis`.

    Args:
      values: float, any shape.
      axis: that a scale covers, by the largest magnitude along it.

    Returns:
      int8 of the same shape, and float32 scales with `axis` of length 1; a NaN or infinity among
      the values makes its scale NaN, so that the product is not finite either.
    """
    wide = values.astype(jnp.float32)
    largest = largest_along(wide, axis)
    scale = jnp.where(jnp.isfinite(largest), jnp.maximum(largest, TINY) / LARGEST, jnp.nan)
    q = jnp.clip(jnp.round(wide * (1.0 / scale)), -LARGEST, LARGEST)
    return jnp.where(jnp.isnan(q), 0, q).astype(jnp.int8), scale


def input_gradient(
    d_output: jax.Array, trits: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """dY T with dY rounded to int8, one scale a token.

    Args:
      d_output: [..., N] float.
      trits: [N, K] int8.
      out_dtype: of the result.

    Returns:
      [..., K], without the weight's scale.
    """
    q, scale = quantize(d_output, -1)
    sums = int8_dot(q, trits, (-1, 0))
    return (sums.astype(jnp.float32) * scale).astype(out_dtype)


def weight_gradient(
    d_output: jax.Array,
    x: jax.Array,
    x_scale: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    *,
    block_tokens: int = BLOCK_TOKENS,
) -> jax.Array:
    """dY^T (x x_scale) with dY rounded to int8, one scale a column in each block of tokens.

    Args:
      d_output: [..., N] float.
      x: [..., K] int8, the quantised inputs of the forward pass.
      x_scale: [..., 1] float32.
      out_dtype: of the result.
      block_tokens: S; the last block may be shorter.

    Returns:
      [N, K].
    """
    N, K = d_output.shape[-1], x.shape[-1]
    folded_MN = (d_output.astype(jnp.float32) * x_scale).reshape(-1, N)
    x_MK = x.reshape(-1, K)
    M = x_MK.shape[0]
    S = min(block_tokens, M)
    padding = -M % S
    folded_MN, x_MK = (jnp.pad(a, ((0, padding), (0, 0))) for a in (folded_MN, x_MK))

    def add(total_NK: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        folded_SN, x_SK = block
        q_SN, scale_1N = quantize(folded_SN, 0)
        sums_NK = int8_dot(q_SN, x_SK, (0, 0))
        return total_NK + sums_NK.astype(jnp.float32) * scale_1N.T, None

    blocks = folded_MN.reshape(-1, S, N), x_MK.reshape(-1, S, K)
    total_NK, _ = jax.lax.scan(add, jnp.zeros((N, K), jnp.float32), blocks)
    return total_NK.astype(out_dtype)
