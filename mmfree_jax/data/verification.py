"""Whether a data set's shards are as they were written: every file is read once.

What was found good is remembered in the data set's folder by size and time stamps, so that the
next run only looks at those. Where the folder is read-only each run reads all of it again. What
lies in a bucket is compared when it arrives (`shards.py`).
Nothing here imports JAX.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfree_jax.data.dataset import TokenDataset
from mmfree_jax.data.dataset_index import INDEX_NAME, DatasetIndex
from mmfree_jax.data.shards import made_again, shard_files
from mmfree_jax.errors import DataError, OutputError, StorageError
from mmfree_jax.files import sha256_file, write_text
from mmfree_jax.storage import Url, find_object, read_bytes
from mmfree_jax.text_files import read_json

REMEMBERED = ".verified.json"
AT_ONCE = 2**28
"""Bytes up to which training waits for the answer (about a second)."""

_PIECE = 2**26
"""Bytes of an object that are read at once."""

Stamp = list[str | int]


def _files(dataset: TokenDataset) -> Iterator[tuple[Path, Stamp]]:
    """The files that are not remembered as good, and what is to be remembered of each."""
    if isinstance(dataset.path, Url):
        return  # compared when they arrive
    good = _remembered(dataset.path)
    for shard in dataset.shards:
        for extension, digest in (
            ("tokens", shard.tokens_sha256),
            ("documents", shard.documents_sha256),
        ):
            file = dataset.path / f"{shard.name}.{extension}"
            stat = file.stat()
            # Copies keep the time of modification, but not that of the last change.
            stamp: Stamp = [digest, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            if good.get(file.name) != stamp:
                yield file, stamp


def _remembered(folder: Path) -> dict[str, Stamp]:
    try:
        found = read_json(folder / REMEMBERED)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def verify(datasets: Sequence[TokenDataset]) -> None:
    """Compares every file that is not remembered as good with its checksum in the index.

    Raises:
      DataError: names the file that differs or cannot be read.
    """
    for dataset in datasets:
        for file, stamp in _files(dataset):
            try:
                found = sha256_file(file)
            except OSError as e:
                raise DataError(f"{file}: {e.strerror}; {made_again(file.parent)}") from e
            if found != stamp[0]:
                raise DataError(
                    f"{file} is damaged: its checksum is not that in {INDEX_NAME}; "
                    f"{made_again(file.parent)}"
                )
            good = _remembered(file.parent) | {file.name: stamp}
            with contextlib.suppress(OutputError):
                write_text(file.parent / REMEMBERED, json.dumps(good) + "\n")


class Verification:
    """`verify`, at once where there is little to read, else beside the training."""

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self._datasets = datasets
        self._failure: DataError | None = None

    def start(self) -> None:
        """Begins.

        Raises:
          DataError: as `verify`, where there is little to read.
        """
        left = sum(int(stamp[1]) for d in self._datasets for _, stamp in _files(d))
        if left <= AT_ONCE:
            verify(self._datasets)
            return
        threading.Thread(target=self._run, name="verification", daemon=True).start()

    def _run(self) -> None:
        try:
            verify(self._datasets)
        except DataError as e:
            self._failure = e

    @property
    def has_failed(self) -> bool:
        """Whether a file was found to be damaged."""
        return self._failure is not None

    def check(self) -> None:
        """Raises the DataError that was found, if any."""
        if self._failure is not None:
            raise self._failure


def check_sizes(index: DatasetIndex) -> None:
    """Refuses a data set of which a shard is gone, or shorter or longer than its index says.

    Raises:
      DataError: names the file.
      StorageError: the bucket cannot be read.
    """
    for shards in index.splits.values():
        for file in (file for shard in shards for file in shard_files(shard, index.token_dtype)):
            place = index.path / file.name
            try:
                found = _size(place)
            except OSError as e:
                raise DataError(f"{place}: {e.strerror}; {made_again(index.path)}") from e
            if found != file.size:
                raise DataError(
                    f"{place} has {found} bytes, its index says {file.size}: the shard is damaged; "
                    f"{made_again(index.path)}"
                )


def verify_checksums(index: DatasetIndex) -> list[str]:
    """Reads every shard and compares checksums; returns one line for each file that differs."""
    problems = []
    for shards in index.splits.values():
        for file in (file for shard in shards for file in shard_files(shard, index.token_dtype)):
            place = index.path / file.name
            try:
                # A file of another size may have no end.
                whole = _size(place) == file.size and _sha256(place, file.size) == file.sha256
            except OSError as e:
                problems.append(f"{place}: {e.strerror}")
            except StorageError as e:
                problems.append(str(e))
            else:
                problems += [] if whole else [f"{place}: checksum differs from the index"]
    return problems


def _size(place: Path | Url) -> int:
    if isinstance(place, Path):
        return place.stat().st_size
    if (found := find_object(place)) is None:
        raise StorageError(f"{place} does not exist")
    return found.size


def _sha256(place: Path | Url, size: int) -> str:
    if isinstance(place, Path):
        return sha256_file(place)
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        digest.update(read_bytes(place, start, min(size, start + _PIECE)))
    return digest.hexdigest()
