"""The process that ends the children of one that is gone: `children.py` starts it.

Run as a file, apart from the package: it must be there before a child is. From its input it
reads "+ PID" and "- PID", a line each; where the input ends, so has whoever wrote it.
"""

import contextlib
import os
import signal
import sys
import time

_POLL_SECONDS = 0.1


def main() -> None:
    """Waits for the end of the input, then for that of the processes that are left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    processes: set[int] = set()
    for line in sys.stdin:
        sign, _, number = line.partition(" ")
        (processes.add if sign == "+" else processes.discard)(int(number))
    end(processes, float(sys.argv[1]))


def end(processes: set[int], seconds: float) -> None:
    """Tells processes to stop, and after `seconds` kills those still there with their groups."""
    for process in processes:
        _send(process, signal.SIGTERM)
        _send(process, signal.SIGCONT)  # a stopped one would not hear the other
    deadline = time.monotonic() + seconds
    while any(_send(process, 0) for process in processes) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    for process in processes:
        kill_group(process)


def kill_group(process: int) -> None:
    """Kills the process and what it has started, where there is anything left of them."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def _send(process: int, number: int) -> bool:
    """Whether there is such a process to send the signal to."""
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main()
