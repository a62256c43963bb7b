"""The compiled programs of an engine, over the rows of one batch that stays on the device.

Shapes: B slots, b rows of a call, N tokens that a call may give a row, P rows and T tokens of
pieces of prompts, V vocabulary.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from mmfree_jax.infer import decode
from mmfree_jax.model import LanguageModel, Session, State, decode_kernels, packed_model
from mmfree_jax.model.weights import Packed, Weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.serve.row_sampling import Draw, Settings, choose, scores

# Positions whose logits are held at once while a prompt is scored.
_SCORED_AT_ONCE = 64


@flax.struct.dataclass
class Pool:
    """All slots.

    Attributes:
      session: state, logits and tokens seen of each.
      counts_BV: int32, how often each token occurs in the answer; kept by "full" programs only.
      left_B: int32, tokens that a row may yet give; 0 once it met a stop token.
      settings: of the request in each.
    """

    session: Session
    counts_BV: jax.Array
    left_B: jax.Array
    settings: Settings


class Given(NamedTuple):
    """What a decoding call gave.

    Attributes:
      tokens_bN: int32; -1 where none was given.
      stopped_b: rows that met a stop token.
      sound_b: False for rows whose logits are not all finite.
      scores: (log-probability [b, N], likeliest ids [b, N, 20], theirs) from "full" programs.
    """

    tokens_bN: jax.Array
    stopped_b: jax.Array
    sound_b: jax.Array
    scores: tuple[jax.Array, ...]


@functools.partial(jax.jit, donate_argnames="pool")
def put_row(pool: Pool, row: jax.Array, one: Session) -> Pool:
    """Puts a session of one row into a slot, whose request has not begun to answer."""
    return dataclasses.replace(pool, session=decode.replace_rows(pool.session, row[None], one))


@jax.jit
def take_row(pool: Pool, row: jax.Array) -> Session:
    """A copy of a slot's session."""
    return decode.select_rows(pool.session, row[None])


