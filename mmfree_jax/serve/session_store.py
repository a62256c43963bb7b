"""Named sessions in the host's memory, and the folder that keeps them from one start to the next.

A file of the folder is `NAME.safetensors`, as `saved/session.py` writes it. What is not such a file
is never replaced or removed, and a folder serves one engine at a time.
"""

import contextlib
import dataclasses
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mmfree_jax.errors import CheckpointError, ConfigError, MMFreeError, OutputError
from mmfree_jax.files import disk_errors, take_lock
from mmfree_jax.model import Session
from mmfree_jax.model.state import with_places
from mmfree_jax.model.weights import Weights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.fingerprint import fingerprint
from mmfree_jax.saved.session import FORMAT, VERSION, load_session, save_session
from mmfree_jax.saved.tensor_file import Reader
from mmfree_jax.serve.prefix_cache import session_bytes
from mmfree_jax.serve.requests import SessionsFull, UnknownSession, check_session_name

_SUFFIX = ".safetensors"
_LOCK = ".lock"


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


@dataclass(frozen=True)
class _Entry:
    session: Session
    info: SessionInfo


class SessionStore:
    """Sessions of one row each, by name. Thread-safe."""

    def __init__(
        self, weights: Weights, config: ModelConfig, most_bytes: int, folder: Path | None = None
    ) -> None:
        """Reads the sessions of the folder, which is made and locked.

        Args:
          weights: of the model.
          config: of the model.
          most_bytes: held at once.
          folder: None: sessions end with the process.

        Raises:
          CheckpointError: a file is damaged, or of another model.
          ConfigError: they need more memory than `most_bytes`, or a file's name is no session's.
          OutputError: the folder cannot be written, or another process uses it.
        """
        self._weights, self._config, self._most, self._folder = weights, config, most_bytes, folder
        self._mutex = threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._unsaved: set[str] = set()
        self._lock: int | None = None
        if folder is None:
            return
        self._lock = take_lock(folder / _LOCK, f"the folder of sessions {folder}")
        try:
            self._known = fingerprint(weights, config)
            for path in sorted(folder.glob(f"*{_SUFFIX}")):
                check_session_name(path.stem, f"the name of {path}")
                self._load(path)
        except BaseException:
            self.close()
            raise

    @property
    def bytes(self) -> int:
        """Memory of all sessions."""
        with self._mutex:
            return sum(entry.info.bytes for entry in self._entries.values())

    def list(self) -> list[SessionInfo]:
        """All sessions, by name."""
        with self._mutex:
            return [self._entries[name].info for name in sorted(self._entries)]

    def find(self, name: str) -> Session:
        """A session.

        Raises:
          UnknownSession: there is none of that name.
        """
        with self._mutex:
            return self._entry(name).session

    def check_room(self, name: str, size: int) -> None:
        """Refuses so many bytes more under a name.

        Raises:
          SessionsFull: all sessions together would need more than may be held.
        """
        with self._mutex:
            before = self._entries[name].info.bytes if name in self._entries else 0
            if self.bytes - before + size > self._most:
                raise SessionsFull(
                    f"save_as is {name!r}: sessions hold {self.bytes} bytes of at most "
                    f"{self._most}, and this one needs {size}; delete some"
                )

    def save(self, name: str, session: Session) -> SessionInfo:
        """Keeps a session of one row, copied to the host, in place of one of that name.

        Raises:
          SessionsFull: there is no room.
          CheckpointError: its logits are not finite.
        """
        session = _on_host(session, self._config)
        if not np.isfinite(session.logits_BV).all():
            raise CheckpointError(f"session {name!r} is not saved: its logits are not finite")
        with self._mutex:
            self.check_room(name, session_bytes(session))
            self._unsaved.add(name)
            return self._put(name, session, time.time())

    def fork(self, name: str, new_name: str) -> SessionInfo:
        """Gives a session a second name. Its arrays are shared: none is ever changed.

        Raises:
          UnknownSession: there is none called `name`.
          ConfigError: `new_name` is no name.
          SessionsFull: there is no room.
        """
        check_session_name(new_name, "name")
        with self._mutex:
            entry = self._entry(name)
            self.check_room(new_name, entry.info.bytes)
            self._unsaved.add(new_name)
            return self._put(new_name, entry.session, time.time())

    def restore(self, name: str) -> SessionInfo:
        """Reads a session from the folder again.

        Raises:
          UnknownSession: the folder has none of that name, or there is no folder.
          CheckpointError: the file is damaged, or of another model.
          ConfigError: there is no room.
        """
        check_session_name(name)
        path = self._path(name)
        if path is None or not path.exists():
            raise UnknownSession(f"session {name!r} is not kept in a folder")
        with self._mutex:
            return self._load(path)

    def delete(self, name: str) -> None:
        """Forgets a session and removes its file.

        Raises:
          UnknownSession: there is none.
          OutputError: the file is no session, or cannot be removed.
        """
        with self._mutex:
            self._entry(name)
            path = self._path(name)
            if path is not None and path.exists():
                _check_ours(path)
                with disk_errors(path):
                    path.unlink()
            del self._entries[name]
            self._unsaved.discard(name)

    def write(self) -> None:
        """Writes what is not in the folder yet: as many sessions as can be written.

        Raises:
          OutputError: of the first that could not.
        """
        first: MMFreeError | None = None
        with self._mutex:
            for name in sorted(self._unsaved):
                path = self._path(name)
                if path is None:
                    return
                try:
                    if path.exists():
                        _check_ours(path)
                    session = self._entries[name].session
                    save_session(path, session, self._weights, self._config, known=self._known)
                    self._unsaved.discard(name)
                except MMFreeError as error:
                    first = first or error
        if first is not None:
            raise first

    def close(self) -> None:
        """Frees the folder for others; a second call does nothing."""
        with self._mutex:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise UnknownSession(f"no session is called {name[:120]!r}")
        return self._entries[name]

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}{_SUFFIX}"

    def _load(self, path: Path) -> SessionInfo:
        session = _on_host(
            load_session(path, self._weights, self._config, known=self._known), self._config
        )
        if len(session.logits_BV) != 1:
            raise CheckpointError(
                f"session file {path} has {len(session.logits_BV)} rows: serving takes those of one"
            )
        try:
            self.check_room(path.stem, session_bytes(session))
        except SessionsFull as error:
            raise ConfigError(f"{path}: {error}, or allow more") from error
        self._unsaved.discard(path.stem)
        return self._put(path.stem, session, path.stat().st_mtime)

    def _put(self, name: str, session: Session, saved_at: float) -> SessionInfo:
        tokens = int(session.state.position_B[0])
        info = SessionInfo(name, tokens, session_bytes(session), saved_at)
        self._entries[name] = _Entry(session, info)
        return info


def _on_host(session: Session, config: ModelConfig) -> Session:
    """A session of one row in arrays of the host, an attention cache without its empty places."""
    session = jax.tree.map(np.asarray, session)
    if config.recurrent:
        return session
    held = int(session.state.position_B.max())
    layers = with_places(session.state.layers, config, held)
    state = dataclasses.replace(session.state, layers=layers)
    return dataclasses.replace(session, state=state)


def _check_ours(path: Path) -> None:
    """Refuses a file that is no session.

    Raises:
      OutputError: says so.
    """
    with contextlib.suppress(CheckpointError):
        Reader(path, file_format=FORMAT, version=VERSION)
        return
    raise OutputError(f"{path} is not replaced or removed: it is no session; move it away")
