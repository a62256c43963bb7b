"""The forward of several BitLinears of one input, and their straight-through gradient.

The backward recomputes the quantised activations from x:

    d n_j = dY_j @ T(W_j)        d W_j = dY_j^T @ Q8(n_j)

and passes d n_j through the RMSNorm. Its products run in x's dtype with float32 accumulation, or
in int8 (`api.BACKWARDS`, int8_backward.py).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ..norm_quant import api as norm_quant
from ..norm_quant import xla as norm_xla
from ..norm_quant.api import Statistics
from ..over_tokens import TOKENS, WHOLE, over_tokens, partial_sums, total
from ..ternary_matmul import api as ternary_matmul
from . import int8_backward, int8_kernels, pallas_tpu


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static in a call."""

    eps: float
    outer_eps: float
    out_dtype: jnp.dtype
    int8_activations: bool
    implementation: str | None
    backward: str
    token_axes: tuple[str, ...]
    gated: bool
    skip: bool
    name: str
    weight_dtypes: tuple[jnp.dtype | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def bitlinears(
    options: Options,
    x: jax.Array,
    times_silu: jax.Array | None,
    outer_weight: jax.Array | None,
    norm_weights: tuple[jax.Array | None, ...],
    ws: tuple[jax.Array | None, ...],
    trits: tuple[jax.Array, ...],
    w_scales: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """The results of `api.bitlinear_many`, whose arguments are checked there."""
    return _forward(options, x, times_silu, outer_weight, norm_weights, ws, trits, w_scales)[0]


def _forward(
    options: Options,
    x: jax.Array,
    times_silu: jax.Array | None,
    outer_weight: jax.Array | None,
    norm_weights: tuple[jax.Array | None, ...],
    ws: tuple[jax.Array | None, ...],
    trits: tuple[jax.Array, ...],
    w_scales: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, ...], Any]:
    del ws  # The forward sees only the trits.
    distinct = _distinct(norm_weights)
    grouped = any(s.size > 1 for s in w_scales)
    if options.int8_activations and options.implementation == "pallas_tpu":
        if grouped:
            raise ValueError("implementation='pallas_tpu' takes one scale a matrix")
        outputs, stats = _forward_tpu(
            options, x, times_silu, outer_weight, norm_weights, trits, w_scales
        )
    elif options.int8_activations:
        _, qs, scales, stats = norm_quant.norm_quant(
            x,
            distinct,
            outer_weight,
            eps=options.eps,
            outer_eps=options.outer_eps,
            times_silu=times_silu,
            gated=options.gated,
            implementation=_norm_implementation(options),
            token_axes=options.token_axes,
        )
        outputs = tuple(
            ternary_matmul.ternary_matmul(
                q,
                scale,
                t,
                s,
                out_dtype=options.out_dtype,
                implementation=options.implementation,
                token_axes=options.token_axes,
            )
            for q, scale, t, s in zip(
                _each(qs, trits), _each(scales, trits), trits, w_scales, strict=True
            )
        )
    else:
        h = _ungated(options, x)
        stats = norm_xla.statistics(
            h,
            outer_weight,
            outer_eps=options.outer_eps,
            eps=options.eps,
            own_norm=distinct[0] is not None,
            times_silu=times_silu,
        )
        outputs = tuple(
            _unquantized_product(n, t, s).astype(options.out_dtype)
            for n, t, s in zip(
                _each(_unquantized(h, distinct, outer_weight, stats, times_silu), trits),
                trits,
                w_scales,
                strict=True,
            )
        )
    outputs = checkpoint_name(outputs, options.name)
    stats = checkpoint_name(stats, f"{options.name}_stats")
    residuals = (x, times_silu, outer_weight, norm_weights, trits, w_scales, stats)
    return (*outputs, x) if options.skip else outputs, residuals


def _forward_tpu(
    options: Options,
    x: jax.Array,
    times_silu: jax.Array | None,
    outer_weight: jax.Array | None,
    norm_weights: tuple[jax.Array | None, ...],
    trits: tuple[jax.Array, ...],
    w_scales: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, ...], Statistics]:
    """Each layer as one kernel, which makes its own quantised input."""

    def local(
        x: jax.Array,
        times_silu: jax.Array | None,
        outer_weight: jax.Array | None,
        norm_weights: tuple[jax.Array | None, ...],
        trits: tuple[jax.Array, ...],
        w_scales: tuple[jax.Array, ...],
    ) -> tuple[tuple[jax.Array, ...], Statistics]:
        h = _ungated(options, x)
        results = [
            pallas_tpu.bitlinear(
                h.reshape(-1, h.shape[-1]),
                b,
                outer_weight,
                t,
                s.reshape(1, 1),
                eps=options.eps,
                outer_eps=options.outer_eps,
                out_dtype=options.out_dtype,
                times_silu=None if times_silu is None else times_silu.reshape(-1, h.shape[-1]),
            )
            for b, t, s in zip(norm_weights, trits, w_scales, strict=True)
        ]
        outputs = tuple(y.reshape(*h.shape[:-1], y.shape[-1]) for y, _ in results)
        used = results if norm_weights[0] is not None else results[:1]
        stats = results[0][1]._replace(absmaxes=tuple(stats.absmaxes[0] for _, stats in used))
        return outputs, jax.tree.map(lambda a: a.reshape(*h.shape[:-1], 1), stats)

    split = over_tokens(local, options.token_axes, (TOKENS, TOKENS, *[WHOLE] * 4), (TOKENS, TOKENS))
    return split(x, times_silu, outer_weight, norm_weights, trits, w_scales)


