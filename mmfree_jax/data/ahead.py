"""Values that a thread makes ahead of who takes them. Nothing here imports JAX."""

import collections
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_PATIENCE_S = 5.0
"""How long `close` waits for the value that is being made."""


class _Shelf:
    """Up to `depth` values between the thread that makes them and the one that takes them."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.changed = threading.Condition()
        self.values: collections.deque[Any] = collections.deque()
        self.error: BaseException | None = None
        self.is_closed = False

    def fill(self, values: Iterator[Any]) -> None:
        """Puts `values` there until they end or nobody wants more."""
        try:
            while True:
                with self.changed:
                    self.changed.wait_for(self._has_room)
                    if self.is_closed:
                        return
                value = next(values)
                with self.changed:
                    self.values.append(value)
                    self.changed.notify_all()
        except BaseException as e:  # StopIteration too: whoever takes gets it in its turn
            with self.changed:
                self.error = e
                self.changed.notify_all()

    def _has_room(self) -> bool:
        return self.is_closed or len(self.values) < self.depth

    def has_next(self) -> bool:
        return bool(self.values) or self.error is not None or self.is_closed

    def close(self) -> None:
        with self.changed:
            self.is_closed = True
            self.values.clear()
            self.changed.notify_all()


class Ahead(Generic[T]):
    """An iterator over the same values, of which up to `depth` are made beforehand.

    What making a value raises is raised where that value would have been taken. The thread ends by
    `close`, or when nobody holds the iterator any more.
    """

    def __init__(self, values: Iterator[T], depth: int) -> None:
        """`depth`: 0: there is no thread, and each value is made when it is taken."""
        self._values, self._thread = values, None
        self._shelf = _Shelf(depth)
        weakref.finalize(self, self._shelf.close)
        if depth:
            self._thread = threading.Thread(
                target=self._shelf.fill, args=(values,), name="data ahead", daemon=True
            )
            self._thread.start()

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        if self._thread is None:
            if self._shelf.is_closed:
                raise StopIteration
            return next(self._values)
        shelf = self._shelf
        with shelf.changed:
            shelf.changed.wait_for(shelf.has_next)
            if shelf.values:
                value = shelf.values.popleft()
                shelf.changed.notify_all()
                return value
        raise shelf.error or StopIteration

    def wait(self, seconds: float) -> bool:
        """Whether `next` returns at once; waits up to `seconds` for it.

        Without a thread it is always so: then waiting makes no value.
        """
        if self._thread is None:
            return True
        with self._shelf.changed:
            return bool(self._shelf.changed.wait_for(self._shelf.has_next, seconds))

    def close(self) -> None:
        """Ends the thread; there are no more values then."""
        self._shelf.close()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)
