"""BitLinear with a straight-through gradient that keeps only its input and per-token scalars.

y_j = Q8(RMSNorm(x; b_j)) @ T(W_j)^T (arXiv 2406.02528, section 3.2 and Algorithm 1). The
forward reads the trits and their scale, made once a step by `ternarize`; the float master
weight is an argument only so that it can receive the gradient (`vjp.py`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ..ternary_matmul.api import check_scale
from . import int8_backward as int8_backward
from .vjp import Options, bitlinears

__all__ = ["BACKWARDS", "bitlinear", "bitlinear_many"]

BACKWARDS = ("bf16", "int8_dx", "int8")
"""Operands of the backward products: x's dtype in both; int8 in dX; int8 in dX and dW."""


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

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear
      >>> from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
      >>> w = jax.random.normal(jax.random.key(0), (3, 8))
      >>> def layer(x, w):
      ...     return bitlinear(x, jnp.ones(8), w, *ternarize(jax.lax.stop_gradient(w)), eps=1e-6)
      >>> layer(jnp.ones((2, 8)), w).shape
      (2, 3)
      >>> jax.grad(lambda w: layer(jnp.ones((2, 8)), w).sum())(w).shape  # straight through
      (3, 8)
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
      w_scales: one float32 each; or [N_j, K / GROUP] each, with backward "bf16".
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
        check_scale(s, t)
        if s.size > 1 and backward != "bf16":
            raise ValueError(f"backward={backward!r} needs one scale a matrix, got {s.shape}")
    options = Options(
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
    return bitlinears(
        options, x, times_silu, outer_norm_weight, own, tuple(ws), tuple(trits), tuple(w_scales)
    )
