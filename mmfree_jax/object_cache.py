"""Copies of what lies in buckets, in a folder of this machine that never grows beyond a limit.

    with cache.use(key, size, describe, fill) as folder: ...

An entry is a folder that appears whole: it is filled beside its place and renamed. While it is used
or filled its lock file is held (`flock`, so that the death of a process frees it), and what is held
is not removed; of the rest what was used longest ago goes first. Processes of one machine share the
folder; what one fetches the others find. It must be on a disk of this machine. Nothing here imports
JAX.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.environment import own_cache
from mmfree_jax.errors import OutputError
from mmfree_jax.files import disk_errors, lock

FOLDER = "MMFREE_CACHE"
"""Environment variable: the folder of the copies, and of what else is fetched once."""
DEFAULT_GIB = 100.0
"""Limit where no setting names another (GiB)."""
_LOCK = ".lock"
_WAY_OUT = f"make room there, or set {FOLDER} to a folder on another disk"


def cache_folder(name: str = "objects") -> Path:
    """Where what is fetched is kept: `$MMFREE_CACHE`, else `name` in ~/.cache/mmfree_jax.

    `XDG_CACHE_HOME` names another than ~/.cache. Without a name it is the folder of all.

    Raises:
      OutputError: there is no home.
    """
    if named := os.environ.get(FOLDER):
        return Path(named).expanduser().absolute()
    ours = own_cache()
    if ours is None:
        raise OutputError(
            "copies of what is fetched have no place, for there is no home (or "
            f"XDG_CACHE_HOME is no absolute path): set {FOLDER} to a folder"
        )
    return ours / name


@dataclass(frozen=True)
class ObjectCache:
    """The copies in a folder."""

    folder: Path
    """On a disk of this machine; made when it is first needed."""
    limit: int
    """Bytes of all entries together, at most."""
    limited_by: str = FOLDER
    """How a message names what sets the limit."""

    @contextlib.contextmanager
    def use(
        self, key: str, size: int, describe: str, fill: Callable[[Path], object]
    ) -> Iterator[Path]:
        """An entry, fetched if it is not there, which stays while the block runs.

        Args:
          key: name of the entry: what has the same key has the same content.
          size: bytes that it takes.
          describe: what it is, for messages and for those who look into the folder.
          fill: writes the entry's files into the empty folder that it is given.

        Raises:
          OutputError: it is larger than the limit, or the disk is full.
        """
        descriptor = self._hold(key, size, describe, fill)
        try:
            yield self.folder / key
        finally:
            os.close(descriptor)

    def keep(self, key: str, size: int, describe: str, fill: Callable[[Path], object]) -> Path:
        """An entry as by `use`, which stays while this process lives."""
        _ = self._hold(key, size, describe, fill)  # the descriptor is left open
        return self.folder / key

    def check(self, size: int, describe: str) -> None:
        """Refuses what can never be held.

        Raises:
          OutputError: it is larger than the limit.
        """
        if size > self.limit:
            raise OutputError(
                f"{describe} takes {_gib(size)}, more than the {_gib(self.limit)} of the copies "
                f"in {self.folder}: set {self.limited_by} to more"
            )

    def has(self, key: str) -> bool:
        """Whether an entry is there."""
        return (self.folder / key).is_dir()

    def _hold(self, key: str, size: int, describe: str, fill: Callable[[Path], object]) -> int:
        """A descriptor that holds the entry, which is there."""
        with disk_errors(self.folder, _WAY_OUT):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._note(key), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            while True:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if self.has(key):
                    os.utime(descriptor)  # used last
                    return descriptor
                # Not at once: whoever fetches it holds it shared for an instant, as we did.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if not self.has(key):
                    self._fetch(descriptor, key, size, describe, fill)
        except BaseException:
            os.close(descriptor)
            raise

    def _fetch(
        self,
        descriptor: int,
        key: str,
        size: int,
        describe: str,
        fill: Callable[[Path], object],
    ) -> None:
        self.check(size, describe)
        beside = self._beside(key)
        note = json.dumps({"bytes": size, "what": describe}).encode()
        with disk_errors(self.folder, _WAY_OUT):
            while not self._take_room(descriptor, key, size, note):
                time.sleep(0.05)  # others hold all that is there
            try:
                fill(beside)
                beside.rename(self.folder / key)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise

    def _take_room(self, descriptor: int, key: str, size: int, note: bytes) -> bool:
        """Removes what must go for an entry and begins it; False: too much of it is in use."""
        with lock(self.folder / _LOCK, f"the copies in {self.folder}", wait=True):
            shutil.rmtree(self._beside(key), ignore_errors=True)  # of a process that was killed
            entries = sorted(self._entries(key))
            taken = sum(entry.size for entry in entries)
            for entry in entries:
                if taken + size <= self.limit:
                    break
                taken -= entry.size if self._remove(entry.key) else 0
            if taken + size > self.limit:
                return False
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, note, 0)
            self._beside(key).mkdir()
            return True

    def _entries(self, but: str) -> "Iterator[_Entry]":
        for note in self.folder.glob("*.json"):
            key = note.stem
            if key != but and (self.has(key) or self._beside(key).is_dir()):
                with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                    size = int(json.loads(note.read_bytes())["bytes"])
                    yield _Entry(note.stat().st_mtime_ns, key, size)

    def _remove(self, key: str) -> bool:
        """Removes an entry that nobody holds."""
        descriptor = os.open(self._note(key), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder / key, ignore_errors=True)
            shutil.rmtree(self._beside(key), ignore_errors=True)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _note(self, key: str) -> Path:
        """The file that is locked, and says how much the entry takes and what it is."""
        return self.folder / f"{key}.json"

    def _beside(self, key: str) -> Path:
        return self.folder / f"{key}.part"


@dataclass(frozen=True, order=True)
class _Entry:
    used: int
    """Time of the last use (ns)."""
    key: str
    size: int
    """Bytes."""


def shared_cache(gib: float = DEFAULT_GIB, limited_by: str = FOLDER) -> ObjectCache:
    """The copies that all commands on this machine share.

    Args:
      gib: bytes of all of them together, at most (GiB).
      limited_by: how a message names what sets that.
    """
    return ObjectCache(cache_folder(), int(gib * 2**30), limited_by)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
