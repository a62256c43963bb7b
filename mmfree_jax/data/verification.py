"""Whether a data set's shards are as they were written: every file is read once.

What was found good is remembered in the data set's folder by size and time stamps, so that the
next run only looks at those. Where the folder is read-only each run reads all of it again.
Nothing here imports JAX.
"""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfree_jax.data.dataset import INDEX_NAME, TokenDataset
from mmfree_jax.errors import DataError, OutputError
from mmfree_jax.files import sha256_file, write_text
from mmfree_jax.text_files import read_json

REMEMBERED = ".verified.json"
AT_ONCE = 2**28
"""Bytes up to which training waits for the answer (about a second)."""

Stamp = list[str | int]


def _files(dataset: TokenDataset) -> Iterator[tuple[Path, Stamp]]:
    """The files that are not remembered as good, and what is to be remembered of each."""
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
                raise DataError(f"{file}: {e.strerror}; prepare the data set again") from e
            if found != stamp[0]:
                raise DataError(
                    f"{file} is damaged: its checksum is not that in {INDEX_NAME}; prepare the "
                    "data set again"
                )
            good = _remembered(dataset.path) | {file.name: stamp}
            with contextlib.suppress(OutputError):
                write_text(dataset.path / REMEMBERED, json.dumps(good) + "\n")


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
