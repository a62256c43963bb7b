"""Double RMSNorm and int8 quantisation for several consumers, forward and backward, in jnp.

Several BitLinears read one input: an optional outer RMSNorm (a block's norm, weight a)
is followed in each BitLinear by its own (weight b_j). The statistics do not depend on
b_j, so they are taken once:

    u = x r_o a,    r_o = 1 / sqrt(mean(x^2) + eps_o)        (u = x without the outer norm)
                    with s given, u = x r_o a silu(s)
    v = u r_i,      r_i = 1 / sqrt(mean(u^2) + eps)          (v = u without the own norms)
    n_j = v b_j,    q_j = round(n_j 127 / max|n_j|)

The backward takes the gradients of n_j (the quantiser is straight through), x and the
per-token scalars, and recomputes the rest. XLA fuses each function into a pass or two.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .reference import inverse_rms, round_to_int8, token_absmax


class Statistics(NamedTuple):
    """Per-token scalars, [..., 1] float32 each: all that the backward keeps beside x."""

    outer: jax.Array | None  # The outer norm's inverse RMS; None where there is no such norm.
    inner: jax.Array | None  # The own norms'.
    absmaxes: tuple[jax.Array, ...] = ()  # max|n_j|; none where nothing was quantised.


def glu(x: jax.Array) -> jax.Array:
    """silu(gate) * up of [..., 2K], gate first: [..., K] float32."""
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jax.nn.silu(gate) * up


def silu_slope(x: jax.Array) -> jax.Array:
    """The derivative of silu."""
    sigmoid = jax.nn.sigmoid(x)
    return sigmoid + x * sigmoid * (1.0 - sigmoid)


def glu_backward(x: jax.Array, d: jax.Array) -> jax.Array:
    """The gradient of x [..., 2K] in its dtype, from that of `glu(x)`.

    One pass that writes both halves in place: XLA makes a concatenation of two results
    out of the transposed split.
    """
    pair = x.astype(jnp.float32).reshape(*d.shape[:-1], 2, d.shape[-1])
    gate, up = pair[..., :1, :], pair[..., 1:, :]
    is_gate = jnp.array([[True], [False]])
    slope = jnp.where(is_gate, up * silu_slope(gate), jax.nn.silu(gate))
    return (d.astype(jnp.float32)[..., None, :] * slope).astype(x.dtype).reshape(x.shape)


def statistics(
    x: jax.Array,
    outer_weight: jax.Array | None,
    *,
    outer_eps: float,
    eps: float,
    own_norm: bool,
    times_silu: jax.Array | None = None,
) -> Statistics:
    """The inverse RMS of x and of the outer-normalised x."""
    outer = None
    if outer_weight is not None:
        outer = inverse_rms(x, eps=outer_eps)
        x = x.astype(jnp.float32) * outer * _outer_factor(outer_weight, times_silu)
    return Statistics(outer, inverse_rms(x, eps=eps) if own_norm else None)


def _outer_factor(outer_weight: jax.Array, times_silu: jax.Array | None) -> jax.Array:
    """a, or a silu(s): what multiplies x r_o."""
    a = outer_weight.astype(jnp.float32)
    return a if times_silu is None else a * jax.nn.silu(times_silu.astype(jnp.float32))


def normalize(
    x: jax.Array,
    outer_weight: jax.Array | None,
    stats: Statistics,
    times_silu: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(x r_o, v) in float32, v before the own norm weights; x r_o is x without outer norm."""
    x = x.astype(jnp.float32)
    x_hat = x if stats.outer is None else x * stats.outer
    u = x_hat if outer_weight is None else x_hat * _outer_factor(outer_weight, times_silu)
    return x_hat, (u if stats.inner is None else u * stats.inner)


def weigh(v: jax.Array, weight: jax.Array | None) -> jax.Array:
    """n_j = v b_j; v itself where there is no own norm."""
    return v if weight is None else v * weight.astype(jnp.float32)


def norm_quant(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], Statistics]:
    """x + residual, the int8 inputs q_j, their scales and the scalars; see `api.norm_quant`."""
    if residual is not None:
        x = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
    stats = statistics(
        x, outer_weight, outer_eps=outer_eps, eps=eps, own_norm=weights[0] is not None,
        times_silu=times_silu,
    )  # fmt: skip
    _, v = normalize(x, outer_weight, stats, times_silu)
    normalized = [weigh(v, weight) for weight in weights]
    absmaxes = tuple(token_absmax(n) for n in normalized)
    return (
        x,
        tuple(round_to_int8(n, a) for n, a in zip(normalized, absmaxes, strict=True)),
        tuple(a / 127.0 for a in absmaxes),
        stats._replace(absmaxes=absmaxes),
    )


def requantize(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    stats: Statistics,
    *,
    dtype: jax.typing.DTypeLike,
    times_silu: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """The inputs recomputed for the weights' gradients: q_j in int8, or q_j absmax_j / 127."""
    _, v = normalize(x, outer_weight, stats, times_silu)
    qs = [round_to_int8(weigh(v, b), a) for b, a in zip(weights, stats.absmaxes, strict=True)]
    if dtype == jnp.int8:
        return tuple(qs)
    return tuple(
        (q.astype(jnp.float32) * (a / 127.0)).astype(dtype)
        for q, a in zip(qs, stats.absmaxes, strict=True)
    )


def _norm_backward(g: jax.Array, x_hat: jax.Array, inverse: jax.Array) -> jax.Array:
    """The gradient through x_hat = x r, for g with respect to x_hat."""
    return inverse * (g - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))


def norm_backward(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    stats: Statistics,
    gradients: tuple[jax.Array, ...],
    times_silu: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array | None, ...], jax.Array | None, jax.Array | None]:
    """Gradients of x, of each b_j, of a and of s, all in float32, from those of n_j."""
    x_hat, v = normalize(x, outer_weight, stats, times_silu)
    tokens = tuple(range(x.ndim - 1))
    gradients = tuple(g.astype(jnp.float32) for g in gradients)
    d_weights = tuple(
        None if b is None else jnp.sum(g * v, axis=tokens)
        for b, g in zip(weights, gradients, strict=True)
    )
    terms = [weigh(g, b) for b, g in zip(weights, gradients, strict=True)]
    d = functools.reduce(jnp.add, terms)
    if stats.inner is not None:
        d = _norm_backward(d, v, stats.inner)
    if outer_weight is None:
        return d, d_weights, None, None
    assert stats.outer is not None
    a, d_s, z_hat = outer_weight.astype(jnp.float32), None, x_hat
    if times_silu is not None:
        s = times_silu.astype(jnp.float32)
        z_hat = x_hat * jax.nn.silu(s)
        d_s = d * a * x_hat * silu_slope(s)
    d_outer = jnp.sum(d * z_hat, axis=tokens)
    d = _norm_backward(d * _outer_factor(outer_weight, times_silu), x_hat, stats.outer)
    return d, d_weights, d_outer, d_s
