"""N processes of one program on this machine, as one: output, signals, exit code."""

import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import AboveZero, Count, Port, check_numbers

# A process that was told to stop, saved and left. The others are about to do the same.
_STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to start."""

    command: tuple[str, ...]
    count: Count
    devices_per_process: Count | None = None
    port: Port | None = None
    grace_seconds: AboveZero = 15.0
    """After one has died, the others get this long to say what they noticed."""
    stop_seconds: AboveZero = 300.0
    """After one has saved and left, the others get this long to do the same."""

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
        return [name for name in environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    count = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(i) for i in range(count)] if listed.returncode == 0 else []


def environment(plan: Plan, index: int, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of process `index`: where to meet, and which devices are its own.

    Raises:
      ConfigError: the GPUs cannot be shared out.
    """
    env = dict(environ) | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(plan.count),
        "JAX_PROCESS_ID": str(index),
        "PYTHONUNBUFFERED": "1",
    }
    gpus = visible_gpus(environ)
    if gpus:
        each = plan.devices_per_process or len(gpus) // plan.count
        if each < 1 or each * plan.count > len(gpus):
            raise ConfigError(
                f"-n {plan.count} with {plan.devices_per_process or 'at least 1'} GPUs each needs "
                f"more than the {len(gpus)} here: lower one, or set JAX_PLATFORMS=cpu"
            )
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        return env
    flag = "--xla_force_host_platform_device_count"
    flags = [f for f in env.get("XLA_FLAGS", "").split() if not f.startswith(flag)]
    env["XLA_FLAGS"] = " ".join([*flags, f"{flag}={plan.devices_per_process or 1}"])
    return env


def run(
    plan: Plan,
    *,
    environ: Mapping[str, str] = os.environ,
    out: IO[str] | None = None,
    on_start: Callable[[list[subprocess.Popen]], None] | None = None,
) -> int:
    """Starts the processes, waits for all of them, and returns the exit code.

    SIGINT and SIGTERM are passed on to all. When one dies, it is named with its exit code or
    signal, the others get `grace_seconds`, and what is left is killed.

    Args:
      plan: what to start.
      environ: to build theirs from.
      out: receives their output, each line behind its process's number; default: stdout.
      on_start: called with the processes once all were started.

    Returns:
      0 if all ended with 0; else what the first to fail ended with, 128 + n for signal n.
    """
    stream = sys.stdout if out is None else out
    port = plan.port or _free_port()
    environments = [environment(plan, i, port, environ) for i in range(plan.count)]
    lines: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
    processes: list[subprocess.Popen] = []
    received: list[int] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        for process in processes:
            _send(process, number)

    on_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if on_main else ()
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        for env in environments:
            # A group of its own: a Ctrl-C reaches it through us alone, and once.
            process = subprocess.Popen(
                plan.command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            processes.append(process)
            reader = threading.Thread(
                target=_read, args=(len(processes) - 1, process, lines), daemon=True
            )
            reader.start()
        if received:
            for process in processes:
                _send(process, received[-1])
        if on_start:
            on_start(processes)
        return _supervise(plan, processes, lines, stream)
    finally:
        for process in processes:
            _send(process, signal.SIGKILL)
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(
    plan: Plan,
    processes: list[subprocess.Popen],
    lines: "queue.SimpleQueue[tuple[int, str | None]]",
    stream: IO[str],
) -> int:
    """Prints what the processes write until all have ended; returns the exit code."""
    width = len(str(plan.count - 1))

    def say(who: str, text: str) -> None:
        stream.write(f"[{who:>{width}}] {text}\n")
        stream.flush()

    reading, ended = len(processes), set()
    code = 0
    deadline: float | None = None
    while reading or len(ended) < len(processes):
        try:
            index, line = lines.get(timeout=0.1)
            if line is None:
                reading -= 1
            else:
                say(str(index), line)
            if not lines.empty():
                continue
        except queue.Empty:
            pass
        for i, process in enumerate(processes):
            status = process.poll()
            if status is None or i in ended:
                continue
            ended.add(i)
            if status == 0:
                continue
            if deadline is None:
                code = 128 - status if status < 0 else status
                wait = plan.stop_seconds if status in _STOPPED else plan.grace_seconds
                deadline = time.monotonic() + wait
            how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with {status}"
            left = plan.count - len(ended)
            rest = (
                f"; {left} more to end within {deadline - time.monotonic():.0f} s" if left else ""
            )
            say("launch", f"process {i} (pid {process.pid}) {how}{rest}")
        if deadline is not None and time.monotonic() > deadline:
            alive = [i for i in range(plan.count) if i not in ended]
            if alive:
                say("launch", f"killing process {', '.join(map(str, alive))}, still there")
            for i in alive:
                _send(processes[i], signal.SIGKILL)
            deadline = float("inf")
    return code


def _read(
    index: int, process: subprocess.Popen, lines: "queue.SimpleQueue[tuple[int, str | None]]"
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put((index, line.rstrip("\n")))
    lines.put((index, None))


def _send(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def mmfree_command(argv: Sequence[str]) -> tuple[str, ...]:
    """`mmfree argv...` with this interpreter."""
    return (sys.executable, "-m", "mmfree_jax", *argv)