def _backward(
    options: Options, residuals: Any, cotangents: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    x, times_silu, outer_weight, norm_weights, trits, w_scales, stats = residuals
    distinct = _distinct(norm_weights)
    *d_outputs, d_skip = cotangents if options.skip else (*cotangents, None)
    d_outputs = [d.astype(x.dtype) for d in d_outputs]
    any_weight = any(dtype is not None for dtype in options.weight_dtypes)

    # The products are stored in x's dtype, which halves the traffic of a bf16 backward; the
    # weights' scales go on afterwards, in float32.
    x_scales = [a / 127.0 for a in stats.absmaxes] if options.backward == "int8" else [None]
    w_scales_given = w_scales
    wide, w_scales = zip(
        *(_without_groups(t, s, x.dtype) for t, s in zip(trits, w_scales, strict=True)), strict=True
    )
    products = tuple(
        _input_gradient(options, d, t, scale if any_weight else None)
        for d, t, scale in zip(d_outputs, wide, _each(x_scales, trits), strict=True)
    )
    d_inputs, largest = (tuple(a) for a in zip(*products, strict=True))
    d_scales = w_scales
    if len(distinct) != len(d_inputs):
        scaled = [d * s.reshape(()) for d, s in zip(d_inputs, w_scales, strict=True)]
        d_inputs = (functools.reduce(jnp.add, scaled).astype(x.dtype),)
        d_scales = (jnp.ones((1, 1), jnp.float32),)
    d_x, d_norm_weights, d_outer, inputs, d_times_silu = norm_quant.norm_backward(
        x,
        distinct,
        outer_weight,
        stats if any_weight else stats._replace(absmaxes=()),
        d_inputs,
        d_scales,
        eps=options.eps,
        times_silu=times_silu,
        gated=options.gated,
        d_skip=d_skip,
        input_dtype=jnp.int8 if options.backward == "int8" else None,
        implementation=_norm_implementation(options),
        token_axes=options.token_axes,
    )

    d_ws = [None] * len(trits)
    if any_weight:
        if not options.int8_activations:
            h = _ungated(options, x)
            inputs = _unquantized(h, distinct, outer_weight, stats, times_silu)
        d_ws = [
            None if dtype is None else _weight_gradient(options, d, n, scale, columns, dtype)
            for d, n, scale, columns, dtype in zip(
                d_outputs,
                _each(inputs, trits),
                _each(x_scales, trits),
                largest,
                options.weight_dtypes,
                strict=True,
            )
        ]
    d_ws = [None if d is None else total(d) for d in d_ws]
    if options.gated:
        # The weight's gradient now, not when the scheduler likes: its operands are among the
        # largest arrays of a block, and the next layer's backward needs room.
        d_x, d_ws = jax.lax.optimization_barrier((d_x, d_ws))
    if len(d_norm_weights) != len(norm_weights):
        d_norm_weights = (None,) * len(norm_weights)
    return (
        d_x,
        d_times_silu,
        _as(outer_weight, d_outer),
        tuple(_as(b, d) for b, d in zip(norm_weights, d_norm_weights, strict=True)),
        tuple(d_ws),
        tuple(np.zeros(t.shape, jax.dtypes.float0) for t in trits),
        tuple(jnp.zeros_like(s) for s in w_scales_given),
    )


bitlinears.defvjp(_forward, _backward)


def _without_groups(
    trits: jax.Array, scale: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """A matrix and the one scale that is still to be multiplied by.

    Scales of groups cannot go on behind a sum over outputs: they go into the matrix, in x's dtype.
    """
    if scale.size == 1:
        return trits, scale
    return ternary_matmul.scaled(trits, scale).astype(dtype), jnp.ones((1, 1), jnp.float32)


def _unquantized_product(n: jax.Array, trits: jax.Array, scale: jax.Array) -> jax.Array:
    """n @ (trits * scale)^T in float32, for inputs without the quantiser."""
    matrix, scale = _without_groups(trits, scale, n.dtype)
    return _dot(n, matrix, 1, jnp.float32) * scale.reshape(())


def _as(weight: jax.Array | None, gradient: Any) -> jax.Array | None:
    """The gradient in its weight's dtype; None for a weight that is not there."""
    return None if weight is None else gradient.astype(weight.dtype)


def _distinct(norm_weights: tuple[jax.Array | None, ...]) -> tuple[jax.Array | None, ...]:
    """The norm weights that give different inputs: without own norms all share one."""
    return norm_weights if norm_weights[0] is not None else (None,)


def _norm_implementation(options: Options) -> str | None:
    """The norm's program that goes with the product's."""
    if options.implementation is None:
        return None
    if options.implementation.startswith("xla"):
        return "xla"
    return {"pallas_tpu": "pallas_tpu", "pallas_mosaic_gpu": "pallas_gpu"}.get(
        options.implementation
    )


def _ungated(options: Options, x: jax.Array) -> jax.Array:
    """What is normalised: x, or the gated linear unit of its halves, in x's dtype."""
    return norm_xla.glu(x).astype(x.dtype) if options.gated else x


def _unquantized(
    x: jax.Array,
    norm_weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    stats: Statistics,
    times_silu: jax.Array | None,
) -> list[jax.Array]:
    """The normalised inputs in x's dtype, for the study without int8."""
    _, v = norm_xla.normalize(x, outer_weight, stats, times_silu)
    return [norm_xla.weigh(v, b).astype(x.dtype) for b in norm_weights]


def _each(inputs: Sequence[Any], consumers: Sequence[Any]) -> Sequence[Any]:
    """One input for each consumer."""
    return inputs if len(inputs) == len(consumers) else [inputs[0]] * len(consumers)


def _input_gradient(
    options: Options, d: jax.Array, trits: jax.Array, x_scale: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """d T in d's dtype, and what the kernel of the weight's gradient needs to know of d."""
    if options.backward == "bf16":
        return _dot(d, trits, 0, d.dtype), None
    m = d.size // d.shape[-1]
    if int8_kernels.fit(
        m, *trits.shape, implementation=options.implementation, token_axes=options.token_axes
    ):
        return int8_kernels.input_gradient(
            d, trits, x_scale, d.dtype, token_axes=options.token_axes
        )
    return int8_backward.input_gradient(d, trits, d.dtype), None


def _weight_gradient(
    options: Options,
    d: jax.Array,
    x: jax.Array,
    x_scale: jax.Array | None,
    largest: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """d^T x over each device's tokens, for `total`.

    Args:
      options: of the call.
      d: [..., N].
      x: [..., K], the inputs in the compute dtype; in int8 with `x_scale`.
      x_scale: [..., 1]; None where the product is not in int8.
      largest: as `_input_gradient` returned it.
      out_dtype: of the result.

    Returns:
      [devices or 1, N, K].
    """
    if x_scale is None:
        dot = functools.partial(_token_dot, out_dtype=out_dtype)
        return partial_sums(dot, options.token_axes, 2)(d, x)
    if largest is None:
        return int8_backward.weight_gradient(d, x, x_scale, out_dtype)[None]
    return int8_kernels.weight_gradient(
        d, x, x_scale, largest, out_dtype, token_axes=options.token_axes
    )


def _dot(x: jax.Array, trits: jax.Array, axis: int, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """x contracted with an axis of the trits in x's dtype, accumulated in float32.

    Asked for bf16, the backends still accumulate in float32 and round once; asked for float32
    and a cast, XLA on GPUs writes the float32 matrix, transposed, and reads it again.
    """
    return jax.lax.dot_general(
        x,
        trits.astype(x.dtype),
        (((x.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=out_dtype,
        precision=_precision(x.dtype),
    )


def _token_dot(d: jax.Array, x: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """sum over tokens of d [..., N] and x [..., K]: [N, K], accumulated in float32."""
    tokens = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(
        d,
        x,
        ((tokens, tokens), ((), ())),
        preferred_element_type=out_dtype,
        precision=_precision(x.dtype),
    )


def _precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """Float32 products keep float32's precision; for bf16 operands there is nothing to keep."""
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
