"""The double RMSNorm and int8 quantisation for several consumers: the public door.

`norm_quant` and `norm_backward` are each other's forward and backward, for callers that
write their own VJP (the op `bitlinear` does): neither is differentiable itself.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..dispatch import measured_best
from ..over_tokens import TOKENS, WHOLE, covers_mesh, devices_in_mesh, over_tokens
from . import pallas_gpu, pallas_tpu, xla
from .reference import MIN_ABSMAX, norm_quantize, quantize_int8, rms_norm
from .xla import Statistics

__all__ = [
    "IMPLEMENTATIONS",
    "MIN_ABSMAX",
    "Statistics",
    "default_implementation",
    "norm_backward",
    "norm_quant",
    "norm_quantize",
    "quantize_int8",
    "rms_norm",
]

IMPLEMENTATIONS = ("xla", "pallas_gpu", "pallas_tpu")
"""Names that `implementation` takes."""
_KERNELS = {"pallas_gpu": pallas_gpu, "pallas_tpu": pallas_tpu}
_WIDEST = 8192  # Columns; wider rows stop fitting in a program's registers.


def default_implementation(
    k: int,
    *,
    device_kind: str | None = None,
    token_axes: Sequence[str] = (),
) -> str:
    """What `implementation=None` means for K columns on a device, by default the first one."""
    if k > _WIDEST or not covers_mesh(token_axes):
        return "xla"
    kind = device_kind or jax.devices()[0].device_kind
    return measured_best("norm_quant", (k,), device_kind=kind) or "xla"


def norm_quant(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None = None,
    *,
    eps: float,
    outer_eps: float = 1e-6,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    implementation: str | None = None,
    token_axes: Sequence[str] = (),
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], Statistics]:
    """Q8(RMSNorm_j(RMSNorm_outer(x + residual))) for each consumer j, in one pass.

    With `gated`, silu(gate) * up takes the place of x + residual. With `times_silu` (s), so
    does RMSNorm_outer(x) * silu(s) that of RMSNorm_outer(x), as behind a gated recurrence.

    Args:
      x: [..., K] float; [..., 2K] gated, gate and up side by side.
      weights: the consumers' own norm weights, [K] each; (None,) for one input without.
      outer_weight: [K], of the norm in front of all; None leaves it out.
      eps: of the own norms.
      outer_eps: of the outer norm.
      residual: [..., K] to add to x first; not with `gated`.
      times_silu: [..., K] float; with an outer norm, and neither `residual` nor `gated`.
      gated: x is the input of a gated linear unit.
      implementation: one of `IMPLEMENTATIONS`; None takes the measured best.
      token_axes: mesh axes over which x's leading axis is split, for the Pallas kernels.
      interpret: run the kernel as a JAX program, to check it without its device.

    Returns:
      x + residual in x's dtype (x itself without one, or gated); the int8 inputs [..., K] and their
      scales [..., 1] float32; and the per-token scalars that `norm_backward` takes.

    Raises:
      ValueError: an unknown implementation, or options that exclude each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.norm_quant.api import norm_quant
      >>> x, ones = jnp.array([[3.0, -4.0]]), jnp.ones(2)
      >>> _, (q_i, q_f), scales, _ = norm_quant(x, (ones, 2 * ones), eps=1e-6)
      >>> q_i.dtype, q_f.shape, [round(float(scale[0, 0]), 4) for scale in scales]
      (dtype('int8'), (1, 2), [0.0089, 0.0178])
    """
    k = x.shape[-1] // (2 if gated else 1)
    room = _Room((x, residual, times_silu), k * len(weights), (*weights, outer_weight))
    implementation = _check(implementation, k, token_axes, room)
    if times_silu is not None and (outer_weight is None or gated or residual is not None):
        raise ValueError("times_silu needs outer_weight, and neither gated=True nor a residual")
    if gated and residual is not None:
        raise ValueError("gated=True takes no residual: add it to what x was made from")
    if gated and implementation != "pallas_gpu":
        h = xla.glu(x).astype(x.dtype)
        results = norm_quant(
            h, weights, outer_weight, eps=eps, outer_eps=outer_eps,
            implementation=implementation, token_axes=token_axes, interpret=interpret,
        )  # fmt: skip
        return x, *results[1:]
    if implementation == "xla":
        return xla.norm_quant(
            x, weights, outer_weight, eps=eps, outer_eps=outer_eps, residual=residual,
            times_silu=times_silu,
        )  # fmt: skip
    kernel = functools.partial(_KERNELS[implementation].norm_quant, interpret=interpret)
    if gated:
        kernel = functools.partial(kernel, gated=True)

    def local(
        x: jax.Array,
        residual: jax.Array | None,
        times_silu: jax.Array | None,
        weights: tuple[jax.Array | None, ...],
        outer_weight: jax.Array | None,
    ) -> tuple[Any, ...]:
        shape = x.shape
        x, residual, times_silu = jax.tree.map(_matrix, (x, residual, times_silu))
        results = kernel(
            x, weights, outer_weight, eps=eps, outer_eps=outer_eps, residual=residual,
            times_silu=times_silu,
        )  # fmt: skip
        return jax.tree.map(lambda a: a.reshape(*shape[:-1], a.shape[-1]), results)

    split = over_tokens(local, token_axes, (TOKENS, TOKENS, TOKENS, WHOLE, WHOLE), (TOKENS,) * 4)
    return split(x, residual, times_silu, tuple(weights), outer_weight)


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
    implementation: str | None = None,
    token_axes: Sequence[str] = (),
    interpret: bool = False,
) -> tuple[
    jax.Array,
    tuple[jax.Array | None, ...],
    jax.Array | None,
    tuple[jax.Array, ...],
    jax.Array | None,
]:
    """The backward of `norm_quant` with the quantiser straight through, in one pass.

    Args:
      x: [..., K]: the sum that `norm_quant` returned; [..., 2K] gated.
      weights, outer_weight, eps, times_silu, gated: as given to it.
      stats: as it returned.
      gradients: [..., K] for each consumer, to be multiplied by
      gradient_scales: one float32 each.
      d_skip: x's gradient through a connection around the norm, to be added; in x's dtype.
      input_dtype: of the inputs that are returned; int8 for them as they are quantised, without
        their scales. None: x's dtype.
      implementation, token_axes, interpret: see `norm_quant`.

    Returns:
      The gradient of x in x's dtype; of each own weight and of the outer weight in float32
      (None where there is none); the dequantised inputs [..., K] in `input_dtype`, one for
      each absmax in stats; and the gradient of times_silu in its dtype, or None.
    """
    k = gradients[0].shape[-1]
    apart = [g for g in gradients if stats.absmaxes and g.dtype != (input_dtype or x.dtype)]
    written = k * len(apart) * jnp.dtype(input_dtype or x.dtype).itemsize
    room = _Room((x, times_silu, d_skip, *gradients), written, (*weights, outer_weight))
    implementation = _check(implementation, k, token_axes, room)
    if d_skip is not None and (gated or implementation != "pallas_gpu"):
        d_x, d_weights, d_outer, inputs, d_s = norm_backward(
            x, weights, outer_weight, stats, gradients, gradient_scales, eps=eps,
            times_silu=times_silu, gated=gated, input_dtype=input_dtype,
            implementation=implementation, token_axes=token_axes, interpret=interpret,
        )  # fmt: skip
        return d_x + d_skip, d_weights, d_outer, inputs, d_s
    if gated and implementation != "pallas_gpu":
        h = xla.glu(x).astype(x.dtype)
        d_h, d_weights, d_outer, inputs, _ = norm_backward(
            h, weights, outer_weight, stats, gradients, gradient_scales, eps=eps,
            input_dtype=input_dtype, implementation=implementation, token_axes=token_axes,
            interpret=interpret,
        )  # fmt: skip
        return xla.glu_backward(x, d_h), d_weights, d_outer, inputs, None
    if implementation == "xla":
        wide = tuple(
            g.astype(jnp.float32) * s.reshape(())
            for g, s in zip(gradients, gradient_scales, strict=True)
        )
        d_x, d_weights, d_outer, d_s = xla.norm_backward(
            x, weights, outer_weight, stats, wide, times_silu
        )
        inputs = ()
        if stats.absmaxes:
            inputs = xla.requantize(
                x, weights, outer_weight, stats, dtype=input_dtype or x.dtype, times_silu=times_silu
            )
        if times_silu is not None and d_s is not None:
            d_s = d_s.astype(times_silu.dtype)
        return d_x.astype(x.dtype), d_weights, d_outer, inputs, d_s

    kernel = functools.partial(
        _KERNELS[implementation].norm_backward, input_dtype=input_dtype, interpret=interpret
    )
    if gated:
        kernel = functools.partial(kernel, gated=True)
    split_over_mesh = bool(token_axes) and devices_in_mesh() > 1

    def local(
        x: jax.Array,
        times_silu: jax.Array | None,
        d_skip: jax.Array | None,
        stats: Statistics,
        gradients: tuple[jax.Array, ...],
        weights: tuple[jax.Array | None, ...],
        outer_weight: jax.Array | None,
        gradient_scales: tuple[jax.Array, ...],
    ) -> tuple[Any, ...]:
        shape = gradients[0].shape
        d_x, *sums, inputs, d_s = kernel(
            _matrix(x), weights, outer_weight, jax.tree.map(_matrix, stats),
            tuple(_matrix(g) for g in gradients), gradient_scales, eps=eps,
            times_silu=jax.tree.map(_matrix, times_silu),
            **({} if d_skip is None else {"d_skip": _matrix(d_skip)}),
        )  # fmt: skip
        if split_over_mesh:
            sums = jax.lax.psum(sums, tuple(token_axes))
        inputs, d_s = jax.tree.map(lambda a: a.reshape(shape), (inputs, d_s))
        return d_x.reshape(x.shape), *sums, inputs, d_s

    split = over_tokens(
        local,
        token_axes,
        (TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, WHOLE, WHOLE, WHOLE),
        (TOKENS, WHOLE, WHOLE, TOKENS, TOKENS),
    )
    return split(
        x, times_silu, d_skip, stats, tuple(gradients), tuple(weights), outer_weight,
        tuple(gradient_scales),
    )  # fmt: skip


class _Room(NamedTuple):
    """What a token needs of shared memory."""

    read: tuple[jax.Array | None, ...]  # arrays of tokens
    written: int  # bytes that do not take the place of what was read
    vectors: tuple[jax.Array | None, ...]

    def serves(self, k: int) -> bool:
        """Whether the GPU's kernels have it."""
        read = sum(a.shape[-1] * a.dtype.itemsize for a in self.read if a is not None)
        vectors = sum(a is not None for a in self.vectors)
        return pallas_gpu.takes(k, read + self.written, vectors)


def _check(implementation: str | None, k: int, token_axes: Sequence[str], room: _Room) -> str:
    if implementation is None:
        implementation = default_implementation(k, token_axes=token_axes)
        if implementation == "pallas_gpu" and not room.serves(k):
            implementation = "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: choose one of {IMPLEMENTATIONS}"
        )
    return implementation


def _matrix(a: jax.Array) -> jax.Array:
    return a.reshape(-1, a.shape[-1])
