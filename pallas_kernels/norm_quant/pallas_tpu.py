"""The double RMSNorm and quantisation on TPU: one pass each way over blocks of whole rows."""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ..refs import Ref
from .reference import round_to_int8, token_absmax
from .xla import Statistics, silu_slope

# Elements of a block of rows: each float32 temporary of a kernel takes four times as many bytes.
_BLOCK_ELEMENTS = 1 << 18


def block_rows(m: int, k: int) -> int:
    """Rows of a block: a multiple of int8's 32 sublanes, all rows where there are few."""
    rows = max(32, min(512, _BLOCK_ELEMENTS // k // 32 * 32))
    return min(rows, 32 * pl.cdiv(m, 32))


def norm_quant(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], Statistics]:
    """See `api.norm_quant`; x is [M, K]."""
    m, k = x.shape
    count = len(weights)
    own, outer, add = weights[0] is not None, outer_weight is not None, residual is not None
    rows = block_rows(m, k)
    block = pl.BlockSpec((rows, k), lambda i: (i, 0))
    weight = pl.BlockSpec((1, k), lambda i: (0, 0))
    scalar = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    scalars = 2 * count + outer + own
    outputs = pl.pallas_call(
        functools.partial(
            _forward_kernel, count=count, outer=outer, own=own, add=add,
            modulated=times_silu is not None, eps=eps, outer_eps=outer_eps,
        ),
        out_shape=[
            *[jax.ShapeDtypeStruct((m, k), x.dtype)] * add,
            *[jax.ShapeDtypeStruct((m, k), jnp.int8)] * count,
            *[jax.ShapeDtypeStruct((m, 1), jnp.float32)] * scalars,
        ],
        grid=(pl.cdiv(m, rows),),
        in_specs=[
            *[block] * (1 + add + (times_silu is not None)),
            *[weight] * (outer + own * count),
        ],
        out_specs=[*[block] * (add + count), *[scalar] * scalars],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name="norm_quant",
    )(
        x,
        *(a for a in (residual, times_silu) if a is not None),
        *(w[None] for w in (outer_weight, *weights) if w is not None),
    )  # fmt: skip
    outputs = list(outputs)
    x = outputs.pop(0) if add else x
    qs, scalars = tuple(outputs[:count]), outputs[count:]
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
    input_dtype: jax.typing.DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[
    jax.Array,
    tuple[jax.Array | None, ...],
    jax.Array | None,
    tuple[jax.Array, ...],
    jax.Array | None,
]:
    """See `pallas_gpu.norm_backward`; x is [M, K]."""
    del eps  # The kernel takes the outer norm's projection as it stands.
    m, k = x.shape
    count, requantized = len(weights), len(stats.absmaxes)
    own, outer, modulated = weights[0] is not None, outer_weight is not None, times_silu is not None
    # More blocks live at once than in the forward.
    rows = max(32, block_rows(m, (4 if modulated else 2) * k))
    block = pl.BlockSpec((rows, k), lambda i: (i, 0))
    weight = pl.BlockSpec((1, k), lambda i: (0, 0))
    scalar = pl.BlockSpec((rows, 1), lambda i: (i, 0))
    one = pl.BlockSpec((1, 1), lambda i: (0, 0))
    sums = count * own + outer
    d_x, *outputs = pl.pallas_call(
        functools.partial(
            _backward_kernel, m=m, rows=rows, count=count, outer=outer, own=own,
            modulated=modulated, requantize=requantized > 0,
        ),
        out_shape=[
            jax.ShapeDtypeStruct((m, k), x.dtype),
            *([] if times_silu is None else [jax.ShapeDtypeStruct((m, k), times_silu.dtype)]),
            *[jax.ShapeDtypeStruct((m, k), input_dtype or x.dtype)] * requantized,
            *[jax.ShapeDtypeStruct((1, k), jnp.float32)] * sums,
        ],
        grid=(pl.cdiv(m, rows),),
        in_specs=[
            *[block] * (1 + modulated + count),
            *[one] * count,
            *[weight, scalar] * outer,
            *([*[weight] * count, scalar] if own else []),
            *[scalar] * requantized,
        ],
        out_specs=[*[block] * (1 + modulated + requantized), *[weight] * sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name="norm_backward",
    )(
        x,
        *([] if times_silu is None else [times_silu]),
        *gradients,
        *(s.astype(jnp.float32).reshape(1, 1) for s in gradient_scales),
        *([outer_weight[None], stats.outer] if outer_weight is not None else []),
        *([*(w[None] for w in weights if w is not None), stats.inner] if own else []),
        *stats.absmaxes,
    )  # fmt: skip
    d_times_silu = outputs.pop(0) if modulated else None
    inputs = tuple(outputs[:requantized])
    totals = [s[0] for s in outputs[requantized:]]
    d_weights = tuple(totals[:count]) if own else (None,) * count
    return d_x, d_weights, totals[-1] if outer else None, inputs, d_times_silu


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _forward_kernel(
    x_ref: Ref,
    *all_refs: Ref,
    count: int,
    outer: bool,
    own: bool,
    add: bool,
    modulated: bool,
    eps: float,
    outer_eps: float,
) -> None:
    refs = list(all_refs)
    residual_ref = refs.pop(0) if add else None
    silu_ref = refs.pop(0) if modulated else None
    outer_ref = refs.pop(0) if outer else None
    weight_refs = [refs.pop(0) if own else None for _ in range(count)]
    sum_ref = refs.pop(0) if add else None
    q_refs, scale_refs = refs[:count], refs[count : 2 * count]
    absmax_refs, stat_refs = refs[2 * count : 3 * count], refs[3 * count :]
    v = x_ref[...].astype(jnp.float32)
    if residual_ref is not None and sum_ref is not None:
        # Rounded as it is stored, so that the backward sees the same sum.
        total = (v + residual_ref[...].astype(jnp.float32)).astype(x_ref.dtype)
        sum_ref[...] = total
        v = total.astype(jnp.float32)
    if outer_ref is not None:
        inverse = _inverse_rms(v, outer_eps)
        stat_refs[0][...] = inverse
        v = v * inverse * outer_ref[...].astype(jnp.float32)
    if silu_ref is not None:
        v = v * jax.nn.silu(silu_ref[...].astype(jnp.float32))
    if own:
        inverse = _inverse_rms(v, eps)
        stat_refs[-1][...] = inverse
        v = v * inverse
    for j, ref in enumerate(weight_refs):
        n = v if ref is None else v * ref[...].astype(jnp.float32)
        absmax = token_absmax(n)
        absmax_refs[j][...] = absmax
        scale_refs[j][...] = absmax / 127.0
        q_refs[j][...] = round_to_int8(n, absmax)


def _backward_kernel(
    x_ref: Ref,
    *all_refs: Ref,
    m: int,
    rows: int,
    count: int,
    outer: bool,
    own: bool,
    modulated: bool,
    requantize: bool,
) -> None:
    refs = list(all_refs)
    silu_ref = refs.pop(0) if modulated else None
    gradient_refs = [refs.pop(0) for _ in range(count)]
    scale_refs = [refs.pop(0) for _ in range(count)]
    outer_ref, outer_stat_ref = (refs.pop(0), refs.pop(0)) if outer else (None, None)
    weight_refs = [refs.pop(0) if own else None for _ in range(count)]
    stat_ref = refs.pop(0) if own else None
    absmax_refs = [refs.pop(0) for _ in range(count)] if requantize else []
    d_x_ref = refs.pop(0)
    d_silu_ref = refs.pop(0) if modulated else None
    input_refs = [refs.pop(0) for _ in absmax_refs]
    sum_refs = refs
    index = pl.program_id(0)
    # The last block may reach beyond the end, where the refs hold anything at all.
    inside = index * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0) < m

    def read(ref: Ref) -> jax.Array:
        return jnp.where(inside, ref[...].astype(jnp.float32), 0.0)

    def through_norm(d: jax.Array, x_hat: jax.Array, inverse: jax.Array) -> jax.Array:
        return inverse * (d - x_hat * jnp.mean(d * x_hat, axis=-1, keepdims=True))

    def add_up(ref: Ref, terms: jax.Array) -> None:
        total = jnp.sum(terms, axis=0, keepdims=True)

        @pl.when(index == 0)
        def _() -> None:
            ref[...] = total

        @pl.when(index > 0)
        def _() -> None:
            ref[...] += total

    x_hat = read(x_ref)
    if outer_ref is not None:
        outer_inverse, a = read(outer_stat_ref), outer_ref[...].astype(jnp.float32)
        x_hat = x_hat * outer_inverse
    z_hat = x_hat
    if silu_ref is not None:
        s = read(silu_ref)
        silu = jax.nn.silu(s)
        z_hat = x_hat * silu
    v = z_hat if outer_ref is None else z_hat * a
    if own:
        inverse = read(stat_ref)
        v = v * inverse
    terms = []
    for j in range(count):
        weight_ref = weight_refs[j]
        b = None if weight_ref is None else weight_ref[...].astype(jnp.float32)
        if requantize:
            absmax = read(absmax_refs[j])
            n = v if b is None else v * b
            q = round_to_int8(n, absmax)
            if input_refs[j].dtype != jnp.int8:
                q = (q.astype(jnp.float32) * (absmax / 127.0)).astype(x_ref.dtype)
            input_refs[j][...] = q
        g = read(gradient_refs[j]) * scale_refs[j][...]
        if b is not None:
            add_up(sum_refs[j], g * v)
            g = g * b
        terms.append(g)
    d = functools.reduce(jnp.add, terms)
    if own:
        d = through_norm(d, v, inverse)
    if outer_ref is not None:
        add_up(sum_refs[-1], d * z_hat)
        d = d * a
        if d_silu_ref is not None:
            d_silu_ref[...] = (d * x_hat * silu_slope(s)).astype(d_silu_ref.dtype)
            d = d * silu
        d = through_norm(d, x_hat, outer_inverse)
    d_x_ref[...] = d.astype(d_x_ref.dtype)
