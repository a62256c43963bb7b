"""When to stop before the last step: signals, notices, and one decision for all processes."""

import contextlib
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.notices import ANNOUNCED
from mmfree_jax.signals import EXIT_CODES, STOPPING, heard

_REASONS = (*(number.name for number in STOPPING), *ANNOUNCED)
STOP_CODES = EXIT_CODES | dict.fromkeys(ANNOUNCED, EXIT_CODES[signal.SIGTERM.name])
"""What a run exits with that was told to stop and saved first, by what told it."""


def reason_of(wish: int) -> str | None:
    """The reason that a `StopRequest.wish` of some process stands for."""
    return _REASONS[wish - 1] if wish else None


# SLURM and systemd tell every process of a job, and a launcher or sweep among them tells its own.
_TOLD_TWICE_SECONDS = 5.0


class StopRequest:
    """Remembers what told the run to stop: the first signal of `STOPPING`, or a notice.

    Attributes:
      reason: the signal's name, or the notice's; None: nothing yet.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.reason: str | None = None
        self._say = say
        self._heard: dict[int, float] = {}

    @property
    def wish(self) -> int:
        """The reason as a number, for `Consensus`; 0: go on."""
        return 1 + _REASONS.index(self.reason) if self.reason else 0

    def announce(self, notice: str) -> None:
        """Takes a notice, a name of `ANNOUNCED`; called from any thread."""
        if self.reason is None:
            self.reason = notice
            self._say(f"{notice}: {ANNOUNCED[notice]}: saving after this step")

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number in self._heard:
            if now < self._heard[number] + _TOLD_TWICE_SECONDS:
                return
            # A second one does what it always does: stop at once. No checkpoint is harmed.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        self._heard[number] = now
        name = signal.Signals(number).name
        self.reason = self.reason or name
        if number == signal.SIGHUP:
            _leave_terminal()
        self._say(f"{name}: saving after this step; a second one ends at once")
        if number == signal.SIGINT:  # from somebody at the keyboard: a second one is meant
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _leave_terminal() -> None:
    """Lets what is still written go nowhere: writing to a terminal that is gone is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextlib.contextmanager
def catch_signals(say: Callable[[str], None] = lambda text: None) -> Iterator[StopRequest]:
    """Turns the signals that `heard` lets in into a request, while inside.

    `say` is called by the handler: it may take no lock.
    """
    request = StopRequest(say)
    with heard(request._handle):
        yield request


class Consensus:
    """What any process wants, known to all at the same step, without making a device wait.

    With several processes, each hands in its wishes after every step; their maximum is
    computed on the devices behind that step and read after the next one. So all processes see
    the same, one step late, and none waits for what it has just dispatched.
    """

    def __init__(self, mesh: Mesh, width: int) -> None:
        self._width = width
        self._pending: jax.Array | None = None
        self._alone = jax.process_count() == 1
        flat = Mesh(mesh.devices.reshape(-1), ("all",))
        self._split = NamedSharding(flat, P("all"))
        self._shape = (flat.size, width)
        self._maximum = jax.jit(
            lambda x: jnp.max(x, axis=0), out_shardings=NamedSharding(flat, P())
        )

    def __call__(self, *wishes: int) -> tuple[int, ...]:
        """Hands in this process's wishes, numbers from 0 up; all processes must call it.

        Returns:
          The largest of each that any process handed in: alone, now; else one call ago, and
          zeros the first time.
        """
        if self._alone:
            return wishes
        before, self._pending = self._pending, self._hand_in(wishes)
        if before is None:
            return (0,) * self._width
        return tuple(int(x) for x in np.asarray(before))

    def at_once(self, *wishes: int) -> tuple[int, ...]:
        """As a call, but waits for this one's answer, which is all processes' now."""
        if self._alone:
            return wishes
        return tuple(int(x) for x in np.asarray(self._hand_in(wishes)))

    def _hand_in(self, wishes: tuple[int, ...]) -> jax.Array:
        mine = np.array([wishes], np.int32)
        given = jax.make_array_from_callback(self._shape, self._split, lambda _: mine)
        return self._maximum(given)
