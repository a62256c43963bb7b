"""The engine: one thread owns the device and runs every request in a row of one batch."""

import logging
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel, Session
from mmfree_jax.model.weights import Params, Weights, as_weights
from mmfree_jax.serve.batch import Batch, OnProgram
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.job import Job, Outbox, new_job
from mmfree_jax.serve.plan import Plan, plan_for
from mmfree_jax.serve.prefix_cache import PrefixCache, session_bytes
from mmfree_jax.serve.requests import EngineClosed, Limits, QueueFull, Request, check_tokens
from mmfree_jax.serve.scheduler import TIME_IS_OVER, Scheduler
from mmfree_jax.serve.session_store import SessionInfo, SessionStore

__all__ = ["Engine", "SessionInfo", "Statistics"]

# Calls of the device that may fail one after another before the engine gives up.
_MOST_FAILURES = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Statistics:
    """Counts since the start, and what is there now.

    Attributes:
      slots: rows of the batch.
      running: requests in a slot.
      waiting: requests in the queue.
      ended: requests that have ended, by reason.
      prompt_tokens: tokens of prompts, read or cached.
      completion_tokens: tokens given out.
      prefix_hits: prompts for a part of which a state was cached.
      prefix_misses: prompts for which none was.
      prefix_tokens_saved: tokens of prompts that were not read for that reason.
      prefix_bytes: of cached states.
      prefix_entries: of them.
      sessions: named sessions held.
      session_bytes: of them.
      device_failures: calls of the device that failed.
    """

    slots: int
    running: int
    waiting: int
    ended: Mapping[str, int]
    prompt_tokens: int
    completion_tokens: int
    prefix_hits: int
    prefix_misses: int
    prefix_tokens_saved: int
    prefix_bytes: int
    prefix_entries: int
    sessions: int
    session_bytes: int
    device_failures: int


