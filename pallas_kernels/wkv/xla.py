"""The logarithms of the weights, s_t = log(e^{s_{t-1} - w} + e^{k_t}), through XLA.

On a CPU a loop over time, on accelerators an associative scan. The backward pass is the reversed
linear recurrence over the shares f_t = e^{s_{t-1} - w - s_t} that the past has in each sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..recurrence.api import linear_recurrence
from .reference import NOTHING


@jax.custom_vjp
def log_weights(
    k_BTD: jax.Array,
    decay_D: jax.Array,
    reset_BT: jax.Array,
    held_BT: jax.Array,
    start_BD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The logarithm before each step, `NOTHING` where it was reset, and the one after the last.

    Args:
      k_BTD: keys, float32 or float64 as all floats here.
      decay_D: w.
      reset_BT: where what came before is dropped.
      held_BT: where nothing is added and nothing fades.
      start_BD: before the first step.
    """
    if k_BTD.shape[1] == 1:
        after_BTD = _step(start_BD, k_BTD[:, 0], decay_D, reset_BT[:, 0], held_BT[:, 0])[:, None]
    else:
        after_BTD = lax.platform_dependent(
            k_BTD, decay_D, reset_BT, held_BT, start_BD, cpu=_loop, default=_scan
        )
    before_BTD = jnp.concatenate([start_BD[:, None], after_BTD[:, :-1]], axis=1)
    return jnp.where(reset_BT[..., None], NOTHING, before_BTD), after_BTD[:, -1]


def _step(
    before_BD: jax.Array, k_BD: jax.Array, decay_D: jax.Array, reset_B: jax.Array, held_B: jax.Array
) -> jax.Array:
    before_BD = jnp.where(reset_B[:, None], NOTHING, before_BD)
    return jnp.where(held_B[:, None], before_BD, jnp.logaddexp(before_BD - decay_D, k_BD))


def _loop(
    k_BTD: jax.Array,
    decay_D: jax.Array,
    reset_BT: jax.Array,
    held_BT: jax.Array,
    start_BD: jax.Array,
) -> jax.Array:
    def step(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        s_BD, s_BTD = carry
        s_BD = _step(s_BD, k_BTD[:, t], decay_D, reset_BT[:, t], held_BT[:, t])
        return s_BD, lax.dynamic_update_slice_in_dim(s_BTD, s_BD[:, None], t, 1)

    return lax.fori_loop(0, k_BTD.shape[1], step, (start_BD, jnp.zeros_like(k_BTD)))[1]


def _scan(
    k_BTD: jax.Array,
    decay_D: jax.Array,
    reset_BT: jax.Array,
    held_BT: jax.Array,
    start_BD: jax.Array,
) -> jax.Array:
    held_BT1, reset_BT1 = held_BT[..., None], reset_BT[..., None]
    fades_BTD = jnp.where(reset_BT1, NOTHING, jnp.where(held_BT1, 0, -decay_D))
    adds_BTD = jnp.where(held_BT1, NOTHING, k_BTD)
    first_BD = jnp.logaddexp(start_BD + fades_BTD[:, 0], adds_BTD[:, 0])
    adds_BTD = adds_BTD.at[:, 0].set(first_BD)

    def combine(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return left[0] + right[0], jnp.logaddexp(left[1] + right[0], right[1])

    return lax.associative_scan(combine, (fades_BTD, adds_BTD), axis=1)[1]


def shares(
    before_BTD: jax.Array, k_BTD: jax.Array, decay_D: jax.Array, held_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The past's and the step's share in each sum; they add to 1, and neither cancels."""
    held_BT1, difference_BTD = held_BT[..., None], before_BTD - decay_D - k_BTD
    return (
        jnp.where(held_BT1, 1, jax.nn.sigmoid(difference_BTD)),
        jnp.where(held_BT1, 0, jax.nn.sigmoid(-difference_BTD)),
    )


def _forward(*operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    before_BTD, last_BD = log_weights(*operands)
    return (before_BTD, last_BD), (before_BTD, *operands[:-1])


def _backward(
    residuals: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    before_BTD, k_BTD, decay_D, reset_BT, held_BT = residuals
    dbefore_BTD, dlast_BD = cotangents
    past_BTD, own_BTD = shares(before_BTD, k_BTD, decay_D, held_BT)
    dbefore_BTD = jnp.where(reset_BT[..., None], 0, dbefore_BTD)
    dafter_BTD = jnp.pad(dbefore_BTD[:, 1:], ((0, 0), (0, 1), (0, 0)))

    def recur(x_BTD: jax.Array, start_BD: jax.Array) -> tuple[jax.Array, jax.Array]:
        return linear_recurrence(
            past_BTD, x_BTD, reset_BT=reset_BT, h0_BD=start_BD, implementation="xla"
        )

    _, pullback = jax.vjp(recur, jnp.zeros_like(k_BTD), jnp.zeros_like(dlast_BD))
    g_BTD, dstart_BD = pullback((dafter_BTD, dlast_BD))
    fading_BTD = jnp.where(held_BT[..., None], 0, past_BTD * g_BTD)
    ddecay_D = -jnp.sum(fading_BTD, axis=(0, 1))
    return own_BTD * g_BTD, ddecay_D, None, None, dstart_BD + dbefore_BTD[:, 0]


log_weights.defvjp(_forward, _backward)
