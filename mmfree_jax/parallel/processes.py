"""Several processes in one run: how they find each other, agree, and leave.

The engine is `jax.distributed`: its coordination service, on process 0, is where the processes
meet and where they leave each other notes (`Notes`). Nothing here touches a device, so that
disagreements come out before anything is compiled or allocated.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax

from mmfree_jax import progress
from mmfree_jax.error_line import say
from mmfree_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MMFreeError,
    TrainingError,
)
from mmfree_jax.parallel.process_options import EXIT_LOST, ProcessOptions, find_processes

_PREFIX = "mmfree"
_PART_SECONDS = 10.0
_LATER_SECONDS = 60
_KINDS: dict[str, type[MMFreeError]] = {
    kind.__name__: kind for kind in (CheckpointError, ConfigError, DataError, TrainingError)
}


class ProcessLostError(TrainingError):
    """Another process of the run is gone, hangs, or never came."""

    exit_code = EXIT_LOST


def join(options: ProcessOptions, environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of the run; call it before anything else of JAX.

    Where they do not all come within `options.join_seconds` this ends the process with
    `EXIT_LOST`: JAX waits where no exception can reach it.

    Raises:
      ConfigError: the environment or the flags are incomplete, or do not work.
    """
    arguments = find_processes(options, environ)
    if arguments is None:
        return
    where = arguments.get("coordinator_address", "the address that the environment gives")

    def give_up() -> None:
        progress.close_all()
        count = arguments.get("num_processes", "")
        print(
            f"mmfree: error: the {count} processes did not all meet at {where} within "
            f"{options.join_seconds:g} s: look for one that did not start, or that was given "
            "another coordinator or count",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_LOST)

    timer = threading.Timer(options.join_seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        # JAX's own limits end the processes with a stack trace: let ours come first.
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=int(options.join_seconds) + _LATER_SECONDS,
            heartbeat_timeout_seconds=int(options.silent_seconds) + _LATER_SECONDS,
        )
    except (RuntimeError, ValueError) as e:
        raise ConfigError(
            f"the processes cannot meet at {where}: {' '.join(str(e).split())[:300]}; see "
            "--processes.coordinator, .count and .index"
        ) from e
    finally:
        timer.cancel()


class Notes:
    """What the processes leave at the coordinator for each other: short texts under names."""

    def __init__(self) -> None:
        # JAX has no public door to its store; this is the one place that opens the other.
        from jax._src import distributed

        self._client: Any = distributed.global_state.client

    def put(self, name: str, text: str) -> None:
        """Writes or replaces a note."""
        self._client.key_value_set(f"{_PREFIX}/{name}", text, allow_overwrite=True)

    def get(self, name: str) -> str | None:
        """Reads a note; None if there is none."""
        try:
            return self._client.key_value_try_get(f"{_PREFIX}/{name}")
        except jax.errors.JaxRuntimeError as e:
            if "NOT_FOUND" in str(e):
                return None
            raise

    def wait(self, name: str, seconds: float) -> str | None:
        """Waits for a note; None if it does not come in time."""
        try:
            return self._client.blocking_key_value_get(f"{_PREFIX}/{name}", int(1000 * seconds))
        except jax.errors.JaxRuntimeError as e:
            if "DEADLINE_EXCEEDED" in str(e) or "NOT_FOUND" in str(e):
                return None
            raise


def _part() -> None:
    """Before all leave: the coordinator stays until the others have read what it holds."""
    notes, turn = Notes(), next(_turn)
    if jax.process_index():
        notes.put(f"part/{turn}/{jax.process_index()}", "")
        return
    deadline = time.monotonic() + _PART_SECONDS
    for i in range(1, jax.process_count()):
        notes.wait(f"part/{turn}/{i}", max(0.1, deadline - time.monotonic()))
    time.sleep(0.5)  # for the last one's answer to reach it


def describe_self() -> str:
    """Where this process runs, for messages to the others."""
    return f"pid {os.getpid()} on {socket.gethostname()}"


# Exchanges happen in the same order on every process: their number is their name.
_turn = itertools.count()
_wait_seconds = 600.0


