"""A BitLinear's forward on TPU in one kernel: norm and quantisation in the product's prologue.

The grid walks the output's columns innermost. At the first of them a block of tokens is
normalised and quantised into VMEM; every block of weights then multiplies those integers, so
that the quantised activations never reach HBM.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ..norm_quant.reference import inverse_rms, round_to_int8, token_absmax
from ..norm_quant.xla import Statistics
from ..refs import Ref

_VMEM_BYTES = 64 << 20
_BLOCK_ELEMENTS = 1 << 20


def bitlinear(
    x: jax.Array,
    norm_weight: jax.Array | None,
    outer_weight: jax.Array | None,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    eps: float,
    outer_eps: float,
    out_dtype: jax.typing.DTypeLike,
    times_silu: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, Statistics]:
    """Q8(RMSNorm(RMSNorm_outer(x))) @ (trits w_scale)^T and the backward's scalars.

    Args:
      x: [M, K] float.
      norm_weight: [K], of the layer's own norm; None leaves it out.
      outer_weight: [K], of the norm in front of it; None leaves it out.
      trits: [N, K] int8.
      w_scale: [1, 1] float32.
      eps, outer_eps: of the norms.
      out_dtype: dtype of the result.
      times_silu: [M, K]; silu of it multiplies the outer norm's result.
      interpret: run as a JAX program, to check the arithmetic without a TPU.

    Returns:
      [M, N] of out_dtype; `norm_quant`'s statistics with one absmax.
    """
    (m, k), n = x.shape, trits.shape[0]
    own, outer = norm_weight is not None, outer_weight is not None
    block_m = max(32, min(512, _BLOCK_ELEMENTS // k // 32 * 32, 32 * pl.cdiv(m, 32)))
    block_n = n if n <= 256 else 256
    row = pl.BlockSpec((1, k), lambda i, j: (0, 0))
    scalar = pl.BlockSpec((block_m, 1), lambda i, j: (i, 0))
    scalars = jax.ShapeDtypeStruct((m, 1), jnp.float32)
    y, absmax, *rest = pl.pallas_call(
        functools.partial(
            _kernel, own=own, outer=outer, modulated=times_silu is not None, eps=eps,
            outer_eps=outer_eps,
        ),
        out_shape=[jax.ShapeDtypeStruct((m, n), out_dtype), *[scalars] * (1 + outer + own)],
        grid=(pl.cdiv(m, block_m), pl.cdiv(n, block_n)),
        in_specs=[
            pl.BlockSpec((block_m, k), lambda i, j: (i, 0)),
            pl.BlockSpec((block_n, k), lambda i, j: (j, 0)),
            pl.BlockSpec((1, 1), lambda i, j: (0, 0)),
            *[pl.BlockSpec((block_m, k), lambda i, j: (i, 0))] * (times_silu is not None),
            *[row] * (outer + own),
        ],
        out_specs=[
            pl.BlockSpec((block_m, block_n), lambda i, j: (i, j)),
            *[scalar] * (1 + outer + own),
        ],
        scratch_shapes=[pltpu.VMEM((block_m, k), jnp.int8), pltpu.VMEM((block_m, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="bitlinear",
    )(
        x, trits, w_scale, *([] if times_silu is None else [times_silu]),
        *(w[None] for w in (outer_weight, norm_weight) if w is not None),
    )  # fmt: skip
    return y, Statistics(rest[0] if outer else None, rest[-1] if own else None, (absmax,))


def _kernel(
    x_ref: Ref,
    t_ref: Ref,
    w_scale_ref: Ref,
    *all_refs: Ref,
    own: bool,
    outer: bool,
    modulated: bool,
    eps: float,
    outer_eps: float,
) -> None:
    refs = list(all_refs)
    silu_ref = refs.pop(0) if modulated else None
    outer_ref = refs.pop(0) if outer else None
    weight_ref = refs.pop(0) if own else None
    y_ref, absmax_ref, *stat_refs = refs[:-2]
    q_ref, scale_ref = refs[-2:]

    @pl.when(pl.program_id(1) == 0)
    def _quantize() -> None:
        v = x_ref[...].astype(jnp.float32)
        if outer_ref is not None:
            inverse = inverse_rms(v, eps=outer_eps)
            stat_refs[0][...] = inverse
            v = v * inverse * outer_ref[...].astype(jnp.float32)
        if silu_ref is not None:
            v = v * jax.nn.silu(silu_ref[...].astype(jnp.float32))
        if weight_ref is not None:
            inverse = inverse_rms(v, eps=eps)
            stat_refs[-1][...] = inverse
            v = v * inverse * weight_ref[...].astype(jnp.float32)
        absmax = token_absmax(v)
        absmax_ref[...] = absmax
        scale_ref[...] = absmax / 127.0
        q_ref[...] = round_to_int8(v, absmax)

    product = lax.dot_general(
        q_ref[...], t_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    scale = scale_ref[...] * w_scale_ref[...]
    y_ref[...] = (product.astype(jnp.float32) * scale).astype(y_ref.dtype)
