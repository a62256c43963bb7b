"""Writing prepared data sets: shards that only grow, and a journal to resume from.

Token and document files are appended to under their final names; they count only once
`index.json` exists. In between, `progress.json` records how much of each file is good:
after a crash, everything beyond that is cut off and written again. Nothing here imports
JAX.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mmfree_jax import files
from mmfree_jax.data.dataset_index import INDEX_NAME, DatasetIndex, index_to_json
from mmfree_jax.data.shards import DOCUMENT_DTYPE, TOKEN_DTYPES, ShardInfo
from mmfree_jax.errors import DataError, OutputError
from mmfree_jax.files import sha256_file, sync_folder, write_text
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.text_files import read_json

SHARD_TOKENS = 2**27
"""Tokens after which a shard is closed (256 MiB at two bytes a token)."""
_SELF = "sha256"
_JOURNAL: dict[str, Any] = {
    "settings": dict,
    "inputs": list,
    "file": int,
    "record": int,
    "counts": dict,
    "splits": dict,
}


def token_dtype_for(vocab_size: int) -> str:
    """The smallest token dtype that holds ids below `vocab_size`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError while writing under `folder` into an OutputError; files stay."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(
                f"{folder} cannot be written ({e.strerror}): give another --out"
            ) from e
        with files.disk_errors(
            folder,
            "make room there; what was finished is kept: run the same command again to go on",
        ):
            raise


