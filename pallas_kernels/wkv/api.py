"""RWKV-4's weighted average, element-wise and with a static decay: the public door.

The average is itself a gated recurrence, y_t = f_t y_{t-1} + (1 - f_t) v_t with f_t the share that
the past has in the sum of weights, and is computed by that op and its kernels. Only the weights'
logarithms are new here (`xla.py`); neither they nor the shares can overflow.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..recurrence.api import linear_recurrence
from .reference import NOTHING
from .xla import log_weights, shares

__all__ = ["NOTHING", "wkv"]


def wkv(
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    decay_D: jax.Array,
    bonus_D: jax.Array,
    *,
    average_BD: jax.Array | None = None,
    log_weight_BD: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    padding_BT: jax.Array | None = None,
    partition: PartitionSpec | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`reference.wkv` in float32 (float64 for float64 inputs), in parallel over time.

    Differentiable in all floats, for cotangents of all outputs. One step is the recurrent form.

    Args:
      k_BTD: keys, any float dtype.
      v_BTD: values, any float dtype.
      decay_D: w, above zero.
      bonus_D: u.
      average_BD, log_weight_BD: before the first step; None: 0 and `NOTHING`.
      reset_BT: bool; where true what came before that step is dropped.
      padding_BT: bool; where true both are held and the inputs are ignored.
      partition: mesh axes of batch, time and channels, as `linear_recurrence` takes them; the
        logarithms are left to the compiler. None leaves all to it.
      implementation: of the recurrence.

    Returns:
      out_BTD in v's dtype, and the average and the logarithm of its weight after the last step.

    Raises:
      ValueError, TypeError: as `linear_recurrence`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.wkv.api import wkv
      >>> k, v = jnp.zeros((1, 3, 1)), jnp.array([[[1.0], [2.0], [6.0]]])
      >>> out, _, _ = wkv(k, v, jnp.full(1, 1e-9), jnp.zeros(1))  # all keys alike: plain averages
      >>> [round(float(x), 4) for x in out.ravel()]
      [1.0, 1.5, 3.0]
    """
    if k_BTD.ndim != 3 or k_BTD.shape != v_BTD.shape:
        raise ValueError(
            f"k_BTD {k_BTD.shape} and v_BTD {v_BTD.shape} must have the same [B, T, D] shape"
        )
    B, T, D = k_BTD.shape
    for name, x_D in (("decay_D", decay_D), ("bonus_D", bonus_D)):
        if x_D.shape != (D,):
            raise ValueError(f"{name} has shape {x_D.shape}; it must be {(D,)}")
    dtype = jnp.promote_types(k_BTD.dtype, jnp.float32)
    k, v, decay_D, bonus_D = (x.astype(dtype) for x in (k_BTD, v_BTD, decay_D, bonus_D))
    nowhere_BT = jnp.zeros((B, T), bool)
    reset_BT = nowhere_BT if reset_BT is None else reset_BT
    held_BT = nowhere_BT if padding_BT is None else padding_BT
    if average_BD is None:
        average_BD = jnp.zeros((B, D), dtype)
    if log_weight_BD is None:
        log_weight_BD = jnp.full((B, D), NOTHING, dtype)

    before_BTD, last_BD = log_weights(k, decay_D, reset_BT, held_BT, log_weight_BD.astype(dtype))
    past_BTD, own_BTD = shares(before_BTD, k, decay_D, held_BT)
    y_BTD, y_last_BD = linear_recurrence(
        past_BTD,
        own_BTD * v,
        reset_BT=reset_BT,
        h0_BD=average_BD,
        partition=partition,
        implementation=implementation,
    )
    # Where the past is dropped its weight is nothing, whatever stands in its average.
    previous_BTD = jnp.concatenate([average_BD.astype(dtype)[:, None], y_BTD[:, :-1]], axis=1)
    difference_BTD = before_BTD - bonus_D - k
    out_BTD = jax.nn.sigmoid(difference_BTD) * previous_BTD + jax.nn.sigmoid(-difference_BTD) * v
    return out_BTD.astype(v_BTD.dtype), y_last_BD, last_BD