class Engine:
    """Serves one model. Every method may be called from any thread.

    States after the beginnings of prompts are cached for MLGRU models, whose state is one vector a
    layer; of attention models, whose caches are thousands of times as large, none are.

    Attributes:
      max_length: most tokens of a request, with its prompt and session; None: no limit.
      plan: sizes of its programs.
    """

    max_length: int | None
    plan: Plan

    def __init__(
        self,
        model: LanguageModel,
        params: Params | Weights,
        limits: Limits | None = None,
        *,
        sessions: Path | None = None,
    ) -> None:
        """Prepares the batch; nothing runs before `start`.

        Args:
          model: the model.
          params: its parameters or weights, in any form.
          limits: None: the defaults.
          sessions: folder that named sessions are read from here and kept in at a clean stop; None:
            they end with the engine.

        Raises:
          ConfigError: limits that do not fit the model.
          CheckpointError: a session in the folder is damaged or of another model.
          OutputError: the folder cannot be written.
        """
        self._config, self._limits = model.config, limits or Limits()
        self.plan = plan = plan_for(self._limits, self._config, jax.default_backend())
        self.max_length = plan.max_length
        weights = as_weights(params, self._config)
        self._store = SessionStore(weights, self._config, self._limits.session_bytes, sessions)
        self._batch = Batch(weights, self._config, plan, few_rows=self._limits.few_row_kernels)
        self._session_bytes = session_bytes(self._batch.fresh)
        caches = self._config.recurrent
        self._cache = PrefixCache(self._limits.prefix_cache_bytes if caches else 0)
        self._outbox = Outbox()
        self._scheduler = Scheduler(self._batch, plan, self._cache, self._store, self._outbox)
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._aborting = self._failed = self._closed = False
        self._failures = self._failures_in_a_row = 0

    def start(self, *, warm_up: bool = True, on_program: OnProgram | None = None) -> None:
        """Starts the thread; with `warm_up` compiles every program of decoding and reading first,
        in the caller's thread, and calls `on_program` before each."""
        if warm_up:
            self._batch.warm_up(on_program)
        self._thread = threading.Thread(target=self._run, name="mmfree-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Handle:
        """Queues a request.

        Raises:
          QueueFull: as many wait as may.
          EngineClosed: the engine was closed or has failed.
          DataError: a token id of the prompt that the model does not have.
          ConfigError: another field that does not fit the model, or more tokens than fit.
          UnknownSession: `session` names none.
          SessionsFull: there is no room for what `save_as` would save.
        """
        check_tokens(request, self._config)
        start = None if request.session is None else self._store.find(request.session)
        self._check_length(request, start)
        if request.save_as is not None and self._config.recurrent:
            self._store.check_room(request.save_as, self._session_bytes)
        handle = Handle(request)
        job = new_job(handle, start, self._limits.time_limit_s)
        with self._changed:
            if self._closing or self._failed:
                why = "it has failed" if self._failed else "it is being closed"
                raise EngineClosed(f"the engine takes no requests: {why}")
            ahead = self._scheduler.running + len(self._waiting) - self._limits.slots
            if ahead >= self._limits.queue:
                wait_s = math.ceil((ahead + 1) / self._limits.slots * self._outbox.run_s)
                raise QueueFull(
                    f"{len(self._waiting)} requests wait already: try again in {wait_s} s", wait_s
                )
            self._waiting.append(job)
            self._changed.notify()
        return handle

    def close(self, *, drain: bool = True) -> None:
        """Ends the thread and keeps the sessions; a second call does nothing.

        Args:
          drain: let requests that run or wait end first; False: end them as cancelled.

        Raises:
          OutputError: a session cannot be written.
        """
        with self._changed:
            self._closing, self._aborting = True, self._aborting or not drain
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            if self._closed:
                return
            self._closed = True
        self._end_waiting(everyone=True)  # of an engine that was never started
        self._outbox.flush()
        try:
            self._store.write()
        finally:
            self._store.close()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and the device answers."""
        return self._thread is not None and self._thread.is_alive() and not self._failed

    def statistics(self) -> Statistics:
        """Counts for metrics."""
        cache, outbox = self._cache, self._outbox
        return Statistics(
            slots=self._limits.slots,
            running=self._scheduler.running,
            waiting=len(self._waiting),
            ended=dict(outbox.ended),
            prompt_tokens=self._scheduler.prompt_tokens,
            completion_tokens=outbox.completion_tokens,
            prefix_hits=cache.hits,
            prefix_misses=cache.misses,
            prefix_tokens_saved=cache.tokens_saved,
            prefix_bytes=cache.bytes,
            prefix_entries=len(cache),
            sessions=len(self._store.list()),
            session_bytes=self._store.bytes,
            device_failures=self._failures,
        )

    def sessions(self) -> list[SessionInfo]:
        """The named sessions, by name."""
        return self._store.list()

    def fork_session(self, name: str, new_name: str) -> SessionInfo:
        """Gives a session a second name, under which it goes on apart; one of that name is
        replaced.

        Raises:
          UnknownSession: there is no `name`.
          ConfigError: `new_name` is no name.
          SessionsFull: there is no room.
        """
        return self._store.fork(name, new_name)

    def restore_session(self, name: str) -> SessionInfo:
        """Reads a session from the folder again, in place of the one held.

        Raises:
          UnknownSession: the folder has none of that name, or there is no folder.
          CheckpointError: the file is damaged, or of another model.
          ConfigError: `name` is no name, or there is no room.
        """
        return self._store.restore(name)

    def delete_session(self, name: str) -> None:
        """Forgets a session, and its file.

        Raises:
          UnknownSession: there is none.
          OutputError: the file under its name is no session, or cannot be removed.
        """
        self._store.delete(name)

    def _check_length(self, request: Request, start: Session | None) -> None:
        if self.max_length is None:
            return
        before = 0 if start is None else int(start.state.position_B[0])
        total = before + len(request.prompt) + request.max_tokens
        if total > self.max_length:
            raise ConfigError(
                f"max_tokens is {request.max_tokens}, behind {before + len(request.prompt)} tokens "
                f"of the prompt and its session: together they must be at most {self.max_length}"
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._scheduler.busy or self._closing
                )
                if self._closing and not self._waiting and not self._scheduler.busy:
                    return
            try:
                self._turn()
                self._failures_in_a_row = 0
            except Exception as error:  # whatever the device raises
                self._recover(error)
            finally:
                self._outbox.flush()
            if self._failed:
                return

    def _turn(self) -> None:
        self._scheduler.end_cancelled(everyone=self._aborting)
        self._end_waiting(everyone=self._aborting)
        while self._scheduler.has_slot and (job := self._next_waiting()):
            self._scheduler.admit(job)
        self._scheduler.turn()

    def _next_waiting(self) -> Job | None:
        with self._changed:
            return self._waiting.popleft() if self._waiting else None

    def _end_waiting(self, *, everyone: bool) -> None:
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if everyone or job.handle.cancelled:
                    self._outbox.end(job, "cancelled")
                elif job.late:
                    self._outbox.end(job, "timeout", TIME_IS_OVER)
                else:
                    self._waiting.append(job)

    def _recover(self, error: Exception) -> None:
        """Ends what ran with an error and goes on, unless the device fails again and again."""
        self._failures += 1
        self._failures_in_a_row += 1
        _log.error("a call of the device failed: %s: %s", type(error).__name__, error)
        message = f"the device failed: {type(error).__name__}"
        try:
            self._scheduler.fail(message)
        except Exception:  # it has no memory for new slots either
            self._failures_in_a_row = _MOST_FAILURES
        if self._failures_in_a_row >= _MOST_FAILURES:
            self._failed = True
            with self._changed:
                jobs, self._waiting = self._waiting, deque()
            for job in jobs:
                self._outbox.end(job, "error", message)
