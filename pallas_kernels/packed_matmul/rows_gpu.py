"""The quantised inputs of packed products for many rows: one pass, one program a row.

What `norm_quant` computes for the forward alone, with weights stacked over layers and the
layer's number as an operand, so that a loop over layers slices nothing.
"""

from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.norm_quant.reference import MIN_ABSMAX
from pallas_kernels.packed_matmul.dot4 import round_half_even


def quantize(
    x: jax.Array,
    layer: jax.Array,
    norms: Sequence[jax.Array],
    outer_norm: jax.Array | None = None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Q8(RMSNorm_j(RMSNorm_outer(x + residual))) for each consumer j.

    Args:
      x: [M, K]; [M, 2K] gated.
      layer: int32 scalar, which row of the norms.
      norms: [L, K] of each consumer.
      outer_norm: [L, K], of the norm in front of all; None leaves it out.
      eps: of the consumers' norms.
      outer_eps: of the outer norm.
      residual: [M, K] to add to x first, in x's dtype.
      times_silu: [M, K]; RMSNorm_outer(x) * silu(times_silu) takes the outer norm's place.
      gated: silu(gate) * up of the two halves of x takes x's place.
      interpret: run as a JAX program.

    Returns:
      x + residual (x itself without one); for each consumer int8 [M, K] and float32 [M, 1].
    """
    m = x.shape[0]
    columns = norms[0].shape[1]
    padded = pl.next_power_of_2(columns)
    operands = [layer.reshape(1), x, *norms]
    operands += [a for a in (outer_norm, residual, times_silu) if a is not None]
    out_shape = [jax.ShapeDtypeStruct((m, columns), jnp.int8)] * len(norms)
    out_shape += [jax.ShapeDtypeStruct((m, 1), jnp.float32)] * len(norms)
    if residual is not None:
        out_shape.append(jax.ShapeDtypeStruct((m, columns), x.dtype))

    def kernel(*refs):
        refs = list(refs)
        layer_ref, x_ref = refs[:2]
        del refs[:2]
        norm_refs = [refs.pop(0) for _ in norms]
        outer_ref = refs.pop(0) if outer_norm is not None else None
        residual_ref = refs.pop(0) if residual is not None else None
        state_ref = refs.pop(0) if times_silu is not None else None
        q_refs = [refs.pop(0) for _ in norms]
        scale_refs = [refs.pop(0) for _ in norms]
        at, row = layer_ref[0], pl.program_id(0)
        c = jnp.arange(padded)
        mask = None if padded == columns else c < columns
        other = None if mask is None else 0.0

        def load(ref, *index):
            value = pltriton.load(ref.at[(*index, c)], mask=mask, other=other)
            return value.astype(jnp.float32)

        def mean_square(v):
            return jnp.sum(v * v) * (1.0 / columns)

        v = load(x_ref, row)
        if gated:
            up = pltriton.load(x_ref.at[row, columns + c], mask=mask, other=other)
            v = (_silu(v) * up.astype(jnp.float32)).astype(x_ref.dtype).astype(jnp.float32)
        if residual_ref is not None:
            total = (v + load(residual_ref, row)).astype(x_ref.dtype)
            pltriton.store(refs[0].at[row, c], total, mask=mask)
            v = total.astype(jnp.float32)
        if outer_ref is not None:
            v = v * jax.lax.rsqrt(mean_square(v) + outer_eps) * load(outer_ref, at)
        if state_ref is not None:
            v = v * _silu(load(state_ref, row))
        v = v * jax.lax.rsqrt(mean_square(v) + eps)
        for norm_ref, q_ref, scale_ref in zip(norm_refs, q_refs, scale_refs, strict=True):
            n = v * load(norm_ref, at)
            absmax = jnp.maximum(jnp.max(jnp.abs(n)), MIN_ABSMAX)
            q = round_half_even(n * (127.0 / absmax), emulate=interpret)
            pltriton.store(q_ref.at[row, c], q.astype(jnp.int32).astype(jnp.int8), mask=mask)
            pltriton.store(scale_ref.at[row, jnp.int32(0)], absmax / 127.0)

    results = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(m,),
        compiler_params=pltriton.CompilerParams(num_warps=8 if padded > 2048 else 4, num_stages=1),
        interpret=interpret,
        name="quantize_rows",
    )(*operands)
    count = len(norms)
    stream = x if residual is None else results[-1]
    return stream, list(results[:count]), list(results[count : 2 * count])


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))
