"""Linear layer and softmax cross-entropy, a chunk of tokens at a time, through XLA.

Only [chunk, V] logits ever exist. Chunk c holds tokens c, c + C, c + 2C, ... of the C chunks, so
that tokens sharded over devices stay where they are: every device works on each chunk.

The ternary head differs from the plain one in three places, each marked by `w_scale is None`:
which operands make the logits, what the gradient of w multiplies, and dx's factor w_scale.
`pallas_gpu` puts kernels in place of `_logits` and `_rows`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..integer_products import int8_dot
from ..norm_quant.reference import quantize_int8
from ..ternary_matmul.reference import scaled
from ..ternary_matmul.xla import scaled_sums

# Logits of one chunk take at most this many bytes in float32 unless the caller says otherwise.
_LOGIT_BYTES = 2**28


def number_of_chunks(N: int, V: int, chunk_size: int | None) -> int:
    """The fewest chunks of at most chunk_size tokens that divide N evenly, within a factor 2.

    Where N has no such divisor (a prime, say) the answer does not divide N, and N is padded.
    """
    if chunk_size is None:
        chunk_size = max(_LOGIT_BYTES // (4 * V), 1)
    fewest = -(-N // chunk_size)
    return next((c for c in range(fewest, min(2 * fewest, N) + 1) if N % c == 0), fewest)


def forward(
    x_ND: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
    *,
    z_loss: float,
    chunk_size: int | None,
    logits: Callable[..., jax.Array] | None = None,
    rows: Callable[..., Any] | None = None,
) -> tuple[jax.Array, ...]:
    """(loss_N, correct_N, lse_N); weights_VD holds trits when w_scale is not None."""
    logits, rows = logits or _logits, rows or _rows
    operands = _operands(x_ND, w_scale)
    chunks, (*operands_PC, targets_PC) = _split(weights_VD, chunk_size, *operands, targets_N)

    def one(carry: Any, c: Any) -> tuple[Any, Any]:
        left, scale, _ = (y_PC[:, c] for y_PC in operands_PC)
        logits_PV = logits(left, scale, weights_VD, w_scale)
        return carry, rows(logits_PV, targets_PC[:, c], z_loss, None)[:3]

    _, outputs_CP = _scan(one, (), chunks)
    return tuple(_join(y_CP, x_ND.shape[0]) for y_CP in outputs_CP)


def forward_with_gradients(
    x_ND: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
    *,
    z_loss: float,
    chunk_size: int | None,
    logits: Callable[..., jax.Array] | None = None,
    rows: Callable[..., Any] | None = None,
) -> tuple[jax.Array, ...]:
    """`forward`, then dx_ND in x's dtype and dw_VD in float32 of sum(loss_N): logits once."""
    logits, rows = logits or _logits, rows or _rows
    operands = _operands(x_ND, w_scale)
    chunks, (*operands_PC, targets_PC) = _split(weights_VD, chunk_size, *operands, targets_N)
    wide_VD = _wide(weights_VD, w_scale, x_ND.dtype)  # once, not once a chunk

    def one(dw_VD: jax.Array, c: Any) -> tuple[Any, Any]:
        left, scale, right = (y_PC[:, c] for y_PC in operands_PC)
        logits_PV = logits(left, scale, weights_VD, w_scale)
        *losses, dlogits_PV = rows(logits_PV, targets_PC[:, c], z_loss, x_ND.dtype)
        dx_PD, dw_chunk_VD = _pull_back(dlogits_PV, right, wide_VD)
        return dw_VD + dw_chunk_VD, (*losses, dx_PD)

    dw_VD = jnp.zeros(weights_VD.shape, _accumulator(x_ND))
    dw_VD, outputs_CP = _scan(one, dw_VD, chunks)
    *losses, dx_ND = (_join(y_CP, x_ND.shape[0]) for y_CP in outputs_CP)
    return *losses, _scaled(dx_ND, w_scale), dw_VD


