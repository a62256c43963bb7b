"""What the 8-bit backward products read, made on a GPU by Pallas-Triton.

s8 wgmma wants the axis that is summed over to be the contiguous one, in both operands. So for dX
the gradient is rounded as it lies and the trits are turned; for dW the gradient is rounded into
its transpose and the quantised inputs are turned. All three kernels are bound by memory: they
read the gradient twice and write it twice in 8 bits. The numbers are `int8_backward.py`'s. Why the
functions are jitted, `mosaic.kernel` says.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .. import triton as pltriton
from ..keep_nan import at_least, from_magnitude, largest_magnitude, magnitude
from ..refs import Ref
from ..rounding import rounded
from .int8_backward import LARGEST, TINY
from .triton_rows import Columns, walk

_TILE = (64, 128)  # Rows and columns that a program turns: about what an H100 did fastest.


def _rows_plan(n: int) -> tuple[int, int]:
    """Warps of a program that walks rows of N, and how many programs share them."""
    return (8 if n <= 8192 else 16), 132 * pl.cdiv(8192, n)


@functools.partial(jax.jit, static_argnames="interpret")
def quantize_rows(
    d: jax.Array, x_scale: jax.Array | None, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A gradient to int8 with a scale a row, and what its columns need to be rounded.

    Args:
      d: [M, N] float.
      x_scale: [M] float32, the scales of the quantised inputs; None where no weight's gradient
        is wanted.
      interpret: run as a JAX program.

    Returns:
      [M, N] int8, [M] float32 scales, and [N] float32: the largest |d x_scale| of each column,
      NaN where one is (None without x_scale).
    """
    m, n = d.shape
    warps, programs = _rows_plan(n)
    programs = min(programs, m)
    padded = pl.next_power_of_2(n)
    q, scale, *largest = pl.pallas_call(
        functools.partial(
            _rows_kernel, folded=x_scale is not None, padded=padded, programs=programs
        ),
        out_shape=[
            jax.ShapeDtypeStruct((m, n), jnp.int8),
            jax.ShapeDtypeStruct((m,), jnp.float32),
            *[jax.ShapeDtypeStruct((programs, n), jnp.int32)] * (x_scale is not None),
        ],
        grid=(programs,),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="quantize_rows",
    )(d, *([] if x_scale is None else [x_scale]))
    return q, scale, from_magnitude(jnp.max(largest[0], axis=0)) if largest else None


def _rows_kernel(d_ref: Ref, *all_refs: Ref, folded: bool, padded: int, programs: int) -> None:
    refs = list(all_refs)
    x_scale_ref = refs.pop(0) if folded else None
    q_ref, scale_ref, *largest_ref = refs
    m, n = d_ref.shape
    columns = Columns(n, padded)

    def load(row: Any) -> Any:
        scales = [] if x_scale_ref is None else [pltriton.load(x_scale_ref.at[row])]
        return columns.load(d_ref, row), *scales

    def body(row: Any, loaded: Any, largest: Any) -> Any:
        d, *x_scale = loaded
        scale = _scale(largest_magnitude(d))
        pltriton.store(scale_ref.at[row], scale)
        columns.store(q_ref, rounded(d * (1.0 / scale)), row)
        return [jnp.maximum(a, magnitude(d * x_scale[0])) for a in largest]

    init = [jnp.zeros((padded,), jnp.int32)] if folded else []
    largest = walk(load, body, init, m=m, programs=programs, ahead=True)
    for ref, values in zip(largest_ref, largest, strict=True):
        columns.store(ref, values, pl.program_id(0))


def _scale(largest: jax.Array) -> jax.Array:
    """Of magnitudes up to `largest`; NaN where that is not finite."""
    return jnp.where(largest < jnp.inf, at_least(largest, TINY) / LARGEST, jnp.nan)


@functools.partial(jax.jit, static_argnames="interpret")
def quantize_columns(
    d: jax.Array, x_scale: jax.Array, largest: jax.Array, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The transpose of d x_scale in int8, with a scale a column of d.

    Args:
      d: [M, N] float; M and N are multiples of 64 and 128.
      x_scale: [M] float32.
      largest: [N] float32, as `quantize_rows` returns it.
      interpret: run as a JAX program.

    Returns:
      [N, M] int8 and [N] float32 scales.
    """
    (m, n), (rows, columns) = d.shape, _TILE
    scale = _scale(largest)
    q = pl.pallas_call(
        _columns_kernel,
        out_shape=jax.ShapeDtypeStruct((n, m), jnp.int8),
        grid=(n // columns, m // rows),
        in_specs=[
            pl.BlockSpec((rows, columns), lambda j, i: (i, j)),
            pl.BlockSpec((rows,), lambda j, i: (i,)),
            pl.BlockSpec((columns,), lambda j, i: (j,)),
        ],
        out_specs=pl.BlockSpec((columns, rows), lambda j, i: (j, i)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="quantize_columns",
    )(d, x_scale, 1.0 / scale)
    return q, scale


def _columns_kernel(d_ref: Ref, x_scale_ref: Ref, inverse_ref: Ref, q_ref: Ref) -> None:
    folded = d_ref[...].astype(jnp.float32) * x_scale_ref[...][:, None]
    q_ref[...] = rounded(folded * inverse_ref[...][None, :]).astype(jnp.int8).T


@functools.partial(jax.jit, static_argnames="interpret")
def transpose(a: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[M, K] int8 to [K, M]; M and K are multiples of 64 and 128.

    As fast as XLA's own, which however turns all layers' trits where they are made, and keeps
    both forms.
    """
    (m, k), (rows, columns) = a.shape, _TILE
    return pl.pallas_call(
        _transpose_kernel,
        out_shape=jax.ShapeDtypeStruct((k, m), jnp.int8),
        grid=(k // columns, m // rows),
        in_specs=[pl.BlockSpec((rows, columns), lambda j, i: (i, j))],
        out_specs=pl.BlockSpec((columns, rows), lambda j, i: (j, i)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="transpose",
    )(a)


def _transpose_kernel(a_ref: Ref, out_ref: Ref) -> None:
    out_ref[...] = a_ref[...].T
