"""Choosing the next token from logits: pure functions, one row independent of another.

Shapes: B rows, V vocabulary. Filters set the logits that they remove to -inf; they are applied
in the order of Hugging Face's `generate`: repetition penalty, temperature, top-k, top-p, min-p.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.ranges import AboveZero, Count, NotNegative, PositiveShare, Share, check_numbers


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults sample from the model's own distribution.

    Example:
      >>> from mmfree_jax.infer import Sampling
      >>> Sampling(top_p=1.5)
      Traceback (most recent call last):
      mmfree_jax.errors.ConfigError: top_p is 1.5: set a value in (0, 1]
    """

    temperature: NotNegative = 1.0
    """Divides the logits; 0: always the likeliest token (greedy)."""
    top_k: Count | None = None
    """Keep only this many of the likeliest tokens; None: all."""
    top_p: PositiveShare = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; 1: all."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest token's probability; 0: none."""
    repetition_penalty: AboveZero = 1.0
    """Above 1, tokens that have occurred become less likely (arXiv 1909.05858, section 4.1);
    1: off."""

    def __post_init__(self) -> None:
        check_numbers(self)

    def filters(self) -> "Filters":
        """What a compiled program must know: which filters are on."""
        greedy = self.temperature == 0
        return Filters(
            greedy,
            None if greedy else self.top_k,
            not greedy and self.top_p < 1,
            not greedy and self.min_p > 0,
            self.repetition_penalty != 1,
        )

    def numbers(self) -> dict[str, jax.Array]:
        """What a compiled program may be told anew at each call."""
        numbers = {
            name: jnp.float32(getattr(self, name))
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        }
        # Below it logits would become inf, and several of them equally likely.
        return numbers | {"temperature": jnp.float32(max(self.temperature, 1e-30))}


class Filters(NamedTuple):
    """Which steps of the choice a program contains; what is off costs nothing."""

    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    repetition_penalty: bool


def penalize_repetition(
    logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.typing.ArrayLike
) -> jax.Array:
    """Divides the positive logits of seen tokens by `penalty`, multiplies the negative ones."""
    weaker_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, weaker_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
    """Keeps the k largest logits of each row, and any that equal the k-th."""
    k = min(k, logits_BV.shape[-1])
    smallest_B1 = jax.lax.top_k(logits_BV, k)[0][..., -1:]
    return jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.typing.ArrayLike) -> jax.Array:
    """Keeps the smallest set of likeliest tokens with probability p or more (arXiv 1904.09751).

    The likeliest token is always kept, and so is any that ties with the last one kept.
    """
    sorted_BV = jnp.flip(jnp.sort(logits_BV, axis=-1), axis=-1)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    smallest_B1 = jnp.min(jnp.where(before_BV < p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
    smallest_B1 = jnp.minimum(smallest_B1, sorted_BV[..., :1])
    return jnp.where(logits_BV >= smallest_B1, logits_BV, -jnp.inf)


def keep_min_p(logits_BV: jax.Array, share: jax.typing.ArrayLike) -> jax.Array:
    """Keeps tokens at least `share` times as likely as the likeliest (arXiv 2407.01082)."""
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.where(logits_BV >= largest_B1 + jnp.log(share), logits_BV, -jnp.inf)


def filter_logits(
    logits_BV: jax.Array,
    filters: Filters,
    numbers: dict[str, jax.Array],
    seen_BV: jax.Array,
) -> jax.Array:
    """The logits to draw from: penalised, divided by the temperature and filtered.

    Args:
      logits_BV: float32.
      filters: static.
      numbers: the settings of the filters, from `Sampling.numbers`.
      seen_BV: True for tokens that have occurred; read for the repetition penalty only.
    """
    if filters.repetition_penalty:
        logits_BV = penalize_repetition(logits_BV, seen_BV, numbers["repetition_penalty"])
    if filters.greedy:
        return logits_BV
    logits_BV = logits_BV / numbers["temperature"]
    if filters.top_k is not None:
        logits_BV = keep_top_k(logits_BV, filters.top_k)
    if filters.top_p:
        logits_BV = keep_top_p(logits_BV, numbers["top_p"])
    if filters.min_p:
        logits_BV = keep_min_p(logits_BV, numbers["min_p"])
    return logits_BV


def sample(
    logits_BV: jax.Array,
    filters: Filters,
    numbers: dict[str, jax.Array],
    *,
    key_B: jax.Array,
    position_B: jax.Array,
    seen_BV: jax.Array,
) -> jax.Array:
    """One token for each row, int32 [B].

    A row's draw depends on its own key, position and logits alone, so it is the same in any
    batch, and the same when a saved state is taken up again.

    Args:
      logits_BV: float32.
      filters: static.
      numbers: the settings of the filters.
      key_B: typed PRNG keys, one a row (see `row_keys`).
      position_B: int32, tokens that the row holds already.
      seen_BV: True for tokens that have occurred in the row.
    """
    logits_BV = filter_logits(logits_BV, filters, numbers, seen_BV)
    if filters.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(key: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(key, position), logits_V)

    return jax.vmap(draw)(key_B, position_B, logits_BV).astype(jnp.int32)


@jax.jit
def row_keys(seed_B: jax.Array, stream_B2: jax.Array) -> jax.Array:
    """The key of each row's stream of random numbers, typed PRNG keys [B].

    Args:
      seed_B: uint32.
      stream_B2: uint32, two numbers that tell the streams of a seed apart: the prompt's place in
        the request, and the number of the sample.
    """

    def key(seed: jax.Array, stream_2: jax.Array) -> jax.Array:
        prompt = jax.random.fold_in(jax.random.key(seed), stream_2[0])
        return jax.random.fold_in(prompt, stream_2[1])

    return jax.vmap(key)(seed_B, stream_B2)
