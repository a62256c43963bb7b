"""Linear layer and softmax cross-entropy in plain jnp: the definition and the oracle."""

import jax
import jax.numpy as jnp

from ..norm_quant.reference import quantize_int8


def cross_entropy(
    logits_NV: jax.Array, targets_N: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss_N, correct_N, lse_N) with loss = lse - logit of the target + z_loss * lse^2.

    Targets below zero give zero loss and count as not correct.
    """
    valid_N = targets_N >= 0
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_N = jnp.take_along_axis(logits_NV, jnp.maximum(targets_N, 0)[:, None], axis=1)[:, 0]
    loss_N = jnp.where(valid_N, lse_N - target_N + z_loss * jnp.square(lse_N), 0)
    return loss_N, valid_N & (jnp.argmax(logits_NV, axis=-1) == targets_N), lse_N


def linear_cross_entropy(
    x_ND: jax.Array, w_VD: jax.Array, targets_N: jax.Array, *, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy(x @ w^T)` with all logits in memory, in the inputs' own precision."""
    return cross_entropy(x_ND @ w_VD.T, targets_N, z_loss=z_loss)


def ternary_linear_cross_entropy(
    x_ND: jax.Array,
    w_VD: jax.Array,
    trits_VD: jax.Array,
    w_scale: jax.typing.ArrayLike,
    targets_N: jax.Array,
    *,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cross_entropy(Q8(x) @ (trits * w_scale)^T)`, straight through both quantisers.

    Straight through means that the gradients reach x and w as if Q8 and the ternarisation were
    the identity, evaluated at the quantised values (arXiv 2406.02528, algorithm 1).
    """
    q_ND, scale_N1 = quantize_int8(x_ND)
    x_hat_ND = q_ND.astype(x_ND.dtype) * scale_N1.astype(x_ND.dtype)
    w_hat_VD = trits_VD.astype(w_VD.dtype) * jnp.asarray(w_scale, w_VD.dtype)
    x_hat_ND = x_ND + jax.lax.stop_gradient(x_hat_ND - x_ND)
    w_hat_VD = w_VD + jax.lax.stop_gradient(w_hat_VD - w_VD)
    return linear_cross_entropy(x_hat_ND, w_hat_VD, targets_N, z_loss=z_loss)
