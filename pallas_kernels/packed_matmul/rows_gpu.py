"""The quantised inputs of packed products for many rows: one pass, one program a row.

What `norm_quant` computes for the forward alone, with weights stacked over layers and the
layer's number as an operand, so that a loop over layers slices nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .. import triton as pltriton
from ..keep_nan import at_least, from_magnitude, magnitude
from ..norm_quant.reference import MIN_ABSMAX
from ..refs import Ref
from ..rounding import rounded


def quantize_rows(
    x: jax.Array,
    layer: jax.Array,
    norms: Sequence[jax.Array],
    outer_norm: jax.Array | None = None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    matrix_scales: Sequence[jax.Array] = (),
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
      matrix_scales: float32 [L, 1, 1] of each consumer's weights, to multiply the rows' scales
        by; empty leaves them out.
      gated: silu(gate) * up of the two halves of x takes x's place.
      interpret: run as a JAX program.

    Returns:
      x + residual (x itself without one); for each consumer int8 [M, K] and float32 [M, 1].
    """
    m = x.shape[0]
    columns = norms[0].shape[1]
    # A row is walked in pieces of four columns a thread, as few as reach its end: a row padded
    # to a power of two would spend up to half its instructions on nothing.
    warps = 4 if columns <= 4096 else 8
    piece = 128 * warps
    starts = range(0, columns, piece)
    operands = [layer.reshape(1), x, *norms, *(s.reshape(-1) for s in matrix_scales)]
    operands += [a for a in (outer_norm, residual, times_silu) if a is not None]
    out_shape = [jax.ShapeDtypeStruct((m, columns), jnp.int8)] * len(norms)
    out_shape += [jax.ShapeDtypeStruct((m, 1), jnp.float32)] * len(norms)
    if residual is not None:
        out_shape.append(jax.ShapeDtypeStruct((m, columns), x.dtype))

    def kernel(*all_refs: Ref) -> None:
        refs = list(all_refs)
        layer_ref, x_ref = refs[:2]
        del refs[:2]
        norm_refs = [refs.pop(0) for _ in norms]
        matrix_scale_refs = [refs.pop(0) for _ in matrix_scales]
        outer_ref = refs.pop(0) if outer_norm is not None else None
        residual_ref = refs.pop(0) if residual is not None else None
        state_ref = refs.pop(0) if times_silu is not None else None
        q_refs = [refs.pop(0) for _ in norms]
        scale_refs = [refs.pop(0) for _ in norms]
        at, row = layer_ref[0], pl.program_id(0)

        def places(start: int) -> tuple[jax.Array, jax.Array | None]:
            c = start + jnp.arange(piece)
            return c, None if start + piece <= columns else c < columns

        def load(ref: Ref, row: Any, start: int, offset: int = 0) -> jax.Array:
            c, mask = places(start)
            other = None if mask is None else 0.0
            value = pltriton.load(ref.at[row, offset + c], mask=mask, other=other)
            return value.astype(jnp.float32)

        def store(ref: Ref, value: jax.Array, start: int) -> None:
            c, mask = places(start)
            pltriton.store(ref.at[row, c], value, mask=mask)

        # The norms' scales are positive and common to a row, so that what they are made of is
        # gathered in one pass over values without them, and no sum waits for another.
        parts = []
        outer_squares = squares = jnp.zeros((piece,), jnp.float32)
        absmaxes = [jnp.zeros((piece,), jnp.int32) for _ in norms]
        for start in starts:
            v = load(x_ref, row, start)
            if gated:
                v = _silu(v) * load(x_ref, row, start, columns)
                v = v.astype(x_ref.dtype).astype(jnp.float32)
            if residual_ref is not None:
                total = (v + load(residual_ref, row, start)).astype(x_ref.dtype)
                store(refs[0], total, start)
                v = total.astype(jnp.float32)
            if outer_ref is not None:
                outer_squares += v * v
                v *= load(outer_ref, at, start)
            if state_ref is not None:
                v *= _silu(load(state_ref, row, start))
            squares += v * v
            absmaxes = [
                jnp.maximum(absmax, magnitude(v * load(norm_ref, at, start)))
                for absmax, norm_ref in zip(absmaxes, norm_refs, strict=True)
            ]
            parts.append(v)
        factor = 1.0
        if outer_ref is not None:
            factor = jax.lax.rsqrt(jnp.sum(outer_squares) * (1.0 / columns) + outer_eps)
        mean_square = jnp.sum(squares) * (1.0 / columns) * (factor * factor)
        factor *= jax.lax.rsqrt(mean_square + eps)
        for j, (norm_ref, q_ref, scale_ref) in enumerate(
            zip(norm_refs, q_refs, scale_refs, strict=True)
        ):
            absmax = at_least(from_magnitude(jnp.max(absmaxes[j])) * factor, MIN_ABSMAX)
            to_int8 = factor * (127.0 / absmax)
            for v, start in zip(parts, starts, strict=True):
                store(q_ref, nearest_int8(v * load(norm_ref, at, start) * to_int8), start)
            scale = absmax / 127.0
            if matrix_scale_refs:
                scale *= matrix_scale_refs[j][at]
            pltriton.store(scale_ref.at[row, jnp.int32(0)], scale)

    results = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(m,),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="quantize_rows",
    )(*operands)
    count = len(norms)
    stream = x if residual is None else results[-1]
    return stream, list(results[:count]), list(results[count : 2 * count])


def nearest_int8(x: jax.Array) -> jax.Array:
    """x to the nearest int8, halves to even, for |x| up to 127: the low byte, as it stands."""
    return rounded(x).astype(jnp.int8)


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))
