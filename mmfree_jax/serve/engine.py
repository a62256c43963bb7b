"""The engine: one thread owns the device and runs every request in a row of one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import Params, Weights
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.requests import Limits, Request


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


@dataclass(frozen=True)
class SessionInfo:
    """A named session.

    Attributes:
      name: of it.
      tokens: that its state has read.
      bytes: of the state.
      saved_at: seconds since the epoch.
    """

    name: str
    tokens: int
    bytes: int
    saved_at: float


class Engine:
    """Serves one model. Every method may be called from any thread.

    Attributes:
      max_length: most tokens of a request, with its prompt and session; None: no limit.
    """

    max_length: int | None

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
        raise NotImplementedError

    def start(self, *, warm_up: bool = True) -> None:
        """Starts the thread; with `warm_up` compiles every program of decoding and reading first,
        in the caller's thread."""
        raise NotImplementedError

    def submit(self, request: Request) -> Handle:
        """Queues a request.

        Raises:
          QueueFull: as many wait as may.
          EngineClosed: the engine was closed or has failed.
          DataError: a token id of the prompt that the model does not have.
          ConfigError: another field that does not fit the model, or more tokens than fit.
          UnknownSession: `session` names none.
        """
        raise NotImplementedError

    def close(self, *, drain: bool = True) -> None:
        """Ends the thread and keeps the sessions; a second call does nothing.

        Args:
          drain: let requests that run or wait end first; False: end them as cancelled.

        Raises:
          OutputError: a session cannot be written.
        """
        raise NotImplementedError

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and the device answers."""
        raise NotImplementedError

    def statistics(self) -> Statistics:
        """Counts for metrics."""
        raise NotImplementedError

    def sessions(self) -> list[SessionInfo]:
        """The named sessions, by name."""
        raise NotImplementedError

    def fork_session(self, name: str, new_name: str) -> SessionInfo:
        """Gives a session a second name, under which it goes on apart; one of that name is
        replaced.

        Raises:
          UnknownSession: there is no `name`.
          ConfigError: `new_name` is no name.
        """
        raise NotImplementedError

    def restore_session(self, name: str) -> SessionInfo:
        """Reads a session from the folder again, in place of the one held.

        Raises:
          UnknownSession: the folder has none of that name, or there is no folder.
          CheckpointError: the file is damaged, or of another model.
        """
        raise NotImplementedError

    def delete_session(self, name: str) -> None:
        """Forgets a session, and its file.

        Raises:
          UnknownSession: there is none.
        """
        raise NotImplementedError
