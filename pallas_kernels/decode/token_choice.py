"""Between two tokens in one kernel (`token_gpu.py`): the likeliest token, and its embedding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import inline
from .inline import EMPTY
from .token_board import (
    Refs,
    load,
    publish,
    read_pairs,
    shares_of_warps,
    take_off,
)
from .token_plan import Plan, places

_LOWEST, _HIGHEST = -(1 << 31), (1 << 31) - 1


class Best(NamedTuple):
    """The largest of some logits, [warps, 32] each.

    Attributes:
      key: int32, in the order of the logits (`ordered`).
      index: int32, the token.
    """

    key: jax.Array
    index: jax.Array


def nothing(plan: Plan) -> Best:
    """Below every logit."""
    shape = places(plan).shape
    return Best(jnp.full(shape, _LOWEST, jnp.int32), jnp.full(shape, _HIGHEST, jnp.int32))


def ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of float32; both zeros are one, and NaN is above all."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    bits = jnp.where(x == 0, 0, bits)
    key = jnp.where(bits < 0, bits ^ _HIGHEST, bits)
    return jnp.where(x == x, key, _HIGHEST - 1)


def larger(a: Best, b: Best, inside: jax.Array | bool = True) -> Best:
    """The larger of each two, the first token of equals; b counts only where inside."""
    better = (b.key > a.key) | ((b.key == a.key) & (b.index < a.index))
    better = better & inside
    return Best(jnp.where(better, b.key, a.key), jnp.where(better, b.index, a.index))


def _of_warp(plan: Plan, best: Best) -> Best:
    shape = places(plan).shape
    key = jnp.broadcast_to(jnp.max(best.key, axis=1)[:, None], shape)
    index = jnp.min(jnp.where(best.key == key, best.index, _HIGHEST), axis=1)
    return Best(key, jnp.broadcast_to(index[:, None], shape))


def publish_best(refs: Refs, plan: Plan, best: Best, patience: jax.Array) -> jax.Array:
    """Passes on the largest logit of this program, behind all that it has taken off a board."""
    if not plan.emulate:
        patience = inline.fence(refs["board"], patience)
    best = _of_warp(plan, best)  # All outputs are finished in the first warp.
    place = places(plan)
    for number, y in enumerate(best):
        n = 2 * refs["program"] + number + place
        publish(refs, plan, "best", plan.layers - 1, n, place == 0, y)
        take_off(refs, plan, "best", plan.layers - 1, n, place == 0)
    return patience


def choose(refs: Refs, plan: Plan, patience: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest token, int32, once all programs have passed on theirs; and the patience."""
    programs, warps = plan.cut.programs, plan.cut.warps
    place = places(plan)
    pairs = [jnp.minimum(first + place, programs - 1) for first in range(0, programs, place.size)]
    found, patience = read_pairs(refs, plan, "best", plan.layers - 1, pairs, patience)
    best = nothing(plan)
    for key, index in found:
        # A program that was waited for in vain has written nothing, or half: above all logits.
        lost = (key == EMPTY) | (index == EMPTY)
        found_there = Best(jnp.where(lost, _HIGHEST, key), jnp.where(lost, EMPTY, index))
        best = larger(best, found_there)
    best = _of_warp(plan, best)
    keys, indices = shares_of_warps(refs, plan, list(best), warps)
    shares = [Best(*pair) for pair in zip(keys, indices, strict=True)]
    best = shares[0]
    for share in shares[1:]:
        best = larger(best, share)
    if not plan.emulate:
        # What others took off a board before they passed on their logit is seen from here on.
        patience = inline.fence(refs["board"], patience)
    # One axis at a time: jax 0.11 cannot lower a maximum over two under a mesh of explicit axes.
    token = jnp.max(jnp.max(best.index, axis=1))
    # Without patience the program goes on with NaN (`embed`), so that the wrong token shows.
    patience = jnp.where(token == EMPTY, 0, patience)
    return jnp.clip(token, 0, plan.steps["head"].rows - 1), patience


def embed(refs: Refs, plan: Plan, token: jax.Array, patience: jax.Array) -> None:
    """Passes on this program's share of the token's row of the embedding, as layer 0's input.

    NaN where the patience is at an end: the token was chosen without hearing from all programs.
    """
    p, programs = refs["program"], plan.cut.programs
    width = plan.steps["mixer_in"].columns
    first, end = p * width // programs, (p + 1) * width // programs
    place = places(plan)
    for start in range(0, -(-width // programs), place.size):
        n = first + start + place
        inside = n < end
        x = load(plan, refs["embedding"], (token, n), inside)
        if "embedding_scale" in refs:
            x = x * refs["embedding_scale"][token, 0]
        x = jnp.where(patience > 0, x, jnp.nan)
        publish(refs, plan, "x", 0, n, inside, x.astype(plan.residual_dtype))
        take_off(refs, plan, "x", 0, n, inside)
