"""The kernel of `fused_gpu.py`: norms, quantisation, products with packed words, an epilogue."""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .. import triton as pltriton
from ..keep_nan import at_least, from_magnitude, magnitude
from ..norm_quant.reference import MIN_ABSMAX
from ..packed_matmul.linears import Linears
from ..packed_matmul.words import plane_columns
from ..refs import Ref
from .dot4 import dot4, round_half_even

# Rows of a batch beyond which tensor cores do better. Each row has programs of its own; the
# rows after the first find a layer's weights in the L2 cache.
MAX_ROWS = 8


class _Plan(NamedTuple):
    """What is static in a kernel."""

    columns: int  # K
    rows: int  # outputs of a program from each matrix
    matrices: int
    halves: int  # 2: each program takes rows n and N/2 + n of its matrix
    outer: bool
    gate: bool
    epilogue: str
    eps: float
    outer_eps: float
    dtype: jnp.dtype
    emulate: bool


def _tile(outputs: int, words: int, matrices: int) -> tuple[int, int]:
    """Rows of a program and its warps: some 4 KB of weights, and programs for every core."""
    padded = pl.next_power_of_2(words)
    rows = 8
    while rows > 1 and rows * padded * matrices > 4096:
        rows //= 2
    while rows > 1 and outputs // rows < 264:
        rows //= 2
    return rows, 4 if rows * padded * matrices >= 1024 else 2


