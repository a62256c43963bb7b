"""One request's events, from the engine's thread to whoever asked."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator

from mmfree_jax.serve.requests import End, Event, Request


class Handle:
    """A submitted request. Its events are bounded by `max_tokens`, so that none waits for a reader.

    Read it from one place: a coroutine (`async for event in handle`) or a thread (`for event in
    handle.events()`).

    Attributes:
      request: what was asked.
      submitted_s: when, by `time.monotonic`.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.submitted_s = time.monotonic()
        self._events: deque[Event] = deque()
        self._arrived = threading.Condition()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken: asyncio.Event | None = None
        self._cancelled: tuple[int | None] | None = None

    def cancel(self, keep: int | None = None) -> None:
        """Ends the request within the call of the device that runs now; a second call does nothing.

        Args:
          keep: tokens of the answer that count, at most those given so far: of the usage, and of
            the session that `save_as` names. None: all that were given, and nothing is saved.
        """
        if self._cancelled is None:
            self._cancelled = (keep,)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled is not None

    @property
    def keep(self) -> int | None:
        """What `cancel` was given."""
        return None if self._cancelled is None else self._cancelled[0]

    @property
    def has_more(self) -> bool:
        """Whether an event is at hand, so that the reader need not wait for it."""
        return bool(self._events)

    def put(self, event: Event) -> "asyncio.AbstractEventLoop | None":
        """Adds an event; called by the engine.

        Returns:
          The loop that must be woken (`wake`) for the reader to see it; None: a thread reads.
        """
        with self._arrived:
            self._events.append(event)
            self._arrived.notify()
            return self._loop

    def wake(self) -> None:
        """Wakes a coroutine that waits; called on its loop."""
        if self._woken is not None:
            self._woken.set()

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """Events as they come, up to the `End`.

        Args:
          timeout_s: longest wait for one event; None: no limit.

        Raises:
          TimeoutError: it passed.
        """
        while True:
            with self._arrived:
                if not self._arrived.wait_for(lambda: self._events, timeout_s):
                    raise TimeoutError(f"no event within {timeout_s} s")
                event = self._events.popleft()
            yield event
            if isinstance(event, End):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events as they come, up to the `End`; several that came at once without a pause."""
        self._woken = asyncio.Event()
        with self._arrived:
            self._loop = asyncio.get_running_loop()
        while True:
            self._woken.clear()
            while self._events:
                event = self._events.popleft()
                yield event
                if isinstance(event, End):
                    return
            await self._woken.wait()
