"""Processes that come and go: when one is lost the others go on, until it is back.

`local.run` starts a command once. Here it is started again, on the places that are left, for as
long as a restart can mend how it ended. A place is one process's share of the machine's devices.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from mmfree_jax.children import Children
from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.local import Launch, Plan, Signals, environment, free_port, meeting_place
from mmfree_jax.parallel.process_options import EXIT_LOST, PLANNED
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, NotNegative, check_numbers
from mmfree_jax.signals import EXIT_CODES, heard

_TAKEN = (-signal.SIGKILL, -signal.SIGTERM)
"""How a process ends whose machine, or memory, is taken away."""
_TOLD = tuple(EXIT_CODES[s.name] for s in (signal.SIGTERM, signal.SIGUSR1))
_SOON_SECONDS = 60.0
_LONGEST_BACK_OFF = 60.0
_LOOK_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Elastic:
    """When to go on without processes that were lost."""

    min_processes: Count = 1
    """Fewer do not go on."""
    multiple_of: Count = 1
    """Number of processes that a mesh needs a multiple of."""
    restore_after: AboveZero | None = None
    """Seconds after which a lost place is taken to be back; None: SIGUSR2 says so."""
    max_restarts: CountOrZero = 20
    """After losses, in all."""
    back_off: NotNegative = 1.0
    """Seconds before a restart; twice as many after each attempt that ended within a minute."""

    def __post_init__(self) -> None:
        check_numbers(self)


def run_elastic(
    plan: Plan,
    elastic: Elastic,
    *,
    environ: Mapping[str, str],
    out: IO[str],
    on_start: Callable[[list], None] = lambda processes: None,
) -> int:
    """Starts the processes, and again on the places that are left, to an end that is final.

    Final are success, a signal to this process, exit codes that no restart can mend (2: bad
    input; 130 and 129: somebody's Ctrl-C and hang-up; any other but those of a loss), too few
    places, and too many restarts. When places are back the processes are told to save and leave,
    and start again on all of them.

    Args:
      plan: what to start, and on how many places.
      elastic: when to go on with fewer.
      environ: to build the processes' environments from.
      out: receives their output.
      on_start: called with the processes of every attempt once they were started.

    Returns:
      The exit code of the last attempt, as `local.run` gives it.
    """
    signals = Signals()
    if plan.count < elastic.min_processes:
        raise ConfigError(
            f"min_processes is {elastic.min_processes}: set --min-processes to {plan.count}, the "
            "number of processes, or less"
        )
    places = _Places(plan.count, elastic)
    # Once: a GPU that is gone must not change which are whose.
    shares = [environment(plan, place, 0, environ) for place in range(plan.count)]
    with Children(plan.stop_seconds) as children, heard(signals.receive), _told(places):
        restarts, soon = 0, 0
        while True:
            launch, began = Launch(plan, children, signals, out), time.monotonic()
            port, count = plan.port or free_port(), len(places.used)
            for index, place in enumerate(places.used):
                meeting = meeting_place(port, count, index)
                launch.start(shares[place] | meeting | {PLANNED: str(plan.count)})
            launch.say(_started(places, launch))
            on_start(launch.processes)
            code = launch.wait(lambda launch=launch: _grow_if_due(places, launch))
            if signals.received or code == 0:
                return code
            lost = lost_processes(launch)
            if lost is None:
                return code
            if launch.was_told and not lost:
                places.restore()
                continue
            places.lose(lost)
            restarts, soon = restarts + 1, soon + 1
            if time.monotonic() - began >= _SOON_SECONDS:
                soon = 1
            if why := places.too_few() or _too_many(restarts, elastic):
                launch.say(f"{why}: not started again")
                return code
            pause = min(_LONGEST_BACK_OFF, elastic.back_off * 2 ** min(soon - 1, 10))
            launch.say(
                f"starting again on {len(places.used)} of {plan.count} places in {pause:g} s "
                f"(restart {restarts} of at most {elastic.max_restarts})"
            )
            if _interrupted(signals, pause):
                return 128 + signals.received[-1]


def lost_processes(launch: Launch) -> set[int] | None:
    """The processes whose places an attempt that failed has lost.

    Returns:
      Their numbers, of which there may be none; None: no restart can mend this end.
    """
    how = (-signal.SIGKILL,) if launch.was_told else _TAKEN
    taken = {i for i, p in enumerate(launch.processes) if p.returncode in how} - launch.killed
    if taken or launch.was_told:
        return taken
    if launch.first_failed is None:
        return None
    status = launch.processes[launch.first_failed].returncode
    if status == EXIT_LOST:  # it noticed another, which may stand still
        return set(launch.killed)
    if status in _TOLD or (status < 0 and status != -signal.SIGINT):
        return {launch.first_failed}
    return None


class _Places:
    """Which places there are, and which of them processes are started on."""

    def __init__(self, count: int, elastic: Elastic) -> None:
        self.count, self._elastic = count, elastic
        self.is_told = False
        self._gone: set[int] = set()
        self._due: float | None = None
        self.used: Sequence[int] = range(count)

    @property
    def are_back(self) -> bool:
        """Whether those that are gone are said to be back, or due to."""
        if not self._gone:
            self.is_told = False  # of nothing
            return False
        return self.is_told or (self._due is not None and time.monotonic() >= self._due)

    @property
    def gone(self) -> int:
        """How many are."""
        return len(self._gone)

    def lose(self, processes: set[int]) -> None:
        """Those that these processes were on are gone."""
        self._gone |= {self.used[i] for i in processes}
        if processes and self._elastic.restore_after is not None:
            self._due = time.monotonic() + self._elastic.restore_after
        left = [place for place in range(self.count) if place not in self._gone]
        self.used = left[: len(left) - len(left) % self._elastic.multiple_of]

    def restore(self) -> None:
        """All are there again."""
        self._gone.clear()
        self.is_told = False
        self._due, self.used = None, range(self.count)

    def too_few(self) -> str | None:
        """That there are, in words; None: there are enough."""
        least = max(1, self._elastic.min_processes)
        if len(self.used) >= least:
            return None
        there = f"{self.count - len(self._gone)} of {self.count} places are left"
        return f"{there}, of which {len(self.used)} make a mesh, fewer than --min-processes {least}"


def _too_many(restarts: int, elastic: Elastic) -> str | None:
    most = elastic.max_restarts
    return f"restarted {most} times, --max-restarts" if restarts > most else None


def _started(places: _Places, launch: Launch) -> str:
    pids = ", ".join(str(process.pid) for process in launch.processes)
    return f"started {len(launch.processes)} of {places.count} processes (pids {pids})"


def _grow_if_due(places: _Places, launch: Launch) -> None:
    if places.are_back and not launch.was_told and launch.first_failed is None:
        launch.say(f"{places.gone} lost places back: all to save and leave, and start again")
        launch.tell()


def _interrupted(signals: Signals, seconds: float) -> bool:
    """Waits; True if this process was told to stop meanwhile."""
    until = time.monotonic() + seconds
    while not signals.received and (left := until - time.monotonic()) > 0:
        time.sleep(min(_LOOK_SECONDS, left))
    return bool(signals.received)


@contextlib.contextmanager
def _told(places: _Places) -> Iterator[None]:
    """Lets SIGUSR2 say that the places are back while inside; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hear(number: int, frame: object) -> None:
        places.is_told = True

    before = signal.signal(signal.SIGUSR2, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR2, before)
