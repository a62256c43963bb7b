"""Gated linear attention in parallel over time, through XLA.

Steps lie in chunks. Within a chunk, two neighbouring pieces of 1, 2, 4 ... steps are joined at a
time: the later piece's queries decayed from the boundary between them, times the earlier piece's
keys decayed to it. Between chunks the state goes on, and queries read it decayed from the chunk's
start. So every exponent is a sum of logarithms of decays, at most 0, and no product can overflow;
these sums are only added to, never subtracted, so that a decay of 0 (-inf) is exact and a long fade
costs no digits of what follows it.

Shapes: B rows, H heads, N chunks of C steps, K channels of queries and keys, V of values.
"""

import jax
import jax.numpy as jnp

CHUNK = 64
"""Tokens that are worked on at once; between chunks goes the state."""


def step(
    q_BHK: jax.Array,
    k_BHK: jax.Array,
    v_BHV: jax.Array,
    log_decay_BHK: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One step: what comes out, [B, H, V], and the new state."""
    added_BHKV = k_BHK[..., None] * v_BHV[..., None, :]
    state_BHKV = jnp.exp(log_decay_BHK)[..., None] * state_BHKV + added_BHKV
    return jnp.sum(q_BHK[..., None] * state_BHKV, axis=-2), state_BHKV


@jax.checkpoint
def chunked(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHK: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """All steps: what comes out, [B, T, H, V], and the last state.

    The backward pass keeps the operands alone and computes the rest again.
    """
    B, T, H, _ = k_BTHK.shape
    C = min(CHUNK, 1 << (T - 1).bit_length())

    def chunks(x_BTHF: jax.Array) -> jax.Array:
        """[B, H, N, C, F]; steps that fill the last chunk have no key and no decay."""
        x_BTHF = jnp.pad(x_BTHF, ((0, 0), (0, -T % C), (0, 0), (0, 0)))
        return x_BTHF.reshape(B, -1, C, H, x_BTHF.shape[-1]).transpose(0, 3, 1, 2, 4)

    q, k, v, log_decay = (chunks(x) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK))
    out, before, after = _within(q, k, v, log_decay)
    added_BHNKV = jnp.einsum("bhnck,bhncv->bhnkv", k * jnp.exp(after), v)
    fade_BHNK = jnp.exp(before[..., -1, :])

    def next_chunk(
        state_BHKV: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        fade_BHK, added_BHKV = inputs
        return fade_BHK[..., None] * state_BHKV + added_BHKV, state_BHKV

    by_chunk = (jnp.moveaxis(fade_BHNK, 2, 0), jnp.moveaxis(added_BHNKV, 2, 0))
    last_BHKV, starts_NBHKV = jax.lax.scan(next_chunk, state_BHKV, by_chunk)
    out += jnp.einsum("bhnck,nbhkv->bhncv", q * jnp.exp(before), starts_NBHKV)
    out_BTHV = out.transpose(0, 2, 3, 1, 4).reshape(B, -1, H, v.shape[-1])[:, :T]
    return out_BTHV, last_BHKV


def _within(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each step of a chunk reads of the chunk's steps up to it; all arrays [B, H, N, C, ...].

    Returns:
      The outputs; the logarithms of the decays from the chunk's start to after each step; and
      those from after each step to the chunk's end.
    """
    out = jnp.sum(q * k, axis=-1, keepdims=True) * v
    before, after, size = log_decay, jnp.zeros_like(log_decay), 1
    while size < q.shape[-2]:
        (_, q2), (k1, _), (v1, _), (before1, before2), (after1, after2) = (
            _halves(x, size) for x in (q, k, v, before, after)
        )
        queries, keys = q2 * jnp.exp(before2), k1 * jnp.exp(after1)
        # Products at all sizes: XLA's CPU compiler has crashed on sums of small pieces.
        scores = jnp.einsum("bhnptk,bhnpsk->bhnpts", queries, keys)
        read = jnp.einsum("bhnpts,bhnpsv->bhnptv", scores, v1)
        out += _joined(jnp.zeros_like(read), read)
        before, after = (
            _joined(before1, before2 + before1[..., -1:, :]),
            _joined(after1 + before2[..., -1:, :], after2),
        )
        size *= 2
    return out, before, after


def _halves(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """[..., C, F] -> the earlier and the later pieces of each pair, [..., C / 2 size, size, F]."""
    *lead, steps, features = x.shape
    pairs = x.reshape(*lead, steps // (2 * size), 2, size, features)
    return pairs[..., 0, :, :], pairs[..., 1, :, :]


def _joined(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """`_halves` the other way round."""
    *lead, pairs, size, features = earlier.shape
    return jnp.stack((earlier, later), axis=-3).reshape(*lead, pairs * 2 * size, features)
