"""Child processes that do not outlive this one, however it ends."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from mmfree_jax import guard

# Waits for a line, so that no child runs before the guard knows it; then is the command.
_GATE = ("/bin/sh", "-c", 'read -r go && exec "$@"', "sh")


class Children:
    """Starts processes, and ends those that are left when the block is left or this one dies.

    At the end of the block they are killed. If this process is killed (SIGKILL too) or its
    terminal is closed, a guard beside it sends them SIGTERM and, `stop_seconds` later, SIGKILL.
    """

    def __init__(self, stop_seconds: float) -> None:
        self._processes: list[subprocess.Popen[Any]] = []
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", guard.__file__, str(stop_seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(
        self, command: Sequence[str], *, stdin: int = subprocess.DEVNULL, **options: Any
    ) -> subprocess.Popen[Any]:
        """Starts `command` in a session of its own: a Ctrl-C reaches it through us alone, and once.

        Args:
          command: program and arguments.
          stdin: `subprocess.PIPE` for an input to write to; else it is empty.
          options: of `subprocess.Popen`.
        """
        process = subprocess.Popen(
            [*_GATE, *command], stdin=subprocess.PIPE, start_new_session=True, **options
        )
        self._processes.append(process)
        self._tell(f"+ {process.pid}\n")
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # killed already
            os.write(process.stdin.fileno(), b"\n")
        if stdin != subprocess.PIPE:
            process.stdin.close()
            process.stdin = None
        return process

    def has_ended(self, process: subprocess.Popen[Any]) -> bool:
        """Whether a process has ended; if so, what it has started is ended too."""
        if process.poll() is None:
            return False
        self._let_go(process)
        return True

    def kill(self, process: subprocess.Popen[Any]) -> None:
        """Kills a process with all that it has started, and waits for its end."""
        if process.poll() is None:
            guard.kill_group(process.pid)
            process.wait()
        self._let_go(process)

    def _let_go(self, process: subprocess.Popen[Any]) -> None:
        if process in self._processes:
            self._processes.remove(process)
            guard.kill_group(process.pid)
            self._tell(f"- {process.pid}\n")

    def _tell(self, line: str) -> None:
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):  # the guard was killed
            os.write(self._guard.stdin.fileno(), line.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in list(self._processes):
            self.kill(process)
        assert self._guard.stdin is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        self._guard.wait()
