"""Gated linear attention in plain jnp, one step at a time: the definition and the oracle."""

import jax
import jax.numpy as jnp


def gla(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHK: jax.Array,
    *,
    state_BHKV: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """S_t = diag(e^{log_decay_t}) S_{t-1} + k_t v_t^T, out_t = q_t S_t, in the inputs' precision.

    The recurrence of gated linear attention (arXiv 2312.06635) and of HGRN2 (arXiv 2404.07904).

    Args:
      q_BTHK: queries.
      k_BTHK: keys.
      v_BTHV: values.
      log_decay_BTHK: at most 0.
      state_BHKV: before the first step; None: zeros.
      reset_BT: bool; where true what came before that step is dropped.

    Returns:
      out_BTHV, and the state after the last step.
    """
    B, T, H, K = k_BTHK.shape
    if state_BHKV is None:
        state_BHKV = jnp.zeros((B, H, K, v_BTHV.shape[-1]), v_BTHV.dtype)
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def step(state_BHKV: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, reset = inputs
        state_BHKV = jnp.where(reset[:, None, None, None], 0, state_BHKV)
        state_BHKV = jnp.exp(log_decay)[..., None] * state_BHKV + k[..., None] * v[..., None, :]
        return state_BHKV, jnp.sum(q[..., None] * state_BHKV, axis=-2)

    time_major = tuple(x.swapaxes(0, 1) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, reset_BT))
    last_BHKV, out_TBHV = jax.lax.scan(step, state_BHKV, time_major)
    return out_TBHV.swapaxes(0, 1), last_BHKV
