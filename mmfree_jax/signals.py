"""The signals that end a command early: which they are, and who hears them."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""From the keyboard, from whoever manages processes, as the terminal is closed, and from SLURM
before a time limit where a job asks so (--signal=USR1@120)."""
EXIT_CODES = {number.name: 128 + number for number in STOPPING}
"""What a command exits with that was told to stop and saved first: as a shell counts."""


@contextlib.contextmanager
def heard(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets `handler` hear the signals of `STOPPING` while inside; only in the main thread.

    A SIGHUP that is ignored, as nohup does, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    numbers = [n for n in STOPPING if n != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
