"""The shards of a split as arrays: files, or copies of objects that are fetched when they are read.

An object's copy is compared with its checksum in the index before it is used, and fetched again if
it differs. Nothing here imports JAX.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfree_jax.errors import DataError
from mmfree_jax.files import sha256_file
from mmfree_jax.object_cache import ObjectCache
from mmfree_jax.storage import Url, download

TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
DOCUMENT_DTYPE = np.dtype("<u8")
_DOWNLOADS = 3
"""Times that an object is fetched until it is taken to be damaged where it lies."""


def made_again(folder: Path | Url) -> str:
    """What to do about a damaged data set: where it stands, it is not prepared a second time."""
    return f"remove {folder} and prepare the data set again"


@dataclass(frozen=True)
class ShardInfo:
    """What `index.json` says of one shard."""

    name: str
    """File name without its extension."""
    tokens: int
    """Tokens in the shard."""
    documents: int
    """Documents in the shard."""
    bytes: int
    """UTF-8 bytes of the documents' text."""
    tokens_sha256: str
    """Checksum of the `.tokens` file."""
    documents_sha256: str
    """Checksum of the `.documents` file."""


@dataclass(frozen=True)
class Shard:
    """A shard that can be read."""

    tokens: np.ndarray
    """Token ids, uint16 or uint32 [tokens]."""
    ends: np.ndarray
    """End of each document in the shard, uint64 [documents] (tokens)."""


OpenShard = Callable[[int], AbstractContextManager[Shard]]
"""Gives the shard of a number; its arrays may be read while the context lasts."""


@dataclass(frozen=True)
class ShardFile:
    """One of the two files of a shard."""

    name: str
    """With its extension."""
    sha256: str
    """Checksum."""
    size: int
    """Bytes."""


def shard_files(info: ShardInfo, token_dtype: str) -> tuple[ShardFile, ShardFile]:
    """The files of a shard: its tokens and the ends of its documents."""
    tokens = TOKEN_DTYPES[token_dtype].itemsize * info.tokens
    ends = DOCUMENT_DTYPE.itemsize * info.documents
    return (
        ShardFile(f"{info.name}.tokens", info.tokens_sha256, tokens),
        ShardFile(f"{info.name}.documents", info.documents_sha256, ends),
    )


def open_files(folder: Path, shards: Sequence[ShardInfo], token_dtype: str) -> OpenShard:
    """The shards in a folder, all mapped at once.

    Raises:
      DataError: a file is missing or has another size than the index says.
    """
    mapped = [contextlib.nullcontext(_map(folder, info, token_dtype, folder)) for info in shards]
    return mapped.__getitem__


@dataclass(frozen=True)
class BucketShards:
    """The shards below a URL; called as an `OpenShard`. Reading is thread-safe."""

    url: Url
    """The prepared data set."""
    shards: tuple[ShardInfo, ...]
    """In order."""
    token_dtype: str
    """Key of `TOKEN_DTYPES`."""
    cache: ObjectCache
    """Where copies are kept."""

    def __post_init__(self) -> None:
        """Refuses a cache that cannot hold the largest shard (OutputError)."""
        for k, info in enumerate(self.shards):
            self.cache.check(self.size(k), str(self.url / info.name))

    def size(self, k: int) -> int:
        """Bytes of shard `k`."""
        return sum(file.size for file in shard_files(self.shards[k], self.token_dtype))

    @contextlib.contextmanager
    def __call__(self, k: int) -> Iterator[Shard]:
        """Shard `k`, fetched if it is not in the cache.

        Raises:
          DataError: it is damaged in the bucket.
          StorageError: it cannot be read; names the object and the try.
          OutputError: the cache is too small, or its disk full.
        """
        info = self.shards[k]
        # By content and name: the same shard is found in whichever bucket it lies.
        content = f"{info.name} {info.tokens_sha256} {info.documents_sha256}"
        key = hashlib.sha256(content.encode()).hexdigest()
        described = str(self.url / info.name)
        with self.cache.use(key, self.size(k), described, lambda at: self._fetch(k, at)) as copy:
            yield _map(copy, info, self.token_dtype, self.url)

    def _fetch(self, k: int, folder: Path) -> None:
        for file in shard_files(self.shards[k], self.token_dtype):
            _fetch_whole(self.url, file, folder / file.name)


def _fetch_whole(folder: Url, wanted: ShardFile, file: Path) -> None:
    url = folder / wanted.name
    for _ in range(_DOWNLOADS):
        download(url, file)
        if sha256_file(file) == wanted.sha256:
            return
    raise DataError(
        f"{url} is damaged: its checksum is not that in the index, in {_DOWNLOADS} downloads; "
        f"upload it again, or {made_again(folder)}"
    )


def _map(folder: Path, info: ShardInfo, token_dtype: str, named: Path | Url) -> Shard:
    """Maps a shard's files in `folder`; messages name them in `named`."""
    tokens, ends = (
        _map_file(folder / file.name, file.size, dtype, named)
        for file, dtype in zip(
            shard_files(info, token_dtype), (TOKEN_DTYPES[token_dtype], DOCUMENT_DTYPE), strict=True
        )
    )
    if int(ends[-1]) != info.tokens:
        raise DataError(
            f"{named / info.name}.documents ends at token {int(ends[-1])}, not at "
            f"{info.tokens}: the shard is damaged; {made_again(named)}"
        )
    return Shard(tokens, ends)


def _map_file(file: Path, size: int, dtype: np.dtype, folder: Path | Url) -> np.ndarray:
    named = folder / file.name
    try:
        if (found := file.stat().st_size) != size:
            raise DataError(
                f"{named} has {found} bytes, its index says {size}: the shard is damaged; "
                f"{made_again(folder)}"
            )
        return np.asarray(np.memmap(file, dtype=dtype, mode="r"))  # plain: its slices cost less
    except OSError as e:
        raise DataError(f"{named}: {e.strerror}; restore it, or {made_again(folder)}") from e
