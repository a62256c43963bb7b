"""BitLinear with a straight-through gradient that keeps only its input and per-token scalars.

y_j = Q8(RMSNorm(x; b_j)) @ T(W_j)^T (arXiv 2406.02528, section 3.2 and Algorithm 1). The
forward reads the trits and their scale, made once a step by `ternarize`; the float master
weight is an argument only so that it can receive the gradient. The backward recomputes the
quantised activations from x:

    d n_j = dY_j @ T(W_j)        d W_j = dY_j^T @ Q8(n_j)

and passes d n_j through the RMSNorm. Its products run in x's dtype with float32 accumulation, or
in int8 (`BACKWARDS`, int8_backward.py).
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
from ..over_tokens import TOKENS, WHOLE, over_tokens
from ..ternary_matmul import api as ternary_matmul
from . import int8_backward, pallas_tpu

# Operands of the backward products: x's dtype in both; int8 in dX; int8 in dX and dW.
BACKWARDS = ("bf16", "int8_dx", "int8")


@dataclasses.dataclass(frozen=True)
class _Options:
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


def bitlinear(
    x: jax.Array,
    norm_weight: jax.Array | None,
    w: jax.Array | None,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    eps: float,
    out_dtype: jax.typing.DTypeLike | None = None,
    norm: bool = True,
    gated: bool = False,
    int8_activations: bool = True,
    implementation: str | None = None,
    backward: str = "bf16",
    token_axes: Sequence[str] = (),
) -> jax.Array:
    """Q8(RMSNorm(x)) @ T(W)^T; see `bitlinear_many`, of which this is the case of one.

    Args:
      x: [..., K] float.
      norm_weight: [K]; may be None where `norm` is False.
      w: [N, K] float master weight, read for nothing but its gradient; None at inference.
      trits: [N, K] int8, and
      w_scale: one float32: `ternarize(w)`.
      eps: the norm's.
      out_dtype: of the result; x's when None.
      norm: False leaves the RMSNorm out.
      gated: x is [..., 2K], gate and up side by side, and silu(gate) * up is normalised.
      int8_activations: False leaves the activations' quantiser out (a study's option).
      implementation: of the ternary product (its `IMPLEMENTATIONS`), and with it of the norm;
        None takes the measured best of each.
      backward: one of `BACKWARDS`.
      token_axes: mesh axes that split x's leading axis. Without them a mesh of several
        devices takes the XLA program, which needs no telling.

    Returns:
      [..., N] of out_dtype.
    """
    if norm and norm_weight is None:
        raise ValueError("norm=True needs norm_weight, got None: pass it, or norm=False")
    return bitlinear_many(
        x,
        (norm_weight,) if norm else None,
        (w,),
        (trits,),
        (w_scale,),
        eps=eps,
        out_dtype=out_dtype,
        gated=gated,
        int8_activations=int8_activations,
        implementation=implementation,
        backward=backward,
        token_axes=token_axes,
    )[0]


def bitlinear_many(
    x: jax.Array,
    norm_weights: Sequence[jax.Array | None] | None,
    ws: Sequence[jax.Array | None],
    trits: Sequence[jax.Array],
    w_scales: Sequence[jax.Array],
    *,
    eps: float,
    outer_norm_weight: jax.Array | None = None,
    outer_eps: float = 1e-6,
    out_dtype: jax.typing.DTypeLike | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    skip: bool = False,
    name: str = "bitlinear",
    int8_activations: bool = True,
    implementation: str | None = None,
    backward: str = "bf16",
    token_axes: Sequence[str] = (),
) -> tuple[jax.Array, ...]:
    """Several BitLinears of one input, behind an optional outer RMSNorm.

    Equal to `rms_norm(x, outer_norm_weight)` followed by each `bitlinear` in float32, with
    the statistics taken once and one residual kept for all.

    Args:
      x: [..., K] float.
      norm_weights: the BitLinears' own norm weights, [K] each; None leaves their norms out,
        and the quantised input is then shared.
      ws: float master weights [N_j, K], read for nothing but their gradients, or None each.
      trits: [N_j, K] int8 each.
      w_scales: one float32 each.
      eps: the own norms'.
      outer_norm_weight: [K], the block's norm in front of all; None leaves it out.
      outer_eps: the outer norm's.
      out_dtype: of the results; x's when None.
      times_silu: [..., K]; RMSNorm_outer(x) * silu(times_silu), recomputed in the backward
        rather than kept, takes the outer norm's place (MLGRU's gated output).
      gated: x is [..., 2K], gate and up side by side, and silu(gate) * up, recomputed in the
        backward rather than kept, takes x's place.
      skip: return x as well, for a residual connection around the layers: the gradient that
        comes back through it is added in the norm's own backward pass.
      name: under which `jax.checkpoint` policies find the outputs, and with "_stats" appended
        the per-token scalars that the backward needs.
      int8_activations: False leaves the activations' quantiser out (a study's option).
      implementation: of the ternary product (its `IMPLEMENTATIONS`), and with it of the norm;
        None takes the measured best of each.
      backward: one of `BACKWARDS`.
      token_axes: mesh axes that split x's leading axis. Without them a mesh of several
        devices takes the XLA program, which needs no telling.

    Returns:
      [..., N_j] of out_dtype for each j; with `skip`, x after them.

    Raises:
      TypeError: x is not floating, or trits are not int8.
      ValueError: sequences of different lengths, or shapes that do not fit.
    """
    count = len(trits)
    own = (None,) * count if norm_weights is None else tuple(norm_weights)
    for what, sequence in (("norm_weights", own), ("ws", ws), ("w_scales", w_scales)):
        if len(sequence) != count:
            raise ValueError(f"{what} has {len(sequence)} entries, trits has {count}")
    if backward not in BACKWARDS:
        raise ValueError(f"backward={backward!r} is unknown; choose one of {', '.join(BACKWARDS)}")
    if backward == "int8" and not int8_activations:
        raise ValueError("backward='int8' needs int8_activations: the weights' gradients read them")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x must be floating, got {x.dtype}")
    if norm_weights is not None and any(b is None for b in own):
        raise ValueError("norm_weights holds None: pass all of them, or None for no own norm")
    columns = x.shape[-1] // (2 if gated else 1)
    if gated and x.shape[-1] % 2:
        raise ValueError(f"a gated x must be [..., 2K], got {x.shape}")
    if times_silu is not None and (outer_norm_weight is None or gated):
        raise ValueError("times_silu needs outer_norm_weight, and not gated=True")
    if times_silu is not None and times_silu.shape != x.shape:
        raise ValueError(f"times_silu must be {x.shape} as x, got {times_silu.shape}")
    for what, weight in (
        ("outer_norm_weight", outer_norm_weight),
        *(("norm_weight", b) for b in own),
    ):
        if weight is not None and weight.shape != (columns,):
            raise ValueError(f"{what} must be {(columns,)}, got {weight.shape}")
    for w, t, s in zip(ws, trits, w_scales, strict=True):
        if t.dtype != jnp.int8:
            raise TypeError(f"trits must be int8, got {t.dtype}: use ternarize(w)")
        if t.ndim != 2 or t.shape[1] != columns:
            raise ValueError(f"trits must be [N, {columns}] for x {x.shape}, got {t.shape}")
        if w is not None and w.shape != t.shape:
            raise ValueError(f"w must be {t.shape} as its trits, got {w.shape}")
        if s.size != 1:
            raise ValueError(f"w_scale must hold one element, got shape {s.shape}")
    options = _Options(
        eps=float(eps),
        outer_eps=float(outer_eps),
        out_dtype=jnp.dtype(out_dtype or x.dtype),
        int8_activations=int8_activations,
        implementation=implementation,
        backward=backward,
        token_axes=tuple(token_axes),
        gated=gated,
        skip=skip,
        name=name,
        weight_dtypes=tuple(None if w is None else w.dtype for w in ws),
    )
    return _bitlinears(
        options, x, times_silu, outer_norm_weight, own, tuple(ws), tuple(trits), tuple(w_scales)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bitlinears(
    options: _Options,
    x: jax.Array,
    times_silu: jax.Array | None,
    outer_weight: jax.Array | None,
    norm_weights: tuple[jax.Array | None, ...],
    ws: tuple[jax.Array | None, ...],
    trits: tuple[jax.Array, ...],
    w_scales: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    return _forward(options, x, times_silu, outer_weight, norm_weights, ws, trits, w_scales)[0]


def _forward(
    options: _Options,
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
    if options.int8_activations and options.implementation == "pallas_tpu":
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
            (_dot(n, t, 1, jnp.float32) * s.reshape(())).astype(options.out_dtype)
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
    options: _Options,
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
    options: _Options, residuals: Any, cotangents: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    x, times_silu, outer_weight, norm_weights, trits, w_scales, stats = residuals
    distinct = _distinct(norm_weights)
    *d_outputs, d_skip = cotangents if options.skip else (*cotangents, None)
    d_outputs = [d.astype(x.dtype) for d in d_outputs]
    any_weight = any(dtype is not None for dtype in options.weight_dtypes)

    # The products are stored in x's dtype, which halves the traffic of a bf16 backward; the
    # weights' scales go on afterwards, in float32.
    into_inputs = _dot_rows if options.backward == "bf16" else int8_backward.input_gradient
    d_inputs = tuple(into_inputs(d, t, d.dtype) for d, t in zip(d_outputs, trits, strict=True))
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
        implementation=_norm_implementation(options),
        token_axes=options.token_axes,
    )

    d_ws = [None] * len(trits)
    if any_weight:
        if not options.int8_activations:
            h = _ungated(options, x)
            inputs = _unquantized(h, distinct, outer_weight, stats, times_silu)
        into_weights = functools.partial(_weight_gradient, options)
        d_ws = [
            None if dtype is None else into_weights(d, n, absmax, dtype)
            for d, n, absmax, dtype in zip(
                d_outputs,
                _each(inputs, trits),
                _each(stats.absmaxes or (None,), trits),
                options.weight_dtypes,
                strict=True,
            )
        ]
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
        tuple(jnp.zeros_like(s) for s in w_scales),
    )


_bitlinears.defvjp(_forward, _backward)


def _as(weight: jax.Array | None, gradient: Any) -> jax.Array | None:
    """The gradient in its weight's dtype; None for a weight that is not there."""
    return None if weight is None else gradient.astype(weight.dtype)


def _distinct(norm_weights: tuple[jax.Array | None, ...]) -> tuple[jax.Array | None, ...]:
    """The norm weights that give different inputs: without own norms all share one."""
    return norm_weights if norm_weights[0] is not None else (None,)


def _norm_implementation(options: _Options) -> str | None:
    """The norm's program that goes with the product's."""
    if options.implementation is None:
        return None
    if options.implementation.startswith("xla"):
        return "xla"
    return "pallas_tpu" if options.implementation == "pallas_tpu" else "pallas_triton"


def _ungated(options: _Options, x: jax.Array) -> jax.Array:
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


def _weight_gradient(
    options: _Options,
    d: jax.Array,
    x: jax.Array,
    absmax: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """d^T x over tokens, where x holds the dequantised inputs, [..., K] in the compute dtype."""
    if options.backward != "int8" or absmax is None:
        return _token_dot(d, x, out_dtype)
    # The int8 inputs again: 127 steps of a row survive the 8 bits of a bfloat16's fraction.
    scale = absmax / 127
    q = jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -128, 127).astype(jnp.int8)
    return int8_backward.weight_gradient(d, q, scale, out_dtype)


def _dot_rows(d: jax.Array, trits: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    return _dot(d, trits, 0, out_dtype)


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