@functools.partial(jax.jit, donate_argnames="pool")
def begin_row(pool: Pool, row: jax.Array, left: jax.Array, settings: Settings) -> Pool:
    """Lets a slot's request answer, by settings of one row."""
    return dataclasses.replace(
        pool,
        counts_BV=pool.counts_BV.at[row].set(0),
        left_B=pool.left_B.at[row].set(left),
        settings=jax.tree.map(lambda x, y: x.at[row].set(y[0]), pool.settings, settings),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pool")
def read_pieces(
    weights: Weights,
    pool: Pool,
    row_P: jax.Array,
    tokens_PT: jax.Array,
    length_P: jax.Array,
    *,
    config: ModelConfig,
) -> Pool:
    """Reads a piece of each given row's prompt; row B is none, with length 0."""
    own = decode.select_rows(pool.session, row_P)
    own = decode.prefill(weights, own, tokens_PT, length_P, config=config)
    return dataclasses.replace(pool, session=decode.replace_rows(pool.session, row_P, own))


@functools.partial(jax.jit, static_argnames="config", donate_argnames="pool")
def score_piece(
    weights: Weights,
    pool: Pool,
    row_1: jax.Array,
    tokens_1T: jax.Array,
    target_T: jax.Array,
    length_1: jax.Array,
    *,
    config: ModelConfig,
) -> tuple[Pool, tuple[jax.Array, jax.Array, jax.Array]]:
    """Reads a piece of one prompt and scores, behind each of its tokens, the one that follows.

    Args:
      weights: of the model.
      pool: donated.
      row_1: int32.
      tokens_1T: int32, padded.
      target_T: int32, what follows each.
      length_1: int32, tokens that are no padding.
      config: static.

    Returns:
      The pool, and of each place the target's log-probability [T] and the likeliest tokens
      [T, 20] with theirs.
    """
    own = decode.select_rows(pool.session, row_1)
    held_1T = (jnp.arange(tokens_1T.shape[1]) < length_1[:, None]).astype(jnp.int32)
    model = LanguageModel(config)
    x_1TD, state = model.apply(weights, tokens_1T, held_1T, own.state, method=LanguageModel.hidden)

    def block(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_CD, target_C = inputs
        logits_CV = model.apply(weights, x_CD, method=LanguageModel.logits)
        return scores(logits_CV, target_C)

    x_TD, T = x_1TD[0], tokens_1T.shape[1]
    C = min(_SCORED_AT_ONCE, T)
    blocks = x_TD.reshape(T // C, C, -1), target_T.reshape(T // C, C)
    found = jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), jax.lax.map(block, blocks))
    last_1V = model.apply(weights, x_TD[length_1 - 1], method=LanguageModel.logits)
    after = decode.see(Session(state, last_1V, own.seen_BV), jnp.where(held_1T, tokens_1T, -1))
    return dataclasses.replace(pool, session=decode.replace_rows(pool.session, row_1, after)), found


@functools.partial(
    jax.jit, static_argnames=("config", "draw", "steps", "few_rows"), donate_argnames="pool"
)
def decode_rows(
    weights: Weights,
    pool: Pool,
    row_b: jax.Array,
    live_b: jax.Array,
    *,
    config: ModelConfig,
    draw: Draw,
    steps: int,
    few_rows: bool,
) -> tuple[Pool, Given]:
    """Gives each row up to `steps` tokens, in one loop on the device.

    A row that has met a stop token, or has none left, is held as it is.

    Args:
      weights: of the model.
      pool: donated.
      row_b: int32 slots; B is none. Where b is B they are 0 ... B-1.
      live_b: bool, rows that give tokens.
      config: static.
      draw: static, what the sampling contains.
      steps: static, N.
      few_rows: static; few packed rows may go through the decode op, whose last bits are others.
    """
    everyone = row_b.shape == pool.left_B.shape
    own = pool.session if everyone else decode.select_rows(pool.session, row_b)
    left_b, settings, counts_bV = (
        jax.tree.map(lambda x: x if everyone else x[row_b], x)
        for x in (pool.left_B, pool.settings, pool.counts_BV if draw == "full" else None)
    )
    limit_b = jnp.where(live_b, jnp.minimum(left_b, steps), 0)
    sound_b = jnp.all(jnp.isfinite(own.logits_BV), axis=1)
    if (
        few_rows
        and draw == "greedy"
        and isinstance(weights, Packed)
        and packed_model.serves_greedy(weights, len(row_b))
    ):
        tokens_bN, logits_bV, state = decode_kernels.decode_greedy(
            weights, config, own.state, own.logits_BV, limit_b, settings.stop_ids_BS, steps
        )
        stopped_b = jnp.sum(tokens_bN >= 0, axis=1) < limit_b
        own, found = Session(state, logits_bV, own.seen_BV), ()
    else:
        own, counts_bV, tokens_bN, stopped_b, found = _loop(
            weights, own, counts_bV, settings, limit_b, config, draw, steps, few_rows
        )
    if draw != "full":
        own = decode.see(own, tokens_bN)
    sound_b &= jnp.all(jnp.isfinite(own.logits_BV), axis=1)
    given_b = jnp.sum(tokens_bN >= 0, axis=1, dtype=jnp.int32)
    left_b = jnp.where(stopped_b, 0, left_b - given_b)
    given = Given(tokens_bN, stopped_b, sound_b, found)
    if everyone:
        counts = pool.counts_BV if counts_bV is None else counts_bV
        return dataclasses.replace(pool, session=own, left_B=left_b, counts_BV=counts), given
    counts_BV = pool.counts_BV
    if counts_bV is not None:
        counts_BV = counts_BV.at[row_b].set(counts_bV, mode="drop")
    return Pool(
        decode.replace_rows(pool.session, row_b, own),
        counts_BV,
        pool.left_B.at[row_b].set(left_b, mode="drop"),
        pool.settings,
    ), given


def _loop(
    weights: Weights,
    session: Session,
    counts_bV: jax.Array | None,
    settings: Settings,
    limit_b: jax.Array,
    config: ModelConfig,
    draw: Draw,
    steps: int,
    few_rows: bool,
) -> tuple[Any, ...]:
    """The session, counts, tokens, rows stopped and scores after `steps` rounds."""
    b, V = session.logits_BV.shape
    rows_b = jnp.arange(b)

    def body(step: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        session, counts_bV, tokens_bN, stopped_b, found = carry
        token_b = choose(
            session.logits_BV,
            settings,
            draw=draw,
            position_B=session.state.position_B,
            seen_BV=session.seen_BV,
            counts_BV=counts_bV,
        )
        idle_b = stopped_b | (limit_b <= step)
        stop_b = ~idle_b & jnp.any(token_b[:, None] == settings.stop_ids_BS, axis=1)
        idle_b |= stop_b
        seen_bV = session.seen_BV
        if draw == "full":
            found = tuple(
                x.at[:, step].set(new)
                for x, new in zip(found, scores(session.logits_BV, token_b), strict=True)
            )
            place_b = jnp.where(idle_b, V, token_b)
            seen_bV = seen_bV.at[rows_b, place_b].set(True, mode="drop")
            counts_bV = counts_bV.at[rows_b, place_b].add(1, mode="drop")
        held_b1 = (~idle_b).astype(jnp.int32)[:, None]  # To the model 0 is padding.
        logits_bV, state = _forward(
            weights, config, token_b[:, None], session.state, held_b1, few_rows
        )
        logits_bV = jnp.where(idle_b[:, None], session.logits_BV, logits_bV)
        tokens_bN = tokens_bN.at[:, step].set(jnp.where(idle_b, -1, token_b))
        session = Session(state, logits_bV, seen_bV)
        return session, counts_bV, tokens_bN, stopped_b | stop_b, found

    found: tuple[jax.Array, ...] = ()
    if draw == "full":
        one = jax.eval_shape(scores, session.logits_BV, limit_b)
        found = tuple(jnp.zeros((b, steps, *x.shape[1:]), x.dtype) for x in one)
    start = session, counts_bV, jnp.full((b, steps), -1, jnp.int32), jnp.zeros(b, bool), found
    # The number of rounds is known to the compiler: a GPU never waits for the host in between.
    return jax.lax.fori_loop(0, steps, body, start)


def _forward(
    weights: Weights,
    config: ModelConfig,
    tokens_BT: jax.Array,
    state: State,
    segment_ids_BT: jax.Array,
    few_rows: bool,
) -> tuple[jax.Array, State]:
    if isinstance(weights, Packed) and not few_rows:
        # The same kernels for any number of rows, whose last bits are the same too.
        kernels = packed_model.runs_kernels(weights)
        return packed_model.decode(
            weights, config, tokens_BT, state, segment_ids_BT, kernels=kernels
        )
    return decode.forward(weights, config, tokens_BT, state, segment_ids_BT)
