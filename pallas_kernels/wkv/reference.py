"""RWKV-4's weighted average in plain jnp, one step at a time: the definition and the oracle."""

import jax
import jax.numpy as jnp

NOTHING = -1e30
"""The logarithm of no weight at all: finite, so that nothing becomes NaN."""


def wkv(
    k_BTD: jax.Array,
    v_BTD: jax.Array,
    decay_D: jax.Array,
    bonus_D: jax.Array,
    *,
    average_BD: jax.Array | None = None,
    log_weight_BD: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The average of all values so far, weighed by keys that fade, in the inputs' precision.

    RWKV-4 (arXiv 2305.13048, eq. 16), as its authors compute it: numerator and denominator are
    kept with the largest exponent taken out.

      out_t = (sum_{i<t} e^{k_i - (t - 1 - i) w} v_i + e^{k_t + u} v_t) / (the same without v)

    Args:
      k_BTD: keys.
      v_BTD: values.
      decay_D: w, above zero.
      bonus_D: u, of the step itself.
      average_BD, log_weight_BD: what came before the first step: sum e^.. v / sum e^.., and the
        logarithm of sum e^.. . None: nothing did.
      reset_BT: bool; where true what came before that step is dropped.

    Returns:
      out_BTD, and the average and the logarithm of its weight after the last step.
    """
    B, T, D = k_BTD.shape
    dtype = jnp.result_type(k_BTD, v_BTD)
    average = jnp.zeros((B, D), dtype) if average_BD is None else average_BD
    largest = jnp.full((B, D), NOTHING, dtype) if log_weight_BD is None else log_weight_BD
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT

    def step(
        carry: tuple[jax.Array, ...], inputs: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        above, below, largest = carry
        k, v, reset = inputs
        dropped = reset[:, None]
        above, below = jnp.where(dropped, 0, above), jnp.where(dropped, 1, below)
        largest = jnp.where(dropped, NOTHING, largest)
        top = jnp.maximum(largest, k + bonus_D)
        old, new = jnp.exp(largest - top), jnp.exp(k + bonus_D - top)
        out = (old * above + new * v) / (old * below + new)
        top = jnp.maximum(largest - decay_D, k)
        old, new = jnp.exp(largest - decay_D - top), jnp.exp(k - top)
        return (old * above + new * v, old * below + new, top), out

    start = (average, jnp.ones_like(average), largest)
    time_major = tuple(x.swapaxes(0, 1) for x in (k_BTD, v_BTD, reset_BT))
    (above, below, largest), out_TBD = jax.lax.scan(step, start, time_major)
    return out_TBD.swapaxes(0, 1), above / below, largest + jnp.log(below)
