"""The gated linear recurrence in plain jnp, one step at a time: the definition and the oracle."""

import jax
import jax.numpy as jnp


def linear_recurrence(
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    *,
    reset_BT: jax.Array | None = None,
    h0_BD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = f_t h_{t-1} + x_t in the inputs' own precision (float64 under enable_x64).

    The recurrence of the MLGRU (arXiv 2406.02528, section 3.3.1) with x_t = (1 - f_t) c_t.

    Args:
      f_BTD: forget gates.
      x_BTD: inputs of the recurrence.
      reset_BT: bool; where true the state carried into that step is dropped.
      h0_BD: the state before the first step; zeros when None.

    Returns:
      h_BTD, the state after every step, and h_last_BD, the state after the last one.
    """
    B, T, D = f_BTD.shape
    if reset_BT is None:
        reset_BT = jnp.zeros((B, T), bool)
    if h0_BD is None:
        h0_BD = jnp.zeros((B, D), x_BTD.dtype)

    def step(h_BD: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        f_BD, x_BD, reset_B = inputs
        h_BD = f_BD * jnp.where(reset_B[:, None], 0, h_BD) + x_BD
        return h_BD, h_BD

    time_major = (f_BTD.swapaxes(0, 1), x_BTD.swapaxes(0, 1), reset_BT.swapaxes(0, 1))
    dtype = jnp.result_type(f_BTD, x_BTD, h0_BD)
    h_last_BD, h_TBD = jax.lax.scan(step, h0_BD.astype(dtype), time_major)
    return h_TBD.swapaxes(0, 1), h_last_BD


def mlgru_gates(
    i_BTD: jax.Array, f_BTD: jax.Array, lower_bound_D: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(f, x) of the recurrence from the projections i and f, in the inputs' own precision.

    f = lb + (1 - lb) sigmoid(f), x = silu(i) (1 - f): the lower bound of HGRN (arXiv 2311.04823)
    as the released MatMul-free models apply it; no lower bound when None.
    """
    lower_bound_D = jnp.zeros((), f_BTD.dtype) if lower_bound_D is None else lower_bound_D
    forget_BTD = lower_bound_D + (1 - lower_bound_D) * jax.nn.sigmoid(f_BTD)
    # 1 - f without cancellation where f is near 1.
    complement_BTD = (1 - lower_bound_D) * jax.nn.sigmoid(-f_BTD)
    return forget_BTD, jax.nn.silu(i_BTD) * complement_BTD


def mlgru_recurrence(
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    h0_BD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`linear_recurrence` of `mlgru_gates`: (h_BTD, h_last_BD)."""
    forget_BTD, x_BTD = mlgru_gates(i_BTD, f_BTD, lower_bound_D)
    return linear_recurrence(forget_BTD, x_BTD, reset_BT=reset_BT, h0_BD=h0_BD)
