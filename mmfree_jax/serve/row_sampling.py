"""Choosing the next token of rows that are each sampled in their own way, in one program.

A number that turns a step off leaves the logits as they are, bit for bit: what a row draws does
not depend on what the program contains for the sake of other rows.

Shapes: B rows, V vocabulary, S stop tokens, K biased tokens.
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.infer.sample import penalize_repetition, row_keys
from mmfree_jax.serve.requests import MOST_BIASES, MOST_LOGPROBS, MOST_STOP_IDS, Request

Draw = Literal["greedy", "plain", "full"]
"""What a program contains: the likeliest token; temperature and noise; all filters, penalties and
log-probabilities too."""
DRAWS: tuple[Draw, ...] = ("greedy", "plain", "full")

_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


@flax.struct.dataclass
class Settings:
    """What each row's request says of its tokens.

    Attributes:
      seed_B, sample_B: uint32, choose the noise.
      numbers: float32 [B] each, by the names of `RowSampling`.
      top_k_B: int32; 0: all.
      stop_ids_BS: int32; -1 is none.
      bias_ids_BK: int32; V is none.
      bias_BK: float32.
    """

    seed_B: jax.Array
    sample_B: jax.Array
    numbers: dict[str, jax.Array]
    top_k_B: jax.Array
    stop_ids_BS: jax.Array
    bias_ids_BK: jax.Array
    bias_BK: jax.Array


def settings_of(requests: Sequence[Request], vocabulary: int) -> Settings:
    """The settings of requests, one a row, in arrays of the host, which a program takes as they
    are."""

    def filled(rows: Sequence[Sequence[float]], width: int, fill: float, dtype: type) -> np.ndarray:
        out = np.full((len(rows), width), fill, dtype)
        for place, row in enumerate(rows):
            out[place, : len(row)] = row
        return out

    samplings = [request.sampling for request in requests]
    ids = [[token for token, _ in s.logit_bias] for s in samplings]
    biases = [[bias for _, bias in s.logit_bias] for s in samplings]
    arrays: dict[str, Any] = {
        "seed_B": np.array([request.seed for request in requests], np.uint32),
        "sample_B": np.array([request.sample for request in requests], np.uint32),
        "numbers": {
            name: np.array([getattr(s, name) for s in samplings], np.float32) for name in _NUMBERS
        },
        "top_k_B": np.array([min(s.top_k, vocabulary) for s in samplings], np.int32),
        "stop_ids_BS": filled([r.stop_ids for r in requests], MOST_STOP_IDS, -1, np.int32),
        "bias_ids_BK": filled(ids, MOST_BIASES, vocabulary, np.int32),
        "bias_BK": filled(biases, MOST_BIASES, 0, np.float32),
    }
    return Settings(**arrays)


def draw_of(request: Request) -> Draw:
    """The least that a program must contain for a request."""
    sampling = request.sampling
    if request.logprobs is not None:
        return "full"
    if request.greedy:
        return "greedy"
    off = (sampling.top_k, sampling.top_p, sampling.min_p, sampling.repetition_penalty,
           sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias)  # fmt: skip
    return "plain" if off == (0, 1.0, 0.0, 1.0, 0.0, 0.0, ()) else "full"


def choose(
    logits_BV: jax.Array,
    settings: Settings,
    *,
    draw: Draw,
    position_B: jax.Array,
    seen_BV: jax.Array,
    counts_BV: jax.Array,
) -> jax.Array:
    """One token for each row, int32 [B].

    Args:
      logits_BV: float32.
      settings: of the rows.
      draw: static.
      position_B: int32, tokens that each row holds; with the seed it chooses the noise.
      seen_BV: True for tokens of the prompt and the answer.
      counts_BV: int32, how often each token occurs in the answer.
    """
    if draw == "full":
        logits_BV = _penalised(logits_BV, settings, seen_BV, counts_BV)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if draw == "greedy":
        return likeliest_B
    temperature_B = settings.numbers["temperature"]
    greedy_B = temperature_B == 0
    logits_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    if draw == "full":
        logits_BV = _kept(logits_BV, settings)
    stream_B2 = jnp.stack([jnp.zeros_like(settings.sample_B), settings.sample_B], axis=1)

    def one(key: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, position), logits_V)

    keys_B = row_keys(settings.seed_B, stream_B2)
    drawn_B = jax.vmap(one)(keys_B, position_B, logits_BV).astype(jnp.int32)
    return jnp.where(greedy_B, likeliest_B, drawn_B)


def _penalised(
    logits_BV: jax.Array, settings: Settings, seen_BV: jax.Array, counts_BV: jax.Array
) -> jax.Array:
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    logits_BV = logits_BV.at[rows_B1, settings.bias_ids_BK].add(settings.bias_BK, mode="drop")
    repetition, presence, frequency = (
        settings.numbers[f"{name}_penalty"][:, None]
        for name in ("repetition", "presence", "frequency")
    )
    logits_BV = penalize_repetition(logits_BV, seen_BV, repetition)
    taken_BV = presence * (counts_BV > 0) + frequency * counts_BV.astype(jnp.float32)
    return logits_BV - taken_BV


def _kept(logits_BV: jax.Array, settings: Settings) -> jax.Array:
    """The logits that top-k, top-p and min-p keep, the others -inf; one sort for all.

    As `infer.sample` has them one after another: ties with the last token kept are kept.
    """
    V = logits_BV.shape[-1]
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    last_B1 = jnp.clip(settings.top_k_B, 1, V)[:, None] - 1
    kth_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
    kth_B1 = jnp.where(settings.top_k_B[:, None] > 0, kth_B1, -jnp.inf)
    sorted_BV = jnp.where(sorted_BV >= kth_B1, sorted_BV, -jnp.inf)
    top_p_B1 = settings.numbers["top_p"][:, None]
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    smallest_B1 = jnp.min(
        jnp.where(before_BV < top_p_B1, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    smallest_B1 = jnp.where(top_p_B1 < 1, jnp.minimum(smallest_B1, sorted_BV[:, :1]), -jnp.inf)
    share_B1 = settings.numbers["min_p"][:, None]
    least_B1 = jnp.maximum(sorted_BV[:, :1] + jnp.log(share_B1), jnp.maximum(kth_B1, smallest_B1))
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


def scores(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens' log-probabilities [B], and the likeliest tokens [B, 20] with theirs.

    A vocabulary of fewer tokens gives as many as it has.
    """
    log_p_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    top, ids = jax.lax.top_k(log_p_BV, min(MOST_LOGPROBS, logits_BV.shape[-1]))
    chosen_B = jnp.take_along_axis(log_p_BV, token_B[:, None], axis=-1)[:, 0]
    return chosen_B, ids.astype(jnp.int32), top
