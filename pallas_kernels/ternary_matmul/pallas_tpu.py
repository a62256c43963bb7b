"""The ternary product on TPU: int8 blocks on the MXU, int32 accumulation, scaled epilogue."""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ..refs import Ref


def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    block_m: int = 512,
    block_n: int = 512,
    block_k: int = 2048,
    interpret: bool = False,
) -> jax.Array:
    """(x_q @ trits^T) * x_scale * w_scale.

    Args:
      x_q: [M, K] int8.
      x_scale: [M, 1] float32.
      trits: [N, K] int8.
      w_scale: [1, 1] float32.
      out_dtype: dtype of the result.
      block_m, block_n: the output's block.
      block_k: an upper bound on the columns multiplied at a time.
      interpret: run as a JAX program, to check the arithmetic without a TPU.

    Returns:
      [M, N] of out_dtype.
    """
    m, k = x_q.shape
    n = trits.shape[0]
    # Zero columns change no sum, and make K a multiple of the lane width.
    padding = -k % 128
    if padding:
        x_q, trits = (jnp.pad(a, ((0, 0), (0, padding))) for a in (x_q, trits))
    lanes = (k + padding) // 128
    depth = max(d for d in range(1, block_k // 128 + 1) if lanes % d == 0)
    block_k, steps = depth * 128, lanes // depth
    # Blocks cover the whole of a small dimension, and tiles of int8 are 32 rows.
    block_m, block_n = (min(b, 32 * pl.cdiv(s, 32)) for b, s in ((block_m, m), (block_n, n)))
    block_n = n if n < block_n else max(128, block_n // 128 * 128) if n > 128 else n

    def kernel(
        x_ref: Ref, x_scale_ref: Ref, t_ref: Ref, w_scale_ref: Ref, out_ref: Ref, sum_ref: Ref
    ) -> None:
        step = pl.program_id(2)
        product = lax.dot_general(
            x_ref[...], t_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

        @pl.when(step == 0)
        def _() -> None:
            sum_ref[...] = product

        @pl.when(step > 0)
        def _() -> None:
            sum_ref[...] += product

        @pl.when(step == steps - 1)
        def _() -> None:
            scale = x_scale_ref[...] * w_scale_ref[...]
            out_ref[...] = (sum_ref[...].astype(jnp.float32) * scale).astype(out_dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(m, block_m), pl.cdiv(n, block_n), steps),
        in_specs=[
            pl.BlockSpec((block_m, block_k), lambda i, j, s: (i, s)),
            pl.BlockSpec((block_m, 1), lambda i, j, s: (i, 0)),
            pl.BlockSpec((block_n, block_k), lambda i, j, s: (j, s)),
            pl.BlockSpec((1, 1), lambda i, j, s: (0, 0)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, s: (i, j)),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.int32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="ternary_matmul",
    )(x_q, x_scale, trits, w_scale)
