"""What replaces a lock in a bucket: an object that its holder keeps writing anew.

The rule. Whoever makes the object by a conditional write holds it; it says who that is, and for
how long (`seconds`) each write counts. The holder replaces it four times in that time, on the
condition that nobody else did. Whoever finds it held watches it: a new version says that the
holder lives, and it is refused; a version that stands for all of `seconds`, by the watcher's own
clock, is of a holder that died, and is replaced on the condition that it is still that version. So
one job in all gets it, and no clocks are compared. A holder that finds another's version, or could
not write for `seconds`, has lost it and must write nothing more (`check`).
"""

import contextlib
import dataclasses
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mmfree_jax.environment import LONGEST, seconds_of
from mmfree_jax.errors import OutputError, StorageError
from mmfree_jax.storage import (
    ChangedError,
    Url,
    create,
    delete,
    find_object,
    read_bytes,
    replace,
)

SECONDS = "MMFREE_LEASE_SECONDS"
"""Environment variable: how long a write counts, 60 if it is not set."""
LEASE = ".lease.json"
"""Name of a lease's object, below the URL that it is for."""
_BEATS = 4
"""That a holder writes in the time that one counts."""


class InUseElsewhereError(OutputError):
    """Another job holds the lease."""


class LeaseLostError(StorageError):
    """Another job may hold the lease by now."""


@dataclass(frozen=True)
class _Text:
    """What the object holds; never twice the same, for S3's versions are digests of it."""

    owner: str
    seconds: float
    job: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))

    def at(self, beat: int) -> bytes:
        """As it is written for the beat of that number."""
        return json.dumps(dataclasses.asdict(self) | {"beat": beat}).encode()


class Lease:
    """A lease that this process holds.

    Not made directly: see `take_lease`. Its writes come from a thread of its own.
    """

    def __init__(
        self,
        url: Url,
        what: str,
        text: "_Text",
        version: str,
        begun: float,
        clock: Callable[[], float],
    ) -> None:
        self._url, self._what, self._text = url, what, text
        self._version, self._clock = version, clock
        self._beats, self._written, self._lost = 0, begun, False
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def start(self) -> None:
        """Starts to write it anew, until `release`."""
        self._thread.start()

    def _keep(self) -> None:
        while not self._ended.wait(self._text.seconds / _BEATS):
            with contextlib.suppress(StorageError):  # `check` tells
                self.beat()

    def beat(self) -> None:
        """Writes it anew.

        Raises:
          LeaseLostError: another job took it over.
          StorageError: the bucket refuses, or cannot be reached.
        """
        with self._lock:
            if self._lost:
                raise self._loss()
            begun = self._clock()
            try:
                self._version = replace(self._url, self._text.at(self._beats + 1), self._version)
            except ChangedError as e:
                self._lost = True
                raise self._loss() from e
            self._beats, self._written = self._beats + 1, begun

    def check(self) -> None:
        """Sees that it is still held; call before what must not be done twice.

        Raises:
          LeaseLostError: another job took it over, or could have.
          StorageError: the bucket refuses, or cannot be reached.
        """
        if self._lost or self._clock() - self._written > self._text.seconds / 2:
            self.beat()

    def _loss(self) -> LeaseLostError:
        return LeaseLostError(
            f"{self._what} was taken over by another job while this one could not reach the bucket "
            "or stood still: nothing more is written; choose one of them"
        )

    def _stop(self) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def remove(self) -> None:
        """Deletes its object, while nobody else may have it, so that nothing of it stays."""
        self._stop()
        with contextlib.suppress(StorageError):
            self.check()
            delete(self._url)

    def release(self) -> None:
        """Lets the next job have it at once."""
        self._stop()
        with contextlib.suppress(StorageError), self._lock:
            if not self._lost:
                released = dataclasses.replace(self._text, owner="")
                replace(self._url, released.at(self._beats + 1), self._version)


def take_lease(
    url: Url,
    what: str,
    owner: str,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Lease:
    """Takes the lease `url`; waits for one whose holder is silent to run out.

    Args:
      url: of its object.
      what: is in use while it is held, for messages.
      owner: who takes it, for messages to others.
      clock: seconds from any origin.
      sleep: waits for so many seconds.

    Raises:
      InUseElsewhereError: its holder lives; says who.
      StorageError: the bucket is missing, refuses, or cannot be reached.
    """
    seconds = seconds_of(SECONDS)
    version, holder, theirs = _look(url)
    if version is not None and holder:
        end = clock() + theirs
        while clock() < end:
            sleep(min(theirs / (2 * _BEATS), max(0.0, end - clock())))
            found = _look(url)
            if found[0] != version and found[1]:
                raise _in_use(what, found[1])
            version = found[0]
            if not found[1]:  # released
                break
    text, begun = _Text(owner, seconds), clock()
    try:
        data = text.at(0)
        version = create(url, data) if version is None else replace(url, data, version)
    except ChangedError:
        raise _in_use(what, _look(url)[1]) from None
    return Lease(url, what, text, version, begun, clock)


def _in_use(what: str, holder: str) -> InUseElsewhereError:
    return InUseElsewhereError(
        f"{what} is in use by another job ({holder or 'unknown'}): wait for it to end, or choose "
        "another"
    )


def read_lease(data: bytes) -> tuple[str, float]:
    """Who holds a lease, by what its object holds, and the seconds that each write of it counts.

    Returns:
      The owner, "" after its release; "unknown", and the seconds of our own writes, where it is
      none that anybody writes.
    """
    try:
        values = json.loads(data)
        seconds = float(values["seconds"])
        if 0 <= seconds <= LONGEST:
            return str(values["owner"]), seconds
    except (ValueError, TypeError, KeyError):
        pass
    return "unknown", seconds_of(SECONDS)


def _look(url: Url) -> tuple[str | None, str, float]:
    """Version, holder and seconds of a lease; None, "" and 0 where there is none."""
    while (found := find_object(url)) is not None:
        data = read_bytes(url)
        if find_object(url) != found:
            continue
        return found.version, *read_lease(data)
    return None, "", 0.0


@contextlib.contextmanager
def lease(url: Url, what: str, owner: str, *, remove: bool = False) -> Iterator[Lease]:
    """Holds a lease for the block; see `take_lease`. `remove`: nothing of it stays behind."""
    held = take_lease(url, what, owner)
    held.start()
    try:
        yield held
    finally:
        held.remove() if remove else held.release()
