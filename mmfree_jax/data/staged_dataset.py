"""A data set that is prepared into a bucket: written on this machine, shard by shard uploaded.

The folder here holds what is not finished; a shard that is leaves it for the bucket. Each time
one does, the journal goes there too, with the beginnings of the shards that it names, so that a
preparation on any machine goes on from there. Finished shards are known by their versions and
never read again. `index.json` goes last, on the condition that there is none. Nothing here imports
JAX.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfree_jax.data.dataset_index import INDEX_NAME
from mmfree_jax.data.provenance import PROGRESS_NAME, refuse_others
from mmfree_jax.data.tokenizer import TOKENIZER_FOLDER
from mmfree_jax.data.writer import read_progress, write_progress
from mmfree_jax.errors import DataError
from mmfree_jax.files import owner
from mmfree_jax.leases import LEASE, Lease, lease
from mmfree_jax.outputs import staging
from mmfree_jax.prefixes import UPLOADING, mark_uploading, names_below
from mmfree_jax.storage import (
    Object,
    Url,
    check_bucket,
    create,
    delete,
    download,
    find_object,
    list_below,
    upload,
)

_COMMAND = "data prepare"
_VERSIONS = "objects"


@dataclass
class StagedDataset:
    """The folder on this machine, and what is in the bucket of it.

    Attributes:
      url: of the data set.
      folder: begins as a stopped preparation leaves it on a disk, without its finished shards.
      lease: that keeps others out; None: the data set is complete.
    """

    url: Url
    folder: Path
    lease: Lease | None = None
    _versions: dict[str, str] = field(default_factory=dict)
    """Of the files of finished shards, as they were uploaded."""
    _is_marked: bool = False

    def _check(self) -> None:
        assert self.lease is not None
        self.lease.check()

    def start_afresh(self) -> None:
        """Deletes what a preparation left there that had not finished anything."""
        for name in sorted(names_below(self.url)):
            if _is_prepared(name):
                self._check()
                delete(self.url / name)

    def fetch(self) -> None:
        """Downloads the journal and the beginnings of shards, if a preparation was stopped.

        Raises:
          DataError: the journal is damaged, or a shard was changed or is gone.
        """
        there = {found.url: found for found in list_below(self.url)}
        if self.url / PROGRESS_NAME not in there:
            return
        download(self.url / PROGRESS_NAME, self.folder / PROGRESS_NAME)
        journal = read_progress(self.folder / PROGRESS_NAME) or {}
        self._versions = journal.get(_VERSIONS, {})
        self._is_marked = self.url / UPLOADING in there
        finished, begun = _shard_files(journal)
        for name in finished:
            self._find(there, name, self._versions.get(name))
        for name in begun:
            self._find(there, name)
            download(self.url / name, self.folder / name)

    def _find(self, there: dict[Url, Object], name: str, version: str | None = None) -> None:
        found = there.get(self.url / name)
        if found is None or version not in (None, found.version):
            raise DataError(
                f"{self.url / name} is missing or was changed since it was written: remove "
                f"{self.url} and prepare again"
            )

    def publish(self, journal: dict[str, Any]) -> None:
        """Uploads shards that were finished since the last time, then the journal.

        Raises:
          StorageError: the bucket refuses, or cannot be reached.
        """
        finished, begun = _shard_files(journal)
        new = [name for name in finished if name not in self._versions]
        if self._is_marked and not new:
            return
        self._check()
        if not self._is_marked:
            mark_uploading(self.url, _COMMAND, set())
            self._is_marked = True
        for name in (*new, *begun):
            self._check()
            upload(self.folder / name, self.url / name)
        for name in new:
            found = find_object(self.url / name)
            self._versions[name] = "" if found is None else found.version
            (self.folder / name).unlink()
        write_progress(self.folder / PROGRESS_NAME, journal | {_VERSIONS: self._versions})
        self._check()
        upload(self.folder / PROGRESS_NAME, self.url / PROGRESS_NAME)

    def complete(self) -> None:
        """Uploads what is left of the data set, then its index.

        Raises:
          ChangedError: another data set is there by now.
          StorageError: the bucket refuses, or cannot be reached.
        """
        files = (p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        for name in sorted(path.as_posix() for path in files):
            if _is_prepared(name):
                self._check()
                upload(self.folder / name, self.url / name)
        self._check()
        create(self.url / INDEX_NAME, (self.folder / INDEX_NAME).read_bytes())
        self.remove_marks()

    def remove_marks(self) -> None:
        """Deletes what says that the data set is unfinished."""
        for name in (UPLOADING, PROGRESS_NAME):
            delete(self.url / name)


def _is_prepared(name: str) -> bool:
    """Whether a preparation writes that file, beside the index and the journal."""
    is_shard = "/" not in name and name.endswith((".tokens", ".documents"))
    return is_shard or name.startswith(f"{TOKENIZER_FOLDER}/")


def _shard_files(journal: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names of the files of finished shards, and of those that were begun."""
    splits = journal.get("splits", {}).values()
    finished = [shard["name"] for state in splits for shard in state["shards"]]
    begun = [state["open"]["name"] for state in splits if state["open"]]

    def files(names: list[str]) -> list[str]:
        return [f"{name}.{kind}" for name in names for kind in ("tokens", "documents")]

    return files(finished), files(begun)


@contextlib.contextmanager
def staged_dataset(url: Url) -> Iterator[StagedDataset]:
    """A data set of a bucket, to be prepared or gone on with while the block runs.

    Args:
      url: where it goes; of a complete one the folder holds the index, of a stopped one what is
        needed to go on.

    Raises:
      DataError: something else lies there, or what is there is damaged.
      InUseElsewhereError: another job prepares it.
      StorageError: the bucket is missing, refuses, or cannot be reached.
      OutputError: the disk of temporary files is full.
    """
    check_bucket(url)
    with contextlib.ExitStack() as held:
        staged = StagedDataset(url, held.enter_context(staging(url)))
        names = names_below(url)
        if INDEX_NAME in names:
            download(url / INDEX_NAME, staged.folder / INDEX_NAME)
            if UPLOADING in names:
                staged.remove_marks()
            yield staged
            return
        if PROGRESS_NAME not in names:
            refuse_others(url, names - {LEASE, UPLOADING})
        staged.lease = held.enter_context(
            lease(url / LEASE, f"data folder {url}", owner(), remove=True)
        )
        staged.fetch()
        yield staged
        staged.complete()
