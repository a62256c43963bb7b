"""A run directory in a bucket: its small files are written here and uploaded.

Nothing can be appended to in a bucket. So process 0 has a folder of its own on this machine, into
which what the run has there (but its checkpoints) is downloaded, where the run writes as ever, and
from which `publish` uploads what has changed. Checkpoints go straight to the bucket. A lease
(`leases.py`) keeps a second job out.
"""

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mmfree_jax.files import disk_errors, is_leftover, owner
from mmfree_jax.leases import LEASE, Lease, lease, read_lease
from mmfree_jax.parallel import processes
from mmfree_jax.saved.run_directory import see_holder
from mmfree_jax.storage import (
    MissingError,
    Url,
    check_bucket,
    download,
    list_below,
    read_bytes,
    upload,
)


@dataclass
class BucketRun:
    """A run directory in a bucket, while a job has it open.

    Attributes:
      url: of the run directory.
      folder: on this machine, with its small files; in process 0 only.
      last: the file that says of the others that they are complete.
      lease: of process 0.
    """

    url: Url
    folder: Path
    last: str
    lease: Lease | None = None
    _published: dict[str, tuple[int, int]] = field(default_factory=dict)

    def check(self) -> None:
        """Sees that this job still has the run.

        Raises:
          LeaseLostError: another job has, or may have.
          StorageError: the bucket refuses, or cannot be reached.
        """
        if self.lease is not None:
            self.lease.check()

    def publish(self) -> None:
        """Uploads what has changed in the folder since the last time.

        Raises:
          StorageError: as `check`.
        """
        self.check()
        states = self._states()
        for name in sorted(states, key=lambda name: (name == self.last, name)):
            state = states[name]
            if self._published.get(name) != state:
                upload(self.folder / name, self.url / name)
                self._published[name] = state

    def _states(self) -> dict[str, tuple[int, int]]:
        """Size and time of the last change (ns) of every file, by relative name."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.is_symlink() and not is_leftover(path.name):
                status = path.stat()
                name = path.relative_to(self.folder).as_posix()
                found[name] = (status.st_size, status.st_mtime_ns)
        return found

    def fetch(self, but: str) -> None:
        """Downloads what the run has, but for what lies in its folder `but`."""
        for found in list_below(self.url):
            name = found.url.key.removeprefix(f"{self.url.key}/")
            first, *others = name.split("/")
            if first in (but, LEASE) or ".." in (first, *others):
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            download(found.url, path)
        self._published = self._states()


def open_bucket_run(
    url: Url, held: contextlib.ExitStack, *, checkpoints: str, last: str, patience: float = 15.0
) -> BucketRun:
    """Process 0 takes the run directory `url` until `held` closes; the others see that it did.

    Args:
      url: of the run directory.
      held: closes what is opened here.
      checkpoints: the folder in it that is not downloaded.
      last: the file that is uploaded after all others.
      patience: how long the others look for process 0's lease (s).

    Raises:
      InUseElsewhereError: another job has it.
      StorageError: the bucket is missing, refuses, or cannot be reached.
      CheckpointError: a process sees another bucket of that name.
    """
    parent = held.enter_context(tempfile.TemporaryDirectory(prefix="mmfree-run-"))
    run = BucketRun(url, Path(parent) / (url.name or url.bucket), last)
    run.folder.mkdir()

    def take() -> str:
        check_bucket(url)
        name = owner()
        run.lease = held.enter_context(lease(url / LEASE, f"run_dir {url}", name))
        with disk_errors(run.folder, "make room there, or set TMPDIR to another folder"):
            run.fetch(checkpoints)
        return name

    found = processes.first(take)

    def held_by() -> str | None:
        with contextlib.suppress(MissingError):
            return read_lease(read_bytes(url / LEASE))[0]
        return None

    see_holder(
        held_by,
        found,
        patience,
        f"run_dir {url} is not the bucket that process 0 writes to: give all processes the same "
        "endpoint and credentials",
    )
    return run