def exchange(value: Any) -> list[Any]:
    """Every process's `value` (anything JSON can hold), by process. All must call it.

    Raises:
      ProcessLostError: one did not come to this point.
    """
    if jax.process_count() == 1:
        return [value]
    notes, turn = Notes(), next(_turn)
    notes.put(f"exchange/{turn}/{jax.process_index()}", json.dumps(value))
    values = []
    for i in range(jax.process_count()):
        text = notes.wait(f"exchange/{turn}/{i}", _wait_seconds)
        if text is None:
            raise ProcessLostError(
                f"process {i} did not come to the same point within {_wait_seconds:g} s: see its "
                "own output, and start all processes again"
            )
        values.append(json.loads(text))
    return values


def together(function: Callable[[], Any], *, only: int | None = None) -> Any:
    """Runs `function` here, and fails on every process if it fails on one.

    Args:
      function: what to do; its result must be JSON if `only` is given.
      only: the one process to do it, whose result all get; None: each does, and keeps its own.

    Raises:
      MMFreeError: of the kind that the process met; elsewhere the message names that process.
    """
    if jax.process_count() == 1:
        return function()
    result = failure = None
    if only is None or only == jax.process_index():
        try:
            result = function()
        except Exception as e:
            failure = e
    note: dict[str, Any] = {"result": result if only is not None else None}
    if failure is not None:
        known = isinstance(failure, MMFreeError)
        text = str(failure) if known else f"{type(failure).__name__}: {failure}"
        kind = next((c.__name__ for c in type(failure).__mro__ if c.__name__ in _KINDS), "")
        note = {"kind": kind, "error": text, "where": describe_self()}
    notes = exchange(note)
    failed = [(i, note) for i, note in enumerate(notes) if "error" in note]
    if failed:
        _part()
        if failure is not None and not isinstance(failure, MMFreeError):
            raise failure  # a bug: with its own traceback here, in one line elsewhere
        i, note = failed[0]
        alike = all(other["error"] == note["error"] for _, other in failed)
        everyone = alike and len(failed) == len(notes)
        where = "" if everyone or only is not None else f"process {i} ({note['where']}): "
        error = _KINDS.get(note["kind"], TrainingError)(where + note["error"])
        error.said_by_first = True  # type: ignore[attr-defined]
        raise error from failure
    return result if only is None else notes[only]["result"]


def first(function: Callable[[], Any]) -> Any:
    """What process 0 finds, on all processes; its errors too. The result must be JSON."""
    return together(function, only=0)


def check_alike(facts: Mapping[str, Any]) -> None:
    """Checks that every process was started on the same thing.

    Args:
      facts: name and value (JSON) of all that must be the same; values may be nested dicts.

    Raises:
      ConfigError: names the process that differs from most others, the field and both values.
    """
    mine = {"facts": _flat(facts), "where": describe_self()}
    everyone = exchange(mine)
    names = sorted({name for one in everyone for name in one["facts"]})
    problems = []
    for name in names:
        values = [json.dumps(one["facts"].get(name), sort_keys=True) for one in everyone]
        usual = max(values, key=values.count)  # of equally many, the first: process 0's
        for i, value in enumerate(values):
            if value != usual:
                problems.append(
                    f"process {i} ({everyone[i]['where']}) has {name} {value}, "
                    f"{'process 0' if i else 'the others'} {usual}"
                )
    if problems:
        _part()
        more = f"; and {len(problems) - 4} more differences" if len(problems) > 4 else ""
        error = ConfigError(
            f"the processes were started differently: {'; '.join(problems[:4])}{more}: start "
            "all with the same command, packages and data"
        )
        error.said_by_first = True  # type: ignore[attr-defined]
        raise error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Where there are several processes, an error inside ends this one at once.

    Otherwise it would stay for minutes in JAX's own farewell, waiting for the others, who may
    be waiting for it. An error that all share is said by process 0 alone.
    """
    try:
        yield
    except BaseException as e:
        if not jax.distributed.is_initialized():
            raise
        leave(e)


def leave(error: BaseException) -> NoReturn:
    """Says what happened and ends the process without waiting for anybody."""
    progress.close_all()
    if isinstance(error, MMFreeError):
        code = getattr(error, "exit_code", 2)
        if jax.process_index() == 0 or not getattr(error, "said_by_first", False):
            say(error, sys.argv[1:])
    elif isinstance(error, KeyboardInterrupt):
        code = 130
    else:
        say(error, sys.argv[1:])
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