def call(
    x: jax.Array,
    layer: jax.Array,
    weights: Linears,
    outer_norm: jax.Array | None,
    extras: list[jax.Array],
    epilogue: str,
    outputs: list[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool,
    state: jax.Array | None = None,
) -> list[jax.Array]:
    """The kernel on x [M, K], at most `MAX_ROWS` rows.

    Args:
      x, layer, weights, eps, outer_eps, dtype, interpret: as in `fused_gpu.py`.
      outer_norm: [L, K] of an RMSNorm before the BitLinears' own; None: none.
      extras: what the epilogue reads besides.
      epilogue: "mlgru", "residual", "swiglu" or "store".
      outputs: shapes and dtypes.
      state: [M, K], whose silu multiplies the input; None: none.

    Raises:
      ValueError: there are more rows, or the words are not those of K columns.
    """
    batch, columns = x.shape
    if batch > MAX_ROWS:
        raise ValueError(f"x has {batch} rows: the decode kernels take at most {MAX_ROWS}")
    _, total, words = weights.words[0].shape
    if words != plane_columns(columns) // 4:
        raise ValueError(
            f"words are [..., {words}], but {columns} columns need {plane_columns(columns) // 4}"
        )
    halves = 2 if epilogue == "swiglu" else 1
    count = len(weights.words)
    rows, warps = _tile(total // halves, words, count * halves)
    plan = _Plan(
        columns, rows, count, halves, outer_norm is not None, state is not None, epilogue,
        float(eps), float(outer_eps), jnp.dtype(dtype), interpret,
    )  # fmt: skip
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=[jax.ShapeDtypeStruct(shape, kind) for shape, kind in outputs],
        grid=(pl.cdiv(total // halves, rows), batch),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name=f"packed_{epilogue}",
    )(
        layer,
        x,
        *([outer_norm] if outer_norm is not None else []),
        *([state] if state is not None else []),
        *weights.norms,
        *weights.words,
        *weights.scales,
        *extras,
    )


def _kernel(layer_ref: Ref, x_ref: Ref, *all_refs: Ref, plan: _Plan) -> None:
    refs = list(all_refs)
    outer_ref = refs.pop(0) if plan.outer else None
    state_ref = refs.pop(0) if plan.gate else None
    norm_refs = [refs.pop(0) for _ in range(plan.matrices)]
    word_refs = [refs.pop(0) for _ in range(plan.matrices)]
    scale_refs = [refs.pop(0) for _ in range(plan.matrices)]
    layer = layer_ref[0]
    total, words = word_refs[0].shape[1:]
    padded = pl.next_power_of_2(words)
    outputs = total // plan.halves
    m = pl.program_id(1)
    n = pl.program_id(0) * plan.rows + jnp.arange(plan.rows)
    inside = n < outputs

    # The weights are asked for first: they come from memory, all the rest from cache.
    place = jnp.arange(padded)[None, :]
    tiles = [
        [
            pltriton.load(
                ref.at[layer, n[:, None] + half * outputs, place],
                mask=inside[:, None] & (place < words),
                other=0,
            )
            for half in range(plan.halves)
        ]
        for ref in word_refs
    ]
    values = _inputs(plan, m, layer, x_ref, outer_ref, state_ref, words)
    results = [
        _product(plan, layer, values, norm_ref, scale_ref, tile, words)
        for norm_ref, scale_ref, tile in zip(norm_refs, scale_refs, tiles, strict=True)
    ]
    _finish(plan, refs, results, layer, m, n, inside)


def _columns(plan: _Plan, words: int) -> list[tuple[jax.Array, jax.Array]]:
    """Column numbers [padded, 4] of each plane's words, and which exist."""
    padded = pl.next_power_of_2(words)
    word, byte = jnp.arange(padded)[:, None], jnp.arange(4)[None, :]
    planes = [plane * 4 * words + 4 * word + byte for plane in range(4)]
    return [(c, (word < words) & (c < plan.columns)) for c in planes]


def _load(ref: Ref, index: tuple[Any, ...], mask: jax.Array) -> jax.Array:
    return pltriton.load(ref.at[index], mask=mask, other=0.0).astype(jnp.float32)


def _mean_square(plan: _Plan, planes: list[jax.Array]) -> jax.Array:
    # Planes are combined first: a reduction over threads costs more than three additions.
    squares = functools.reduce(jnp.add, [v * v for v in planes])
    return jnp.sum(jnp.sum(squares, axis=1)) * (1.0 / plan.columns)


def _inputs(
    plan: _Plan,
    m: jax.Array,
    layer: jax.Array,
    x_ref: Ref,
    outer_ref: Ref | None,
    state_ref: Ref | None,
    words: int,
) -> list[jax.Array]:
    """The input after all norms but the BitLinears' own weights: four planes [padded, 4]."""
    columns = _columns(plan, words)
    values = [_load(x_ref, (m, c), mask) for c, mask in columns]
    if plan.outer:
        inverse = jax.lax.rsqrt(_mean_square(plan, values) + plan.outer_eps)
        values = [
            v * inverse * _load(outer_ref, (layer, c), mask)
            for v, (c, mask) in zip(values, columns, strict=True)
        ]
    if plan.gate:
        gated = []
        for v, (c, mask) in zip(values, columns, strict=True):
            h = _load(state_ref, (m, c), mask).astype(plan.dtype).astype(jnp.float32)
            gated.append(v * _silu(h))
        values = gated
    inverse = jax.lax.rsqrt(_mean_square(plan, values) + plan.eps)
    return [v * inverse for v in values]


def _product(
    plan: _Plan,
    layer: jax.Array,
    values: list[jax.Array],
    norm_ref: Ref,
    scale_ref: Ref,
    tile: list[jax.Array],
    words: int,
) -> list[jax.Array]:
    """One matrix's outputs for one row of the batch, [rows] float32 for each half."""
    columns = _columns(plan, words)
    normalized = [
        v * _load(norm_ref, (layer, c), mask) for v, (c, mask) in zip(values, columns, strict=True)
    ]
    largest = functools.reduce(jnp.maximum, [magnitude(v) for v in normalized])
    absmax = at_least(from_magnitude(jnp.max(jnp.max(largest, axis=1))), MIN_ABSMAX)
    factor = 127.0 / absmax
    shift = 8 * jnp.arange(4)[None, :]
    packed = []
    for v in normalized:
        q = round_half_even(v * factor, emulate=plan.emulate).astype(jnp.int32)
        packed.append(jnp.sum((q & 255) << shift, axis=1)[None, :])
    # The codes are trits plus one: the sum of x is taken off in advance.
    ones = jnp.full(packed[0].shape, 0x01010101, jnp.int32)
    start = jnp.zeros(packed[0].shape, jnp.int32)
    for x in packed:
        start = dot4(x, ones, start, emulate=plan.emulate)
    scale = (absmax / 127.0) * scale_ref[layer, 0, 0]
    outputs = []
    for words_of_rows in tile:
        sums = jnp.broadcast_to(-start, words_of_rows.shape)
        for plane, x in enumerate(packed):
            codes = (words_of_rows >> (2 * plane)) & 0x03030303
            x = jnp.broadcast_to(x, codes.shape)
            sums = dot4(x, codes, sums, emulate=plan.emulate)
        outputs.append(jnp.sum(sums, axis=1).astype(jnp.float32) * scale)
    return outputs


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _finish(
    plan: _Plan,
    refs: list[Ref],
    results: list[list[jax.Array]],
    layer: jax.Array,
    m: jax.Array,
    n: jax.Array,
    inside: jax.Array,
) -> None:
    """Writes the outputs; `results` is [matrix][half]."""
    rounded = [[y.astype(plan.dtype).astype(jnp.float32) for y in halves] for halves in results]
    if plan.epilogue == "mlgru":
        bound_ref, h_ref, g_out, h_out = refs
        i, f, g = (halves[0] for halves in rounded)
        bound = pltriton.load(bound_ref.at[layer, n], mask=inside, other=0.0)
        before = pltriton.load(h_ref.at[layer, m, n], mask=inside, other=0.0)
        forget = bound + (1.0 - bound) / (1.0 + jnp.exp(-f))
        new = _silu(i) * ((1.0 - bound) / (1.0 + jnp.exp(f)))
        pltriton.store(g_out.at[m, n], g.astype(plan.dtype), mask=inside)
        pltriton.store(h_out.at[m, n], forget * before + new, mask=inside)
    elif plan.epilogue == "swiglu":
        ((gate, up),) = rounded
        (out,) = refs
        pltriton.store(out.at[m, n], (_silu(gate) * up).astype(plan.dtype), mask=inside)
    elif plan.epilogue == "residual":
        residual_ref, out = refs
        before = pltriton.load(residual_ref.at[m, n], mask=inside, other=0.0)
        pltriton.store(out.at[m, n], before + rounded[0][0].astype(before.dtype), mask=inside)
    else:
        (out,) = refs
        pltriton.store(out.at[m, n], rounded[0][0], mask=inside)
