"""States by the tokens before them: what is found, what goes when room is short."""

import jax.numpy as jnp

from mmfree_jax.model import Session, State
from mmfree_jax.serve.prefix_cache import PrefixCache, session_bytes


def state(value: int) -> Session:
    """60 bytes."""
    return Session(
        State(jnp.full(1, value, jnp.int32), {"h": jnp.zeros((2, 1, 3))}),
        jnp.zeros((1, 7)),
        jnp.zeros((1, 4), bool),
    )


def test_the_longest_beginning_is_found() -> None:
    cache = PrefixCache(1000)
    cache.add((1, 2), state(2))
    cache.add((1, 2, 3, 4), state(4))
    for prompt, length in [
        ((1, 2, 3, 4, 5), 4),
        ((1, 2, 3, 4), 4),
        ((1, 2, 3, 5), 2),
        ((1, 2), 2),
    ]:
        found, session = cache.find(prompt)
        assert found == length
        assert session is not None
        assert session.state.position_B[0] == length
    for prompt in [(1,), (2, 1), (12,), ()]:
        assert cache.find(prompt) == (0, None)
    assert (cache.hits, cache.misses, cache.tokens_saved) == (4, 4, 12)
    assert cache.holds((1, 2))
    assert not cache.holds((1, 2, 3))


def test_the_one_not_used_for_longest_goes() -> None:
    assert session_bytes(state(0)) == 60
    cache = PrefixCache(150)
    for token in (1, 2):
        cache.add((token,), state(token))
    cache.find((1,))
    cache.add((3,), state(3))
    assert [cache.find((token,))[0] for token in (1, 2, 3)] == [1, 0, 1]
    assert (len(cache), cache.bytes) == (2, 120)
    cache.add((3,), state(3))
    assert (len(cache), cache.bytes) == (2, 120)
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_is_too_large_or_not_wanted_is_not_kept() -> None:
    small, none = PrefixCache(59), PrefixCache(0)
    for cache in (small, none):
        cache.add((1,), state(1))
        assert cache.find((1,)) == (0, None)
        assert len(cache) == 0
    assert none.misses == 0
    assert none.holds((1,))  # so that no state is copied for it
