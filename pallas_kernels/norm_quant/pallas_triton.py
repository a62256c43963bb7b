"""The double RMSNorm and quantisation through Pallas-Triton: one pass each way.

What runs for each program is in `triton_kernels.py`; here is how many there are, and how large.
"""

import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .. import triton as pltriton
from .triton_kernels import backward_kernel, forward_kernel
from .xla import Statistics

# Sixteen bytes of bf16, and the int8 store beside them, for each thread at a time: other
# layouts make Triton shuffle rows through shared memory.
_ELEMENTS_PER_THREAD = 8


class _Plan(NamedTuple):
    """How a kernel runs: about what an H100 did fastest at each of `benchmark.py`'s shapes."""

    warps: int  # Of a program.
    programs: int  # That share the rows: enough to fill the chip; more only cost partial sums.
    ahead: bool = True  # Whether the next row is read while this one is worked on.


def _forward_plan(k: int) -> _Plan:
    warps = max(1, min(16, pl.next_power_of_2(k) // (64 * _ELEMENTS_PER_THREAD)))
    return _Plan(warps, 132 * min(8, 48 // warps))


def _backward_plan(k: int, rows: int, vectors: int, *, int8_inputs: bool) -> _Plan:
    """For `rows` inputs of a row each and `vectors` kept from row to row.

    The values that live at once should fit in registers: where ptxas spills them, the kernel
    takes up to three times as long.
    """
    values = 1.5 * rows + vectors + 3
    if k <= 1024:
        warps = max(1, pl.next_power_of_2(k) // (32 * _ELEMENTS_PER_THREAD))
        return _Plan(warps, 132 * (4 if values < 12 else 3))

    def registers(warps: int) -> float:
        return _ELEMENTS_PER_THREAD * pl.cdiv(k, 32 * warps * _ELEMENTS_PER_THREAD) * values

    if int8_inputs and k > 2048:
        # Wide rows over few threads are shuffled through shared memory for the int8 store.
        return _Plan(16, 132 * 2, ahead=registers(16) <= 120)
    if k > 2048 and registers(16) <= 80:
        return _Plan(16, 132 * 2)
    if registers(8) <= 240:
        return _Plan(8, 132 * 2)
    # 6912 columns, gated: 1.56 ms with 8 warps, 2.60 with 16.
    return _Plan(8, 132, ahead=False) if k > 4096 else _Plan(16, 132 * 2, ahead=False)


def norm_quant(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    plan: _Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], Statistics]:
    """See `api.norm_quant`; x is [M, K], or [M, 2K] gated.

    `plan` says how to run, for benchmarks and tests.
    """
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    given, x = x, x.reshape(2 * m, k) if gated else x
    count = len(weights)
    own, outer, add = weights[0] is not None, outer_weight is not None, residual is not None
    padded = pl.next_power_of_2(k)
    plan = plan or _forward_plan(k)
    programs = min(plan.programs, m)
    scalar = jax.ShapeDtypeStruct((m,), jnp.float32)
    outputs = pl.pallas_call(
        functools.partial(
            forward_kernel, count=count, outer=outer, own=own, add=add,
            modulated=times_silu is not None, gated=gated, eps=eps, outer_eps=outer_eps,
            padded=padded, programs=programs, ahead=plan.ahead,
        ),
        out_shape=[
            *[jax.ShapeDtypeStruct((m, k), x.dtype)] * add,
            *[jax.ShapeDtypeStruct((m, k), jnp.int8)] * count,
            *[scalar] * (2 * count + outer + own),
        ],
        grid=(programs,),
        compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
        name="norm_quant",
    )(
        x,
        *([residual] if add else []),
        *([] if times_silu is None else [times_silu]),
        *([outer_weight] if outer else []),
        *(weights if own else []),
    )  # fmt: skip
    outputs = list(outputs)
    x = outputs.pop(0) if add else given
    qs, scalars = tuple(outputs[:count]), [s[:, None] for s in outputs[count:]]
    scales, absmaxes, rest = scalars[:count], scalars[count : 2 * count], scalars[2 * count :]
    stats = Statistics(rest[0] if outer else None, rest[-1] if own else None, tuple(absmaxes))
    return x, qs, tuple(scales), stats


def norm_backward(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    stats: Statistics,
    gradients: tuple[jax.Array, ...],
    gradient_scales: tuple[jax.Array, ...],
    *,
    eps: float,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    d_skip: jax.Array | None = None,
    input_dtype: jax.typing.DTypeLike | None = None,
    plan: _Plan | None = None,
    interpret: bool = False,
) -> tuple[
    jax.Array,
    tuple[jax.Array | None, ...],
    jax.Array | None,
    tuple[jax.Array, ...],
    jax.Array | None,
]:
    """`xla.norm_backward` and `xla.requantize` in one pass, for x [M, K], or [M, 2K] gated.

    Each gradient is multiplied by its scale, one float32, as it is read. d_skip [M, K] is
    added to the gradient of x, not where x is gated.

    Returns:
      The gradient of x in x's dtype, those of the norm weights and of the outer weight in
      float32, the inputs in `input_dtype` as `api.norm_backward` says (none where stats holds no
      absmax), and the gradient of times_silu in its dtype.
    """
    m, k = gradients[0].shape
    input_dtype = jnp.dtype(input_dtype or x.dtype)
    given, x = x, x.reshape(2 * m, k) if gated else x
    count, requantized = len(weights), len(stats.absmaxes)
    own, outer, modulated = weights[0] is not None, outer_weight is not None, times_silu is not None
    padded = pl.next_power_of_2(k)
    rows = 1 + (gated or modulated) + (d_skip is not None) + count
    plan = plan or _backward_plan(
        k, rows, 2 * (count * own + outer), int8_inputs=input_dtype == jnp.int8
    )
    programs = min(plan.programs, m)
    sums = count * own + outer
    # Each row is read by the program that writes it, before: a gated x, the largest array of a
    # block, shares memory with its gradient, and the gradients do with the dequantised inputs.
    first = 1 + modulated + (d_skip is not None)
    aliases = {first + j: 1 + modulated + j for j in range(requantized)}
    if any(g.dtype != input_dtype for g in gradients):
        aliases = {}
    d_x, *outputs = pl.pallas_call(
        functools.partial(
            backward_kernel, count=count, outer=outer, own=own, modulated=modulated, gated=gated,
            eps=eps, padded=padded, programs=programs, requantize=requantized > 0,
            ahead=plan.ahead, skip=d_skip is not None,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *([] if times_silu is None else [jax.ShapeDtypeStruct((m, k), times_silu.dtype)]),
            *[jax.ShapeDtypeStruct((m, k), input_dtype)] * requantized,
            *[jax.ShapeDtypeStruct((sums * programs, k), jnp.float32)] * (sums > 0),
        ],
        grid=(programs,),
        input_output_aliases=aliases | ({0: 0} if gated else {}),
        compiler_params=pltriton.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
        name="norm_backward",
    )(
        x,
        *([] if times_silu is None else [times_silu]),
        *([] if d_skip is None else [d_skip]),
        *gradients,
        *(s.astype(jnp.float32).reshape(1) for s in gradient_scales),
        *([outer_weight, _flat(stats.outer)] if outer else []),
        *([*weights, _flat(stats.inner)] if own else []),
        *(_flat(a) for a in stats.absmaxes),
    )  # fmt: skip
    d_times_silu = outputs.pop(0) if modulated else None
    inputs = tuple(outputs[:requantized])
    totals = list(jnp.sum(outputs[-1].reshape(sums, programs, k), axis=1)) if sums else []
    d_weights = tuple(totals[:count]) if own else (None,) * count
    d_outer = totals[-1] if outer else None
    return d_x.reshape(given.shape), d_weights, d_outer, inputs, d_times_silu


def _flat(scalars: jax.Array | None) -> jax.Array:
    assert scalars is not None
    return scalars.reshape(-1)
