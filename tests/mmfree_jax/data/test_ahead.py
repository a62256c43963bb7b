"""Values made ahead by a thread."""

import gc
import itertools
import threading

import pytest

from mmfree_jax.data.ahead import Ahead


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_values_come_in_order_and_what_fails_in_its_turn(depth):
    def values():
        yield from (10, 11, 12)
        raise OSError("gone")

    ahead = Ahead(values(), depth)
    assert list(itertools.islice(ahead, 3)) == [10, 11, 12]
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    assert list(Ahead(iter("abc"), depth)) == ["a", "b", "c"]


def test_no_more_than_the_depth_are_made_ahead():
    made, has_made = [], threading.Semaphore(0)

    def values():
        for i in itertools.count():
            made.append(i)
            has_made.release()
            yield i

    ahead = Ahead(values(), 3)
    for _ in range(3):
        assert has_made.acquire(timeout=60)
    assert not has_made.acquire(timeout=0.05)  # a fourth is not begun
    assert next(ahead) == 0
    assert has_made.acquire(timeout=60)
    assert not has_made.acquire(timeout=0.05)
    assert made == [0, 1, 2, 3]
    ahead.close()
    assert list(ahead) == []


def test_wait_says_whether_the_next_is_there():
    go_on = threading.Event()

    def values():
        assert go_on.wait(60)
        yield 1
        raise OSError("gone")

    ahead = Ahead(values(), 2)
    assert not ahead.wait(0.01)
    go_on.set()
    assert ahead.wait(60)
    assert next(ahead) == 1
    assert ahead.wait(60)  # an error comes at once too
    with pytest.raises(OSError, match="gone"):
        next(ahead)
    assert Ahead(values(), 0).wait(0.0)


@pytest.mark.parametrize("end", ["close", "forgotten"])
def test_the_thread_ends(end):
    before = set(threading.enumerate())
    ahead = Ahead(itertools.count(), 2)
    (thread,) = set(threading.enumerate()) - before
    if end == "close":
        ahead.close()
    del ahead
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