def backward(
    x_ND: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
    lse_N: jax.Array,
    dloss_N: jax.Array,
    dlse_N: jax.Array,
    *,
    z_loss: float,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """(dx_ND in x's dtype, dw_VD in float32), the logits computed anew chunk by chunk."""
    per_token_N = (*_operands(x_ND, w_scale), targets_N, lse_N, dloss_N, dlse_N)
    chunks, per_token_PC = _split(weights_VD, chunk_size, *per_token_N)
    wide_VD = _wide(weights_VD, w_scale, x_ND.dtype)

    def one(dw_VD: jax.Array, c: Any) -> tuple[Any, Any]:
        left, scale, right, targets_P, *cotangents = (y_PC[:, c] for y_PC in per_token_PC)
        lse_P, dloss_P, dlse_P = cotangents
        logits_PV = _logits(left, scale, weights_VD, w_scale)
        dlogits_PV = _logit_gradients(logits_PV, targets_P, lse_P, dloss_P, dlse_P, z_loss)
        dx_PD, dw_chunk_VD = _pull_back(dlogits_PV.astype(x_ND.dtype), right, wide_VD)
        return dw_VD + dw_chunk_VD, dx_PD

    dw_VD = jnp.zeros(weights_VD.shape, _accumulator(x_ND))
    dw_VD, dx_CPD = _scan(one, dw_VD, chunks)
    return _scaled(_join(dx_CPD, x_ND.shape[0]), w_scale), dw_VD


def _operands(x_ND: jax.Array, w_scale: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logits' left operand, its scale [N, 1], and what the gradient of w multiplies."""
    if w_scale is None:
        return x_ND, jnp.ones((x_ND.shape[0], 1), _accumulator(x_ND)), x_ND
    q_ND, scale_N1 = quantize_int8(x_ND)
    return q_ND, scale_N1, (q_ND * scale_N1).astype(x_ND.dtype)


def _scaled(dx_ND: jax.Array, w_scale: jax.Array | None) -> jax.Array:
    """The ternary head's dx still lacks the weights' scale."""
    if w_scale is None or w_scale.ndim:
        return dx_ND
    return (dx_ND.astype(_accumulator(dx_ND)) * w_scale).astype(dx_ND.dtype)


def _wide(
    weights_VD: jax.Array, w_scale: jax.Array | None, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """What dx multiplies, in its dtype: with the scales of groups, which no sum leaves behind."""
    if w_scale is None or not w_scale.ndim:
        return weights_VD.astype(dtype)
    return scaled(weights_VD, w_scale).astype(dtype)


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _split(
    weights_VD: jax.Array, chunk_size: int | None, *arrays: jax.Array
) -> tuple[int, list[jax.Array]]:
    """[N, ...] -> [N / C, C, ...], padded at the end where C does not divide N."""
    N = arrays[0].shape[0]
    chunks = number_of_chunks(N, weights_VD.shape[0], chunk_size)
    pad = -N % chunks

    def split(y: jax.Array) -> jax.Array:
        # Padding tokens get target -1: no loss, no gradient.
        fill = -1 if y.dtype == jnp.int32 else 0
        y = jnp.pad(y, ((0, pad),) + ((0, 0),) * (y.ndim - 1), constant_values=fill)
        return y.reshape(-1, chunks, *y.shape[1:])

    return chunks, [split(y) for y in arrays]


def _scan(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, chunks: int) -> tuple[Any, Any]:
    """`lax.scan` over the chunks' numbers, without a loop where there is one chunk."""
    if chunks > 1:
        return lax.scan(body, carry, jnp.arange(chunks))
    carry, outputs = body(carry, 0)
    return carry, jax.tree.map(lambda y: y[None], outputs)


def _join(y_CP: jax.Array, N: int) -> jax.Array:
    return y_CP.swapaxes(0, 1).reshape(-1, *y_CP.shape[2:])[:N]


def _logits(
    left_PD: jax.Array, scale_P1: jax.Array, weights_VD: jax.Array, w_scale: jax.Array | None
) -> jax.Array:
    """logits_PV in float32."""
    if w_scale is None:
        return _dot(left_PD, weights_VD.astype(left_PD.dtype), (1, 1), _accumulator(left_PD))
    if w_scale.ndim:
        return scale_P1 * lax.platform_dependent(
            left_PD,
            weights_VD,
            w_scale,
            cpu=functools.partial(scaled_sums, implementation="xla_f32"),
            default=functools.partial(scaled_sums, implementation="xla_int8"),
        )
    # XLA's int8 product on the CPU is slow; float32 holds these integers exactly (< 2^24).
    sums_PV = lax.platform_dependent(
        left_PD,
        weights_VD,
        cpu=lambda q, w: _dot(q.astype(jnp.float32), w.astype(jnp.float32), (1, 1), jnp.float32),
        default=lambda q, w: int8_dot(q, w).astype(jnp.float32),
    )
    return sums_PV * (scale_P1 * w_scale)


def _rows(
    logits_PV: jax.Array, targets_P: jax.Array, z_loss: float, dtype: jax.typing.DTypeLike | None
) -> tuple[jax.Array, ...]:
    """(loss, correct, lse) of one chunk, and the gradient of the losses' sum in `dtype`."""
    losses = _losses(logits_PV, targets_P, z_loss)
    if dtype is None:
        return losses
    ones_P = jnp.ones_like(losses[2])
    d_PV = _logit_gradients(logits_PV, targets_P, losses[2], ones_P, 0 * ones_P, z_loss)
    return *losses, d_PV.astype(dtype)


def _losses(
    logits_PV: jax.Array, targets_P: jax.Array, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, correct, lse) of one chunk; argmax takes the first of equals, as jnp.argmax does."""
    V = logits_PV.shape[1]
    column_1V = lax.broadcasted_iota(jnp.int32, (1, V), 1)
    valid_P = targets_P >= 0
    max_P1 = jnp.max(logits_PV, axis=1, keepdims=True)
    sum_P = jnp.sum(jnp.exp(logits_PV - max_P1), axis=1)
    target_P = jnp.sum(jnp.where(column_1V == targets_P[:, None], logits_PV, 0), axis=1)
    argmax_P = jnp.min(jnp.where(logits_PV == max_P1, column_1V, V), axis=1)
    lse_P = jnp.log(sum_P) + max_P1[:, 0]
    loss_P = lse_P - target_P + z_loss * jnp.square(lse_P)
    return jnp.where(valid_P, loss_P, 0), valid_P & (argmax_P == targets_P), lse_P


def _logit_gradients(
    logits_PV: jax.Array,
    targets_P: jax.Array,
    lse_P: jax.Array,
    dloss_P: jax.Array,
    dlse_P: jax.Array,
    z_loss: float,
) -> jax.Array:
    """d/dlogits = dloss (softmax (1 + 2 z lse) - onehot) + dlse softmax; zero loss if no target."""
    dloss_P = jnp.where(targets_P >= 0, dloss_P, 0)
    column_1V = lax.broadcasted_iota(jnp.int32, (1, logits_PV.shape[1]), 1)
    softmax_PV = jnp.exp(logits_PV - lse_P[:, None])
    onehot_PV = column_1V == targets_P[:, None]
    weight_P = dloss_P * (1 + 2 * z_loss * lse_P) + dlse_P
    return softmax_PV * weight_P[:, None] - jnp.where(onehot_PV, dloss_P[:, None], 0)


def _pull_back(
    dlogits_PV: jax.Array, right_PD: jax.Array, wide_VD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dx_PD in x's dtype, but for the weights' scale, and dw_VD in float32."""
    dw_VD = _dot(dlogits_PV, right_PD, (0, 0), _accumulator(right_PD))
    return _dot(dlogits_PV, wide_VD, (1, 0), right_PD.dtype), dw_VD


def _dot(
    a: jax.Array, b: jax.Array, axes: tuple[int, int], dtype: jax.typing.DTypeLike
) -> jax.Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=dtype)
