"""N processes of one program on this machine, as one: output, signals, exit code."""

import contextlib
import dataclasses
import itertools
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Annotated

from mmfree_jax.children import Children
from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import AboveZero, Count, Port, Range, check_numbers
from mmfree_jax.signals import EXIT_CODES, heard

# A process that was told to stop, saved and left. The others are about to do the same.
_STOPPED = set(EXIT_CODES.values())
_LOOK_SECONDS = 0.1
_NO_DEVICES = "NoDevFiles"
"""What SLURM and NVIDIA's containers set where a job has no GPU."""

Processes = Annotated[int, Range(1, 1024)]
"""Of one machine."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to start."""

    command: tuple[str, ...]
    count: Processes
    devices_per_process: Count | None = None
    port: Port | None = None
    grace_seconds: AboveZero = 15.0
    """After one has died, the others get this long to say what they noticed."""
    stop_seconds: AboveZero = 300.0
    """After a signal to stop, or once one has saved and left, the rest get this long to do so."""

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.command:
            raise ConfigError("no command to start: give it after --, as in -- train --help")


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """The GPUs that may be used, as $CUDA_VISIBLE_DEVICES names them; empty without any.

    Asks the driver's tool and not JAX, which would take hold of them.
    """
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return []
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA sees none from the first name on that is no device: "" and -1 hide all.
        return list(itertools.takewhile(lambda name: name not in ("", "-1", _NO_DEVICES), names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(i) for i in range(count)] if listed.returncode == 0 else []


def devices_each(plan: Plan, environ: Mapping[str, str]) -> int:
    """How many devices each process has.

    Raises:
      ConfigError: the GPUs cannot be shared out.
    """
    return _shared_out(plan, visible_gpus(environ))


def _shared_out(plan: Plan, gpus: Sequence[str]) -> int:
    if not gpus:
        return plan.devices_per_process or 1
    each = plan.devices_per_process or len(gpus) // plan.count
    if each < 1 or each * plan.count > len(gpus):
        raise ConfigError(
            f"-n {plan.count} with {plan.devices_per_process or 'at least 1'} GPUs each needs "
            f"more than the {len(gpus)} here: lower one, or set JAX_PLATFORMS=cpu"
        )
    return each


def meeting_place(port: int, count: int, index: int) -> dict[str, str]:
    """The variables that tell process `index` of `count` where to meet the others."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def environment(plan: Plan, index: int, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of process `index`: where to meet, and which devices are its own.

    Raises:
      ConfigError: the GPUs cannot be shared out.
    """
    env = dict(environ) | meeting_place(port, plan.count, index) | {"PYTHONUNBUFFERED": "1"}
    gpus = visible_gpus(environ)
    each = _shared_out(plan, gpus)
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        return env
    flag = "--xla_force_host_platform_device_count"
    flags = [f for f in env.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
    env["XLA_FLAGS"] = " ".join([*flags, f"{flag}={each}"])
    return env


def run(
    plan: Plan,
    *,
    environ: Mapping[str, str] = os.environ,
    out: IO[str] | None = None,
    on_start: Callable[[list[subprocess.Popen]], None] | None = None,
) -> int:
    """Starts the processes, waits for all of them, and returns the exit code.

    SIGINT and SIGTERM are passed on to all, SIGHUP (the terminal is closed) as SIGTERM; who has
    not left `stop_seconds` later is killed. When one dies, it is named with its exit code or
    signal, the others get `grace_seconds`, and what is left is killed. Where this process is
    killed itself, its children are told to stop all the same.

    Args:
      plan: what to start.
      environ: to build theirs from.
      out: receives their output, each line behind its process's number; default: stdout.
      on_start: called with the processes once all were started.

    Returns:
      0 if all ended with 0; else what the first to fail ended with, 128 + n for signal n.
    """
    port = plan.port or free_port()
    environments = [environment(plan, i, port, environ) for i in range(plan.count)]
    signals = Signals()
    with Children(plan.stop_seconds) as children, heard(signals.receive):
        launch = Launch(plan, children, signals, sys.stdout if out is None else out)
        for env in environments:
            launch.start(env)
        if on_start:
            on_start(launch.processes)
        return launch.wait()


class Signals:
    """Those that say to stop: kept, and passed on."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.pass_on: Callable[[int], None] = lambda number: None

    def receive(self, number: int, _: object) -> None:
        """Handles a signal."""
        self.received.append(number)
        self.pass_on(_meaning(number))


def _meaning(number: int) -> int:
    """What a process is sent for a signal to us: one that nohup shields hears SIGTERM."""
    return signal.SIGTERM if number == signal.SIGHUP else number


class Launch:
    """Processes started together: their output, and what the end of one means for the others.

    Attributes:
      processes: in the order of their numbers.
      first_failed: the first one that ended otherwise than with 0.
      killed: those that had to be, after others had failed or all were told to stop.
      was_told: whether `tell` told all to stop.
    """

    def __init__(self, plan: Plan, children: Children, signals: Signals, stream: IO[str]) -> None:
        self.processes: list[subprocess.Popen[str]] = []
        self.first_failed: int | None = None
        self.killed: set[int] = set()
        self.was_told = False
        self._plan, self._children, self._signals, self._stream = plan, children, signals, stream
        self._lines: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._width = len(str(plan.count - 1))
        self._ended: set[int] = set()
        self._code = 0
        self._deadline = math.inf
        signals.pass_on = self._send

    def start(self, env: Mapping[str, str]) -> None:
        """Starts the next process."""
        process = self._children.start(
            self._plan.command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.processes.append(process)
        threading.Thread(
            target=_read, args=(len(self.processes) - 1, process, self._lines), daemon=True
        ).start()
        if self._signals.received:  # before this one was there
            process.send_signal(_meaning(self._signals.received[-1]))

    def wait(self, on_look: Callable[[], None] = lambda: None) -> int:
        """Prints what the processes write until all have ended; returns the exit code.

        `on_look` is called several times a second.
        """
        reading, look_at = len(self.processes), 0.0
        while reading or len(self._ended) < len(self.processes):
            try:
                index, line = self._lines.get(timeout=_LOOK_SECONDS)
                if line is None:
                    reading -= 1
                else:
                    self.say(line, str(index))
                # What one wrote comes before how it ended, but no flood of it holds up the rest.
                if not self._lines.empty() and time.monotonic() < look_at:
                    continue
            except queue.Empty:
                pass
            look_at = time.monotonic() + _LOOK_SECONDS
            on_look()
            for i in self._alive():
                if self._children.has_ended(self.processes[i]):
                    self._note_end(i)
            if self._signals.received:
                self._give(self._plan.stop_seconds)
            if time.monotonic() > self._deadline and self._alive():
                self._kill_the_rest()
        return self._code

    def tell(self) -> None:
        """Tells all to save and leave, of their own."""
        self.was_told = True
        self._send(signal.SIGTERM)
        self._give(self._plan.stop_seconds)

    def _alive(self) -> list[int]:
        return [i for i in range(len(self.processes)) if i not in self._ended]

    def _note_end(self, index: int) -> None:
        process, plan = self.processes[index], self._plan
        self._ended.add(index)
        status = process.returncode
        if status == 0:
            return
        if self.first_failed is None:
            self.first_failed = index
            self._code = 128 - status if status < 0 else status
            self._give(plan.stop_seconds if status in _STOPPED else plan.grace_seconds)
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with {status}"
        left, seconds = len(self._alive()), max(0.0, self._deadline - time.monotonic())
        rest = f"; {left} more to end within {seconds:.0f} s" if left else ""
        self.say(f"process {index} (pid {process.pid}) {how}{rest}")

    def _give(self, seconds: float) -> None:
        """Sets a time for those left to end by, unless there is one."""
        if self._deadline == math.inf:
            self._deadline = time.monotonic() + seconds

    def _kill_the_rest(self) -> None:
        alive = self._alive()
        self.say(f"killing process {', '.join(map(str, alive))}, still there")
        self.killed |= set(alive)
        for i in alive:
            self._children.kill(self.processes[i])
        for i in alive:
            self._note_end(i)

    def _send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def say(self, text: str, who: str = "launch") -> None:
        """Writes a line, of the launcher or of a process."""
        # The terminal is closed, or the reader gone: the processes are looked after all the same.
        with contextlib.suppress(OSError):
            self._stream.write(f"[{who:>{self._width}}] {text}\n")
            self._stream.flush()


def _read(
    index: int, process: subprocess.Popen, lines: "queue.SimpleQueue[tuple[int, str | None]]"
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((index, line.rstrip("\n")))
    lines.put((index, None))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def mmfree_command(argv: Sequence[str]) -> tuple[str, ...]:
    """`mmfree argv...` with this interpreter."""
    return (sys.executable, "-m", "mmfree_jax", *argv)
