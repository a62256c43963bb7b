"""Notices when a process of the run is gone or hangs, and says which.

Every process leaves a sign of life at the coordinator every few seconds: how often its main
thread has come somewhere (`beat`), and where last. Process 0 alone reads all of them; the
others read its sign and its verdict, so that the traffic grows with the number of processes
and not with its square.
"""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

from mmfree_jax.parallel.processes import ProcessLostError, ProcessOptions, describe_self, leave

_VERDICT = "verdict"


class Store(Protocol):
    """Where processes leave notes for each other: `processes.Notes`."""

    def put(self, name: str, text: str) -> None:
        """Writes or replaces a note."""

    def get(self, name: str) -> str | None:
        """Reads a note; None if there is none."""


@dataclasses.dataclass
class _Peer:
    """What is known of another process."""

    where: str = "never heard of"
    beats: int = -1
    place: str = "the start"
    count: int = -1
    heard_at: float = 0.0


class Watchdog:
    """Watches over the processes of a run from a thread of its own.

    The main thread calls `beat` wherever it has got on. `look` is one round of the thread: it
    leaves a sign of life, reads the others' and returns a verdict, or None. The clock, the
    store and what is done about a verdict are the caller's.
    """

    def __init__(
        self,
        index: int,
        count: int,
        store: Store,
        options: ProcessOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        act: Callable[[str], Any] | None = None,
    ) -> None:
        self._index, self._count, self._store = index, count, store
        self._options, self._clock = options, clock
        self._act = act or (lambda verdict: leave(ProcessLostError(verdict)))
        self._beats, self._place, self._rounds = 0, "the start", 0
        self._moved_at = clock()
        now = clock()
        watched = range(1, count) if index == 0 else (0,)
        self._peers = {i: _Peer(heard_at=now) for i in watched}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._looked_at = now

    def beat(self, place: str) -> None:
        """Says that the main thread has got to `place` ("step 12")."""
        self._beats += 1
        self._place = place
        self._moved_at = self._clock()

    def look(self) -> str | None:
        """One round: leaves a sign of life and reads the others'. Returns a verdict, or None."""
        with self._lock:
            verdict = None if self._index == 0 else self._store.get(_VERDICT)
            if verdict is not None:
                return verdict
            self._rounds += 1
            sign = (describe_self(), self._beats, self._place, self._rounds)
            self._store.put(f"life/{self._index}", json.dumps(sign))
            now = self._clock()
            for i, peer in self._peers.items():
                text = self._store.get(f"life/{i}")
                if text is None:
                    continue
                where, beats, place, count = json.loads(text)
                if count != peer.count:
                    peer.heard_at = now
                peer.where, peer.beats, peer.place, peer.count = where, beats, place, count
            self._looked_at = self._clock()
            verdict = self._judge(now)
            if verdict is not None and self._index == 0:
                self._store.put(_VERDICT, verdict)
            return verdict

    def _judge(self, now: float) -> str | None:
        silent = self.silent(now, self._options.silent_seconds)
        if silent is not None:
            return silent
        hang = self._options.hang_seconds
        if self._index or now - self._moved_at < hang:
            return None  # process 0 knows all of them, and says so
        # This one stands still too, waiting for whoever has come least far.
        beats = {0: self._beats} | {i: peer.beats for i, peer in self._peers.items()}
        behind = [i for i in beats if beats[i] == min(beats.values())]
        if len(behind) == self._count:
            return (
                f"no process has got on for {hang:g} s; all are after {self._place}: a collective "
                "hangs, or the file system does; run the command again: it resumes"
            )
        return (
            f"{self._names(behind)[0]} did not arrive: no further than "
            f"{self._place_of(behind[0])} for {hang:g} s, while others wait at "
            f"{self._furthest()}; run the command again: it resumes"
        )

    def silent(self, now: float, seconds: float) -> str | None:
        """Names the processes that have shown no sign of life for `seconds`; None if none."""
        gone = [i for i, peer in self._peers.items() if now - peer.heard_at >= seconds]
        if not gone:
            return None
        since = max(now - self._peers[i].heard_at for i in gone)
        return (
            f"{' '.join(self._names(gone))} gone or stopped: no sign of life for {since:.0f} s, "
            f"last after {self._place_of(gone[0])}; run the command again: it resumes"
        )

    def _names(self, indices: list[int]) -> tuple[str, str]:
        """The processes and the verb that goes with them."""

        def name(i: int) -> str:
            where = describe_self() if i == self._index else self._peers[i].where
            return f"process {i} ({where})"

        more = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
        return ", ".join(map(name, indices[:4])) + more, "is" if len(indices) == 1 else "are"

    def _place_of(self, i: int) -> str:
        return self._place if i == self._index else self._peers[i].place

    def _furthest(self) -> str:
        best = max(self._peers.values(), key=lambda peer: peer.beats)
        return best.place if best.beats > self._beats else self._place

    def start(self) -> None:
        """Starts watching."""
        for target, name in ((self._watch, "watchdog"), (self._watch_store, "watchdog-store")):
            thread = threading.Thread(target=target, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _watch(self) -> None:
        while not self._stop.wait(self._options.beat_seconds):
            try:
                verdict = self.look()
            except Exception as e:  # the coordinator has gone: JAX ends this process by itself
                print(f"watchdog: the coordinator does not answer: {e}", file=sys.stderr)
                return
            if verdict is not None:
                self._act(verdict)
                return

    def _watch_store(self) -> None:
        """A call to a coordinator that was stopped does not return: watch from outside."""
        limit = self._options.silent_seconds + 2 * self._options.beat_seconds
        while not self._stop.wait(self._options.beat_seconds):
            # Read before the clock: a process that was itself stopped and goes on has a gap
            # in both, and must first look again.
            looked_at = self._looked_at
            if self._clock() - looked_at > limit:
                if self._stop.wait(self._options.beat_seconds) or self._looked_at != looked_at:
                    continue
                self._act(
                    f"process 0, the coordinator, is gone or stopped: no answer for {limit:.0f} s "
                    f"(this one is after {self._place}); run the command again: it resumes"
                )
                return

    def explain(self) -> str | None:
        """After a collective has failed: waits for what shows who is missing, and names them.

        Returns:
          The verdict; None if every process shows life.
        """
        patience = 3 * self._options.beat_seconds
        deadline = self._clock() + 3 * patience
        while self._clock() < deadline:
            try:
                verdict = self.look()
            except jax.errors.JaxRuntimeError:
                if self._index:  # the coordinator went down with its process
                    return (
                        "process 0, the coordinator, is gone: it does not answer (this one is "
                        f"after {self._place}); run the command again: it resumes"
                    )
                verdict = None  # its service has noticed the loss, and keeps no notes any more
            if verdict is None and self._index == 0:
                verdict = self.silent(self._clock(), patience)
            if verdict is not None:
                if self._index == 0:
                    with contextlib.suppress(jax.errors.JaxRuntimeError):
                        self._store.put(_VERDICT, verdict)
                    time.sleep(2 * self._options.beat_seconds)  # time for the others to read it
                return verdict
            time.sleep(self._options.beat_seconds / 2)
        return None

    def stop(self) -> None:
        """Stops watching."""
        self._stop.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * self._options.beat_seconds)