class _GrowingFile:
    """An append-only file that knows the checksum of what it holds."""

    def __init__(self, path: Path, length: int = 0, sha256: str | None = None) -> None:
        self.path = path
        self._digest = hashlib.sha256()
        self._file: BinaryIO
        if length == 0:
            self._file = path.open("wb")
            return
        self._file = path.open("r+b")
        left = length
        while block := self._file.read(min(2**20, left)):
            self._digest.update(block)
            left -= len(block)
        if left or self._digest.hexdigest() != sha256:
            raise DataError(
                f"{path} was changed since it was written: remove {path.parent} and prepare again"
            )
        self._file.truncate(length)
        self._file.seek(length)

    def append(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self._digest.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._digest.copy().hexdigest()

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class SplitWriter:
    """Appends documents to the shards of one split.

    A shard is closed after the document with which it reaches `shard_tokens`, so shards do
    not depend on how documents were grouped.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        token_dtype: str,
        shard_tokens: int = SHARD_TOKENS,
        state: Mapping[str, Any] | None = None,
        *,
        check_finished: bool = True,
    ) -> None:
        """Starts a split, or goes on from the `state` of an earlier `sync`.

        `check_finished`: compare finished shards with their checksums; else they need not be there.
        """
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self._dtype = TOKEN_DTYPES[token_dtype]
        self._shards = [ShardInfo(**s) for s in state["shards"]] if state else []
        self._open: tuple[_GrowingFile, _GrowingFile] | None = None
        self._tokens = self._documents = self._bytes = 0
        current = state["open"] if state else None
        for shard in self._shards if check_finished else ():
            self._check_finished(shard)
        if current:
            info = ShardInfo(**current)
            self._tokens, self._documents, self._bytes = info.tokens, info.documents, info.bytes
            self._open = (
                _GrowingFile(
                    self._path("tokens"), info.tokens * self._dtype.itemsize, info.tokens_sha256
                ),
                _GrowingFile(
                    self._path("documents"),
                    info.documents * DOCUMENT_DTYPE.itemsize,
                    info.documents_sha256,
                ),
            )

    def _check_finished(self, shard: ShardInfo) -> None:
        for extension in ("tokens", "documents"):
            file = self.folder / f"{shard.name}.{extension}"
            try:
                good = sha256_file(file) == getattr(shard, f"{extension}_sha256")
            except FileNotFoundError:
                good = False
            if not good:
                raise DataError(
                    f"{file} is missing or was changed since it was written: remove {self.folder} "
                    "and prepare again"
                )

    @property
    def _name(self) -> str:
        return f"{self.split}-{len(self._shards):05d}"

    def _path(self, extension: str) -> Path:
        return self.folder / f"{self._name}.{extension}"

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return self._documents + sum(s.documents for s in self._shards)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._tokens + sum(s.tokens for s in self._shards)

    def add(self, tokens: np.ndarray, lengths: np.ndarray, num_bytes: np.ndarray) -> None:
        """Appends documents.

        Args:
          tokens: the ids of all documents, end to end.
          lengths: tokens of each document, each at least 1.
          num_bytes: UTF-8 bytes of each document's text.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        done = 0  # documents
        while done < len(lengths):
            if self._open is None:
                self._open = (
                    _GrowingFile(self._path("tokens")),
                    _GrowingFile(self._path("documents")),
                )
            before = int(ends[done - 1]) if done else 0
            room = self.shard_tokens - self._tokens
            stop = min(len(lengths), int(np.searchsorted(ends, before + room, side="left")) + 1)
            self._open[0].append(tokens[before : int(ends[stop - 1])].astype(self._dtype))
            own_ends = ends[done:stop] - before + self._tokens
            self._open[1].append(own_ends.astype(DOCUMENT_DTYPE))
            self._tokens = int(own_ends[-1])
            self._documents += stop - done
            self._bytes += int(np.sum(num_bytes[done:stop]))
            done = stop
            if self._tokens >= self.shard_tokens:
                self._finish_shard()

    def _current(self) -> ShardInfo | None:
        if self._open is None:
            return None
        tokens, documents = self._open
        return ShardInfo(
            name=self._name,
            tokens=self._tokens,
            documents=self._documents,
            bytes=self._bytes,
            tokens_sha256=tokens.sha256,
            documents_sha256=documents.sha256,
        )

    def _finish_shard(self) -> None:
        current = self._current()
        assert self._open is not None
        assert current is not None
        for file in self._open:
            file.sync()
            file.close()
        self._shards.append(current)
        self._open = None
        self._tokens = self._documents = self._bytes = 0

    def sync(self) -> dict[str, Any]:
        """Makes everything written so far durable; returns the state to go on from."""
        for file in self._open or ():
            file.sync()
        current = self._current()
        return {
            "shards": [vars(s) for s in self._shards],
            "open": vars(current) if current else None,
        }

    def finish(self) -> tuple[ShardInfo, ...]:
        """Closes the last shard; returns all of them."""
        if self._open is not None:
            self._finish_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Lets go of the open files, without making them durable."""
        for file in self._open or ():
            with contextlib.suppress(OSError):
                file.close()
        self._open = None


def write_index(index: DatasetIndex) -> None:
    """Marks a folder of this machine as complete, by writing `index.json`."""
    assert isinstance(index.path, Path)
    sync_folder(index.path)
    write_text(index.path / INDEX_NAME, index_to_json(index))


def write_dataset(
    path: str | os.PathLike[str],
    splits: Mapping[str, Iterable[np.ndarray]],
    tokenizer: Mapping[str, Any],
    *,
    shard_tokens: int = SHARD_TOKENS,
    save_tokenizer: Callable[[Path], object] | None = None,
    source: Mapping[str, Any] | None = None,
) -> DatasetIndex:
    """Writes documents that are token ids already, as a prepared folder.

    Args:
      path: the folder; created, must not hold a data set.
      splits: the documents of each split ("train", "heldout"), each a 1-D array of ids with
        its BOS and EOS. Their text size is taken as one byte a token without a better figure.
      tokenizer: identity of the tokenizer (vocab_size, sha256, kind, bos_id, eos_id).
      shard_tokens: tokens after which a shard is closed.
      save_tokenizer: writes the tokenizer's files into the folder it is given.
      source: free-form notes for `index.json`.

    Raises:
      DataError: the folder holds a data set, an id is outside the vocabulary, or the disk
        cannot be written.
    """
    folder = Path(path)
    if (folder / INDEX_NAME).exists():
        raise DataError(f"{folder} holds a prepared data set already: give another folder")
    vocab_size = int(tokenizer["vocab_size"])
    dtype = token_dtype_for(vocab_size)
    shards = {}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if save_tokenizer is not None:
            save_tokenizer(folder / "tokenizer")
        for split, documents in splits.items():
            writer = SplitWriter(folder, split, dtype, shard_tokens)
            for ids in documents:
                if len(ids) == 0:
                    continue
                ids = np.asarray(ids)
                if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
                    raise DataError(
                        f"{split} split: token id {int(ids.max())} is outside the vocabulary of "
                        f"{vocab_size}: tokenise the documents again"
                    )
                writer.add(ids, np.array([len(ids)]), np.array([len(ids)]))
            shards[split] = writer.finish()
        index = DatasetIndex(folder, dict(tokenizer), dtype, shards, dict(source or {}))
        write_index(index)
    return index


def read_progress(file: Path) -> dict[str, Any] | None:
    """The journal of an unfinished preparation, or None.

    Raises:
      DataError: it is unreadable or damaged. Older versions wrote no checksum.
    """
    try:
        journal = read_json(file)
        if wrong := fault(journal, _JOURNAL):
            raise ValueError(wrong)
        if journal.pop(_SELF, None) not in (None, digest(journal)):
            raise ValueError("it does not match its own checksum")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise DataError(f"{file} cannot be read ({e}): remove {file.parent} and start again") from e
    return journal


def write_progress(file: Path, journal: dict[str, Any]) -> None:
    """Writes the journal, with a checksum of itself."""
    journal = json.loads(json.dumps(journal))  # what a reader finds, tuples as lists
    write_text(file, json.dumps(journal | {_SELF: digest(journal)}))
