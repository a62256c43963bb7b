"""Why a sweep stops early."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from mmfree_jax.signals import heard


class Stop:
    """True once there was a signal, or the time is up.

    Attributes:
      signal: the last one heard while `listening`.
    """

    def __init__(self, deadline: float | None, clock: Callable[[], float]) -> None:
        self.signal: int | None = None
        self._deadline, self._clock = deadline, clock

    def __bool__(self) -> bool:
        late = self._deadline is not None and self._clock() >= self._deadline
        return late or self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGINT, SIGTERM and a terminal's end (SIGHUP) as requests, while inside."""

        def note(number: int, _: Any) -> None:
            self.signal = number

        with heard(note):
            yield
