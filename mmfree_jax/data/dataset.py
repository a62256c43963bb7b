"""Prepared data sets: the format on disk, and reading rows from it.

A prepared folder holds
```
index.json            written last: a folder without it is unfinished
tokenizer/            the tokenizer's own files
train-00000.tokens    token ids, flat, little-endian uint16 or uint32
train-00000.documents end of each document within the shard, little-endian uint64 (tokens)
heldout-00000.tokens  ...
```
The documents of a split form one stream of N tokens. Row r of length T is tokens
r T ... r T + T: one more than T, so that every token but the first of the stream is a
target exactly once.

Nothing here imports JAX.
"""

import bisect
import hashlib
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfree_jax.data.dataset_index import DatasetIndex, load_index
from mmfree_jax.data.shards import (
    DOCUMENT_DTYPE,
    BucketShards,
    OpenShard,
    open_files,
)
from mmfree_jax.errors import DataError
from mmfree_jax.object_cache import ObjectCache, shared_cache
from mmfree_jax.storage import Url

if TYPE_CHECKING:
    from mmfree_jax.data.row_source import RowSource

TRAIN, HELDOUT = "train", "heldout"

Row = dict[str, np.ndarray]
PADDING = {"tokens": 0, "targets": -1, "segment_ids": 0}
"""What a place of a row holds behind the last token."""


