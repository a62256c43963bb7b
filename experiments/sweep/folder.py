"""Where a sweep lies: in a folder, or in a bucket with a working copy of what decides about it.

That is small: the table, why runs failed, losses at pauses, and of each run its summary, config,
records, lease and the manifests of its checkpoints. Of a sweep in a bucket it is copied into a
temporary folder, where all works as on a disk; the copy is brought up to date before each decision
(`refresh`), and what is written into it is uploaded at once (`publish`). Run directories are the
trainers', who write them to the bucket, and rows are added to the table there
(`table.append_result`).

A run belongs to whoever holds its lease, which its trainer takes; one that finds it held waits
until the holder has shown that it lives, or has not. The copy has a lock, as a disk would have,
for each run whose holder was seen to live, so that trainers are not started in vain.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmfree_jax.errors import naming
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.files import InUseError, disk_errors, take_lock
from mmfree_jax.leases import LEASE, read_lease
from mmfree_jax.places import locate
from mmfree_jax.storage import (
    MissingError,
    Object,
    Url,
    check_bucket,
    delete,
    delete_below,
    download,
    list_below,
    upload,
)

_COPIED = re.compile(
    r"[^/]+|(failures|pauses)/[^/]+\.json|(runs|trunks)/[^/]+/(summary\.json|config\.yaml|"
    rf"metrics\.jsonl|{re.escape(LEASE)}|checkpoints/[0-9]+/manifest\.json)"
)
_LEASE = re.compile(rf"(?:runs|trunks)/([^/]+)/{re.escape(LEASE)}")
_AT_ONCE = 8
"""Objects that are fetched at a time."""


@dataclasses.dataclass
class _Holder:
    """Who has the lease of a run."""

    version: str
    since: float
    """When this version was first seen, by our clock (s)."""
    lives: bool
    lock: int | None = None
    """Held in the copy for it."""


class SweepFolder:
    """A sweep's folder while a command works on it; see `open_folder`.

    Attributes:
      sweep: the config, whose `out` is `path`.
      path: the folder, or the working copy of the bucket's.
      place: the folder, or its URL.
    """

    def __init__(
        self, sweep: SweepConfig, path: Path, place: Path | Url, *, trusting: bool,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.sweep, self.path, self.place = dataclasses.replace(sweep, out=str(path)), path, place
        self._trusting, self._clock = trusting, clock
        self._versions: dict[str, str] = {}
        self._holders: dict[str, _Holder] = {}

    @property
    def is_copy(self) -> bool:
        """Whether the sweep lies in a bucket."""
        return isinstance(self.place, Url)

    def is_there(self) -> bool:
        """Whether anything has been written."""
        return any(self.path.iterdir()) if self.is_copy else self.path.is_dir()

    def told(self, text: str) -> str:
        """A text about the working copy as one about the sweep's own folder."""
        return text.replace(str(self.path), str(self.place)) if self.is_copy else text

    def refresh(self, below: str = "") -> None:
        """Brings the working copy up to date, or what lies `below` a folder of it.

        Raises:
          StorageError: the bucket refuses, or cannot be reached.
          OutputError: the disk of temporary files cannot be written.
        """
        if not isinstance(self.place, Url):
            return
        root, found = self.place, {}
        for there in list_below(root / below if below else root):
            name = there.url.key.removeprefix(f"{root.key}/" if root.key else "")
            if _COPIED.fullmatch(name) and ".." not in name.split("/"):
                found[name] = there
        known = [n for n in self._versions if not below or n.startswith(f"{below}/")]
        for name in [n for n in known if n not in found]:
            del self._versions[name]
            (self.path / name).unlink(missing_ok=True)
        changed = [(n, o) for n, o in found.items() if self._versions.get(n) != o.version]
        with (
            disk_errors(self.path, "make room there, or set TMPDIR to another folder"),
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            list(pool.map(self._copy, changed))
        for name, there in found.items():
            if lease := _LEASE.fullmatch(name):
                self._follow(lease[1], name, there)

    def _copy(self, changed: tuple[str, Object]) -> None:
        name, there = changed
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(MissingError):  # deleted meanwhile
            download(there.url, target)
            self._versions[name] = there.version

    def _follow(self, run: str, name: str, there: Object) -> None:
        """Keeps a lock in the copy while the holder of a run's lease is seen to live."""
        now, before = self._clock(), self._holders.get(run)
        owner, seconds = "", 0.0
        with contextlib.suppress(FileNotFoundError):  # deleted before it was copied
            owner, seconds = read_lease((self.path / name).read_bytes())
        if before is None:
            holder = _Holder(there.version, now, self._trusting)
        elif before.version != there.version:
            holder = dataclasses.replace(before, version=there.version, since=now, lives=True)
        else:
            holder = before
            holder.lives &= now - holder.since < seconds
        holder.lives &= bool(owner)
        if holder.lives and holder.lock is None:
            try:
                holder.lock = take_lock(self.path / "locks" / f"{run}.lock", run)
            except InUseError:  # by a trainer of this very process
                holder.lives = False
        elif not holder.lives and holder.lock is not None:
            os.close(holder.lock)
            holder.lock = None
        self._holders[run] = holder

    def fetch(self, name: str) -> None:
        """Copies a file that `refresh` passes over, if it is there."""
        if isinstance(self.place, Url):
            with contextlib.suppress(MissingError):
                download(self.place / name, self.path / name)

    def publish(self, *names: str) -> None:
        """Uploads files of the working copy.

        Raises:
          StorageError: the bucket refuses, or cannot be reached.
        """
        if isinstance(self.place, Url):
            for name in names:
                upload(self.path / name, self.place / name)

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        if isinstance(self.place, Url) and name in self._versions:
            delete(self.place / name)
        (self.path / name).unlink(missing_ok=True)

    def remove_checkpoints(self, run_dir: Path) -> None:
        """Deletes those of a run; `run_dir` is in the folder or its working copy."""
        name = (run_dir / "checkpoints").relative_to(self.path).as_posix()
        if isinstance(self.place, Url):
            delete_below(self.place / name)
        else:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the locks in the copy."""
        for holder in self._holders.values():
            if holder.lock is not None:
                os.close(holder.lock)


@contextlib.contextmanager
def open_folder(
    sweep: SweepConfig, *, trusting: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[SweepFolder]:
    """A sweep's folder for the block, of one in a bucket a working copy, which is up to date.

    Args:
      sweep: the config.
      trusting: whoever is written in the lease of a run is taken to live when it is first seen:
        to show, not to decide.
      clock: seconds from any origin.

    Raises:
      ConfigError: `out` is a URL that cannot be used.
      StorageError: the bucket is missing, refuses, or cannot be reached.
    """
    place = locate(sweep.out, "out")
    if isinstance(place, Path):
        yield SweepFolder(sweep, place, place, trusting=trusting, clock=clock)
        return
    check_bucket(place)
    with tempfile.TemporaryDirectory(prefix="mmfree-sweep-") as made:
        path = Path(made) / (place.name or place.bucket)
        path.mkdir()
        folder = SweepFolder(sweep, path, place, trusting=trusting, clock=clock)
        try:
            with naming(str(place), str(path)):
                folder.refresh()
                yield folder
        finally:
            folder.close()
