"""Generating from token ids: prompts of different lengths in, tokens and a session out."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.errors import CheckpointError
from mmfree_jax.infer import decode
from mmfree_jax.infer.checks import check_options, check_prompts, check_streams
from mmfree_jax.infer.decode import Session
from mmfree_jax.infer.sample import Sampling, row_keys
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.state import cache_places, with_places
from mmfree_jax.model.weights import DecodingWeights, Params, Unstacked, as_weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.decode.api import KERNELS_VARIABLE

# Prompts are read in pieces of at most this many tokens, so that memory is bounded; shorter
# ones are padded to a power of two, so that few programs are compiled.
PREFILL_PIECE = 2048
_SMALLEST_PIECE = 16
# Tokens in one call of the decode loop; a streaming call starts with one and doubles.
_CHUNK = 128
_STREAM_CHUNK = 16
# An attention cache's places are rounded up to a multiple of this, for few programs.
_CACHE_STEP = 128

OnTokens = Callable[[int, list[int]], int | None]
FinishReason = Literal["length", "stop_id", "stop"]


@dataclass(frozen=True)
class Output:
    """What `generate` returns.

    Attributes:
      tokens: generated ids for each prompt, without the prompt and without the stop token.
      finish_reasons: for each prompt: "length" (max_new_tokens), "stop_id", or "stop" (ended by
        the callback).
      session: after every token of `tokens`; give it to `generate` to go on.
    """

    tokens: list[list[int]]
    finish_reasons: list[FinishReason]
    session: Session


def generate(
    model: LanguageModel,
    params: Params | DecodingWeights,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    streams: Sequence[tuple[int, int]] | None = None,
    stop_ids: Sequence[int] = (),
    on_tokens: OnTokens | None = None,
    session: Session | None = None,
) -> Output:
    """Continues each prompt. Its result does not depend on the other prompts of the batch.

    Random numbers: each row has a stream of its own, which its seed and two more numbers choose,
    the prompt's place in the request and the number of the sample. By default a row's place is
    its place in `prompts`, where one seed is given for all, and 0 where each has its own seed;
    the sample is 0. Whoever splits a request into batches gives `streams`, and gets what one
    batch would have given.

    Args:
      model: the model.
      params: its parameter tree, or weights in any form. Where `generate` is called often, what
        `as_weights` makes of the tree, which is then ternarised once.
      prompts: token ids, of any lengths; none empty, unless `session` goes on from an earlier
        call.
      max_new_tokens: most tokens to generate for each prompt.
      temperature: divides the logits; 0 is greedy.
      top_k: keep only this many of the likeliest tokens; None: all.
      top_p: keep the smallest set of likeliest tokens whose probability reaches this.
      min_p: drop tokens below this share of the likeliest token's probability.
      repetition_penalty: above 1, tokens that have occurred become less likely.
      seed: of the sampling; one for all prompts, or one for each (0 to 2^32 - 1).
      streams: (place in the request, sample) of each prompt, which choose its random numbers.
      stop_ids: token ids that end a row; they are not part of the result.
      on_tokens: called with (row, new tokens) as they are generated. Returning a number ends the
        row after that many (at least 1) of these tokens; None goes on.
      session: from an earlier call, one row for each prompt; prompts are appended to it. It is
        not changed and can be used again.

    Raises:
      DataError: an empty prompt, or a token id that the model does not have.
      ConfigError: a sampling setting, stop id, seed or session that does not fit.
      CheckpointError: the model gives logits that are not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax import generate
      >>> output = generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0)
      >>> [len(tokens) for tokens in output.tokens], output.finish_reasons
      ([5, 5], ['length', 'length'])
    """
    config = model.config
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    prompts = check_prompts(config, prompts, session)
    batch = len(prompts)
    stop_ids = check_options(config, max_new_tokens, stop_ids)
    keys = row_keys(*check_streams(batch, seed, streams))
    weights = params if isinstance(params, Unstacked) else as_weights(params, config)
    own = _make_room(config, prompts, session, max_new_tokens)
    own = _read_prompts(weights, config, own, prompts, fresh=session is None)

    tokens: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason] = ["length"] * batch
    finished = np.zeros(batch, bool)
    allowance = 1 if on_tokens else _CHUNK
    in_one_kernel = decode.in_one_kernel(weights, batch, sampling.filters())
    while not finished.all():
        remaining = np.array([max_new_tokens - len(row) for row in tokens])
        finished |= remaining <= 0
        if finished.all():
            break
        before = _snapshot(config, own) if on_tokens else None
        own, new_BN, stopped_B = decode.generate_chunk(
            weights,
            own,
            jnp.asarray(finished),
            jnp.asarray(np.minimum(remaining, allowance), jnp.int32),
            keys,
            jnp.asarray(list(stop_ids) or [-1], jnp.int32),
            sampling.numbers(),
            config=config,
            filters=sampling.filters(),
            **_loop(int(np.minimum(remaining, allowance)[~finished].max()), in_one_kernel),
        )
        new_BN, stopped_B, sound = jax.device_get((new_BN, stopped_B, _all_finite(own.logits_BV)))
        if not sound:
            raise CheckpointError(
                "the model's logits are not finite: its weights are damaged, or another program "
                "held part of the GPU during a kernel that needs all of it (try again with "
                f"{KERNELS_VARIABLE}=layers in the environment)"
            )
        cut: dict[int, list[int]] = {}
        for row in np.flatnonzero(~finished).tolist():
            new = [token for token in new_BN[row].tolist() if token >= 0]
            keep = on_tokens(row, new) if on_tokens and new else None
            if keep is not None:
                if keep < len(new):
                    new = cut[row] = new[:keep]
                reasons[row], finished[row] = "stop", True
            elif stopped_B[row]:
                reasons[row], finished[row] = "stop_id", True
            tokens[row] += new
        if cut:
            assert before is not None
            own = _rewind(weights, config, own, before, cut)
        if on_tokens:
            allowance = min(2 * allowance, _STREAM_CHUNK)
    return Output(tokens, reasons, own)


def prefill(
    model: LanguageModel,
    params: Params | DecodingWeights,
    prompts: Sequence[Sequence[int]],
    *,
    session: Session | None = None,
) -> Session:
    """Reads prompts without generating: the session to save, fork or go on from."""
    return generate(model, params, prompts, max_new_tokens=0, session=session).session


@jax.jit
def _all_finite(logits_BV: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(logits_BV))


def _make_room(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    session: Session | None,
    max_new_tokens: int,
) -> Session:
    """A session of our own, to donate; an attention cache has places for all that is to come."""
    if config.recurrent:
        if session is None:
            return decode.init_session(config, len(prompts))
        return jax.tree.map(jnp.copy, session)
    start = np.zeros(len(prompts), int) if session is None else np.asarray(session.state.position_B)
    longest = max(int(s) + len(p) for s, p in zip(start, prompts, strict=True)) + max_new_tokens
    places = -(-longest // _CACHE_STEP) * _CACHE_STEP
    if session is None:
        return decode.init_session(config, len(prompts), places)
    there = cache_places(session.state.layers, config) or 0
    layers = with_places(session.state.layers, config, max(there, places))
    state = dataclasses.replace(session.state, layers=layers)
    session = dataclasses.replace(session, state=state)
    return jax.tree.map(jnp.copy, session)


def _loop(count: int, in_one_kernel: bool) -> dict[str, Any]:
    """How the decode loop is compiled to give `count` tokens."""
    if in_one_kernel or jax.default_backend() == "cpu":
        return {"steps": _CHUNK, "early_exit": True}
    # A power of two: few programs, and no round trip to the host between tokens.
    return {"steps": 1 << (count - 1).bit_length(), "early_exit": False}


def _piece_size(longest: int) -> int:
    size = _SMALLEST_PIECE
    while size < min(longest, PREFILL_PIECE):
        size *= 2
    return size


def _read_prompts(
    weights: DecodingWeights,
    config: ModelConfig,
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    fresh: bool = False,
) -> Session:
    """`session`, donated, after the prompts; `fresh`: it has read nothing yet."""
    longest = max(len(prompt) for prompt in prompts)
    start = 0
    while start < longest:
        size = _piece_size(longest - start)
        tokens = np.zeros((len(prompts), size), np.int32)
        length = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            piece = prompt[start : start + size]
            tokens[row, : len(piece)] = piece
            length[row] = len(piece)
        session = decode.prefill(
            weights,
            session,
            jnp.asarray(tokens),
            jnp.asarray(length),
            config=config,
            # A program of its own, which recurrent models have no use for.
            fresh=fresh and start == 0 and not config.recurrent,
        )
        start += size
    return session


def _snapshot(config: ModelConfig, session: Session) -> Session:
    """Enough of a session to come back to it after the next chunk."""
    if config.mixer != "attention":
        return jax.tree.map(jnp.copy, session)
    # An attention cache only grows: coming back needs the positions alone.
    state = dataclasses.replace(session.state, position_B=jnp.copy(session.state.position_B))
    return dataclasses.replace(session, state=state, seen_BV=jnp.copy(session.seen_BV))


def _rewind(
    weights: DecodingWeights,
    config: ModelConfig,
    session: Session,
    before: Session,
    cut: dict[int, list[int]],
) -> Session:
    """`session` with the rows in `cut` as they were before the chunk plus the tokens kept."""
    rows = jnp.asarray(sorted(cut))
    if config.mixer == "attention":
        layers = session.state.layers
        before = dataclasses.replace(
            before,
            state=dataclasses.replace(before.state, layers=layers),
            logits_BV=session.logits_BV,
        )
    again = decode.select_rows(before, rows)
    again = _read_prompts(weights, config, again, [cut[row] for row in sorted(cut)])
    return decode.replace_rows(session, rows, again)