class TokenDataset:
    """One split of a prepared folder, memory-mapped. Reading is thread-safe.

    Of a data set in a bucket, shards are fetched when they are read, and copies of them mapped.

    Attributes:
      path: the prepared folder, or its URL.
      split: "train" or "heldout".
      num_tokens: tokens in the split, N.
      num_documents: documents in the split.
      num_bytes: UTF-8 bytes of their text.
      vocab_size: number of ids that the tokenizer can produce.
      identity: the tokenizer's identity (kind, vocab_size, sha256, bos_id, eos_id).
      shards: the shards, as in `index.json`.
      open_shard: gives the arrays of the shard of a number.
    """

    def __init__(self, index: DatasetIndex, split: str, cache: ObjectCache | None = None) -> None:
        """`cache`: of shards that lie in a bucket; None: the one that all commands share."""
        self.path = index.path
        self.split = split
        self.shards = index.splits[split]
        self.identity = index.tokenizer
        self.vocab_size = int(index.tokenizer["vocab_size"])
        self.num_tokens = sum(s.tokens for s in self.shards)
        self.num_documents = sum(s.documents for s in self.shards)
        self.num_bytes = sum(s.bytes for s in self.shards)
        self.open_shard: OpenShard
        if isinstance(self.path, Url):
            cache = cache or shared_cache()
            self.open_shard = BucketShards(self.path, self.shards, index.token_dtype, cache)
        else:
            self.open_shard = open_files(self.path, self.shards, index.token_dtype)
        self._token_starts = [0, *itertools.accumulate(s.tokens for s in self.shards)]
        self._document_starts = [0, *itertools.accumulate(s.documents for s in self.shards)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for the split's tokens and its tokenizer (hex)."""
        digest = hashlib.sha256(str(self.identity.get("sha256")).encode())
        for shard in self.shards:
            digest.update(f"{shard.tokens_sha256} {shard.documents_sha256}\n".encode())
        return digest.hexdigest()

    @property
    def num_predicted(self) -> int:
        """Targets in the whole split: every token but each document's first."""
        return self.num_tokens - self.num_documents

    @property
    def bytes_per_token(self) -> float:
        """Text bytes per predicted token: nats per token / ln 2 / this = bits per byte.

        With a BOS token every byte of the text is predicted. Without one a document's first
        token is given, and its share of the bytes (estimated by the mean) is left out.
        """
        if self.num_predicted == 0:
            return 0.0
        num_bytes = float(self.num_bytes)
        if self.identity.get("bos_id") is None:
            specials = 0 if self.identity.get("eos_id") is None else self.num_documents
            content = max(1, self.num_tokens - specials)
            num_bytes *= 1 - self.num_documents / content
        return num_bytes / self.num_predicted

    def num_rows(self, seq_len: int, *, partial: bool = False) -> int:
        """Rows of `seq_len` tokens; `partial` counts a shorter last row too."""
        rows, rest = divmod(max(0, self.num_tokens - 1), seq_len)
        return rows + (1 if partial and rest else 0)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` ... `stop` - 1 of the stream, int32 [stop - start]."""
        parts = []
        for k in range(*self._shard_range(start, stop)):
            offset = self._token_starts[k]
            with self.open_shard(k) as shard:
                part = shard.tokens[max(0, start - offset) : stop - offset]
                parts.append(part.astype(np.int32))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document `i`, with its BOS and EOS, int32."""
        if not 0 <= i < self.num_documents:
            raise IndexError(f"document {i} of {self.num_documents}")
        shard = bisect.bisect_right(self._document_starts, i) - 1
        i -= self._document_starts[shard]
        with self.open_shard(shard) as found:
            start = int(found.ends[i - 1]) if i else 0
            return found.tokens[start : int(found.ends[i])].astype(np.int32)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Positions p with `start` < p < `stop` at which a document begins, int64, sorted."""
        found = []
        for k in range(*self._shard_range(start, stop)):
            offset = self._token_starts[k]
            # In the ends' own type: for another, numpy converts every end of the shard first.
            bounds = np.array([max(0, start - offset) + 1, max(0, stop - offset)], DOCUMENT_DTYPE)
            with self.open_shard(k) as shard:
                low, high = shard.ends.searchsorted(bounds)
                found.append(shard.ends[low:high].astype(np.int64) + offset)
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def row(self, r: int, seq_len: int) -> Row:
        """Row `r` as a batch row.

        Returns:
          tokens, targets, segment_ids: int32 [seq_len]. The last row of
          `num_rows(seq_len, partial=True)` may be padded (token 0, target -1, segment 0).

        Raises:
          DataError: a token id is beyond the vocabulary, so the shard is damaged.
        """
        return {name: array[0] for name, array in read_rows([(self, r)], seq_len).items()}

    def span(self, r: int, seq_len: int) -> tuple[int, int]:
        """Position of the first token of row `r`, and one past that of its last target."""
        start = r * seq_len
        stop = min(start + seq_len + 1, self.num_tokens)
        if not (r >= 0 and stop - start > 1):
            raise IndexError(f"row {r} of {self.num_rows(seq_len, partial=True)}")
        return start, stop

    def shards_of_row(self, r: int, seq_len: int) -> range:
        """Numbers of the shards that hold tokens of row `r`."""
        return range(*self._shard_range(*self.span(r, seq_len)))

    def predicted_in_row(self, r: int, seq_len: int) -> int:
        """Number of targets in row `r`."""
        start, stop = self.span(r, seq_len)
        return stop - start - 1 - len(self.document_ends(start, stop))

    def _shard_range(self, start: int, stop: int) -> tuple[int, int]:
        """First and one past the last shard that hold any of tokens `start` ... `stop` - 1."""
        first = bisect.bisect_right(self._token_starts, start) - 1
        return first, bisect.bisect_left(self._token_starts, stop)


def read_rows(picks: Sequence[tuple[TokenDataset, int] | None], seq_len: int) -> Row:
    """Rows of prepared data sets as a batch; None is a row of padding.

    The arrays of a batch are made at once: made row by row, they took longer than the steps of
    the smallest models.

    Returns:
      tokens, targets, segment_ids: int32 [len(picks), seq_len]. A split's last row may be shorter:
      the rest is padding (token 0, target -1, segment 0).

    Raises:
      DataError: a token id is beyond the vocabulary, so the shard is damaged.
    """
    tokens = np.zeros((len(picks), seq_len + 1), np.int32)
    begins = np.zeros((len(picks), seq_len + 1), np.bool_)  # where a document does, or the row
    begins[:, 0] = True
    lengths = []
    for i, pick in enumerate(picks):
        if pick is None:
            lengths.append(0)
            continue
        dataset, r = pick
        start, stop = dataset.span(r, seq_len)
        tokens[i, : stop - start] = dataset.tokens(start, stop)
        begins[i, dataset.document_ends(start, stop) - start] = True
        lengths.append(stop - start - 1)
    for pick, largest in zip(picks, tokens.max(axis=1).tolist(), strict=True):
        if pick is not None and largest >= pick[0].vocab_size:
            raise _beyond_vocabulary(*pick, seq_len)
    targets = tokens[:, 1:].copy()
    targets[begins[:, 1:]] = PADDING["targets"]
    batch = {
        "tokens": tokens[:, :-1].copy(),
        "targets": targets,
        "segment_ids": np.cumsum(begins[:, :-1], axis=1, dtype=np.int32),
    }
    for i, length in enumerate(lengths):
        if length < seq_len:
            for name, fill in PADDING.items():
                batch[name][i, length:] = fill
    return batch


def _beyond_vocabulary(dataset: TokenDataset, r: int, seq_len: int) -> DataError:
    start, stop = dataset.span(r, seq_len)
    tokens = dataset.tokens(start, stop)
    return DataError(
        f"{dataset.path} ({dataset.split}): token id {int(tokens.max())} at position "
        f"{start + int(tokens.argmax())} is beyond the vocabulary of {dataset.vocab_size}: a shard "
        f"is damaged; check it with `mmfree data inspect {dataset.path} --verify`"
    )


def open_dataset(
    path: str | os.PathLike[str], split: str = TRAIN, cache: ObjectCache | None = None
) -> TokenDataset:
    """Opens one split of a prepared folder.

    Args:
      path: the folder, or its URL in a bucket.
      split: "train" or "heldout".
      cache: of shards that lie in a bucket; None: the one that all commands share.

    Raises:
      DataError: the folder is missing, unfinished or damaged, or has no such split.
    """
    index = load_index(path)
    if not index.splits.get(split):
        have = ", ".join(name for name, shards in index.splits.items() if shards) or "none"
        way_out = (
            "prepare it with --heldout-fraction 0.05; to train without one, set --eval.batches 0"
            if split == HELDOUT
            else "prepare it from more text"
        )
        raise DataError(f"data folder {path} has no {split} split (it has: {have}): {way_out}")
    return TokenDataset(index, split, cache)


def check_compatible(
    dataset: "RowSource",
    model_vocab_size: int | None = None,
    identity: Mapping[str, Any] | None = None,
    *,
    owner: str = "the run",
) -> None:
    """Checks that a data set fits a model, and was made by the tokenizer `identity`.

    Args:
      dataset: the data set.
      model_vocab_size: `model.vocab_size` (tokens); None: not checked.
      identity: the tokenizer identity that `owner` holds; None: not checked.
      owner: who holds `identity`, for the message ("the checkpoint", "data folder x").

    Raises:
      DataError: the vocabulary is larger than the model's, or the tokenizers differ.
    """
    if model_vocab_size is not None and dataset.vocab_size > model_vocab_size:
        raise DataError(
            f"data folder {dataset.path} has a vocabulary of {dataset.vocab_size} tokens, "
            f"model.vocab_size is {model_vocab_size}: train a model with --model.vocab-size "
            f"{dataset.vocab_size}, or prepare the data with a tokenizer of at most "
            f"{model_vocab_size} tokens"
        )
    if identity is not None and identity.get("sha256") != dataset.identity.get("sha256"):
        raise DataError(
            f"data folder {dataset.path} was made with the tokenizer "
            f"{describe_identity(dataset.identity)}, {owner} with "
            f"{describe_identity(identity)}: prepare the data again with the same tokenizer"
        )


def describe_identity(identity: Mapping[str, Any]) -> str:
    """A tokenizer's identity in a few words."""
    return (
        f"{identity.get('kind')} ({identity.get('vocab_size')} tokens, "
        f"sha256 {str(identity.get('sha256'))[:12]})"
    )
