"""From prepared data sets to batches: seeded shuffle, mixtures, exact position.

The rows of a batch are a pure function of the config, the global batch size and the number of its
first row in the shuffled order. Each process reads those that its devices hold, so any number of
processes sees the same global batch, and a run resumes by asking for the row that comes next.

A batch is `{"tokens", "targets", "segment_ids"}`, int32 [rows, T]: see ARCHITECTURE.md.
"""

import dataclasses
import itertools
import os
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from mmfree_jax.config import DataConfig
from mmfree_jax.data.dataset import (
    HELDOUT,
    TRAIN,
    Row,
    check_compatible,
    pad_row,
)
from mmfree_jax.data.fetch_ahead import fetch_ahead
from mmfree_jax.data.row_source import RowSource, has_split, open_rows
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.object_cache import shared_cache

Batch = dict[str, np.ndarray]


def open_mixture(config: DataConfig, split: str = TRAIN) -> list[RowSource]:
    """Opens `split` of every folder and task in `config.paths`.

    Raises:
      DataError: no paths, a folder cannot be opened, or tokenizers differ.
    """
    if not config.paths:
        raise DataError(
            "data.paths is empty: give --data.paths FOLDER, made by `mmfree data prepare`"
        )
    cache = shared_cache(config.cache_gib, "data.cache_gib")
    datasets = [open_rows(path, split, cache) for path in config.paths]
    for dataset in datasets[1:]:
        check_compatible(
            dataset, identity=datasets[0].identity, owner=f"data folder {datasets[0].path}"
        )
    return datasets


def make_train_iterator(
    config: DataConfig,
    *,
    batch_size: int,
    padded: int | None = None,
    rows: Sequence[int] | None = None,
    start_row: int = 0,
) -> grain.DatasetIterator[Batch]:
    """Batches of training rows without end, from row `start_row` of the shuffled order on.

    Every epoch has a permutation of its own. Without `config.weights` the folders are
    shuffled together, so that an epoch holds each row once; with weights each folder is
    repeated by itself and rows are interleaved in the given shares (within 1%).

    Args:
      config: folders, weights, row length, seed and prefetch depth.
      batch_size: rows in the global batch.
      padded: rows with those of padding behind them; None: there are none.
      rows: which of them to read and return; None: all.
      start_row: number of the first batch's first row.

    Returns:
      An iterator over dicts of int32 [len(rows), seq_len]; `close()` stops its prefetching
      threads.

    Raises:
      ConfigError: a row lies outside the batch.
      DataError: a folder cannot be read, or is shorter than one row.

    Example:
      >>> from pathlib import Path
      >>> from mmfree_jax.data import PrepareConfig, prepare_dataset
      >>> _ = Path("mine.txt").write_text("We the people of the district say so. " * 20)
      >>> config = PrepareConfig(out="data/second", input=("mine.txt",), heldout_fraction=0.0)
      >>> index, is_new = prepare_dataset(config)
      >>> from mmfree_jax import DataConfig
      >>> from mmfree_jax.data import make_train_iterator
      >>> data = DataConfig(paths=("data/second",), seq_len=16)
      >>> batches = make_train_iterator(data, batch_size=4)
      >>> {name: array.shape for name, array in sorted(next(batches).items())}
      {'segment_ids': (4, 16), 'targets': (4, 16), 'tokens': (4, 16)}
      >>> batches.close()
    """
    mine = _check_rows(max(batch_size, padded or 0), rows)
    datasets = open_mixture(config)
    shuffled = _shuffled_rows(datasets, config)
    _ = shuffled[0]  # grain sets up its statistics on first use, which is not thread-safe
    padding = _padding(config.seq_len)

    def batch_at(i: int) -> Batch:
        first = start_row + i * batch_size
        picks: list[Any] = [shuffled[first + j] for j in mine if j < batch_size]
        found = [datasets[k].row(r, config.seq_len) for k, r in picks]
        return stack_rows(found + [padding] * (len(mine) - len(found)))

    def in_order() -> Iterator[Any]:
        for first in itertools.count(start_row, batch_size):
            yield from (shuffled[first + j] for j in mine)

    stop = fetch_ahead(datasets, in_order(), config.seq_len)
    steps = grain.MapDataset.range((sys.maxsize - start_row) // batch_size - 1).map(batch_at)
    options = grain.ReadOptions(
        num_threads=min(2, config.prefetch), prefetch_buffer_size=config.prefetch
    )
    batches = iter(steps.to_iter_dataset(options))
    weakref.finalize(batches, stop.set)
    return batches


def check_length(dataset: RowSource, seq_len: int) -> None:
    """Refuses a data set that has not one row of `seq_len` tokens.

    Raises:
      DataError: says how long a row may be.
    """
    if dataset.num_rows(seq_len):
        return
    way_out = "prepare more text"
    if dataset.num_tokens > 1:
        way_out = f"set --data.seq-len {dataset.num_tokens - 1} or less, or {way_out}"
    raise DataError(
        f"data folder {dataset.path} has {dataset.num_tokens} tokens in its {dataset.split} "
        f"split, one row takes data.seq_len + 1 = {seq_len + 1}: {way_out}"
    )


def _check_rows(batch_size: int, rows: Sequence[int] | None) -> tuple[int, ...]:
    """The rows to read of each global batch."""
    if batch_size <= 0:
        raise ConfigError(f"batch_size is {batch_size}: set 1 or more")
    rows = range(batch_size) if rows is None else rows
    if not rows or min(rows) < 0 or max(rows) >= batch_size:
        raise ConfigError(f"rows is {rows!r}: name some of 0 to {batch_size - 1}")
    return tuple(rows)


def _shuffled_rows(datasets: Sequence[RowSource], config: DataConfig) -> grain.MapDataset:
    """An endless map from row number to (index into `datasets`, row)."""
    counts = []
    for dataset in datasets:
        check_length(dataset, config.seq_len)
        counts.append(dataset.num_rows(config.seq_len))
    # Grain adds the epoch to the seed: hash it first, so that neighbouring seeds and
    # neighbouring folders do not repeat each other's epochs.
    seeds = np.random.SeedSequence(config.seed % 2**64).generate_state(len(datasets), np.uint32)

    if not config.weights or len(datasets) == 1:
        starts = np.cumsum([0, *counts])

        def locate(i: int) -> tuple[int, int]:
            k = int(np.searchsorted(starts, i, side="right")) - 1
            return k, i - int(starts[k])

        together = grain.MapDataset.range(int(starts[-1]))
        return together.shuffle(seed=int(seeds[0])).repeat().map(locate)

    def of_folder(k: int) -> grain.MapDataset:
        rows = grain.MapDataset.range(counts[k]).shuffle(seed=int(seeds[k])).repeat()
        return rows.map(lambda r: (k, r))

    return grain.MapDataset.mix([of_folder(k) for k in range(len(datasets))], config.weights)


def _padding(seq_len: int) -> Row:
    """A row that weighs nothing."""
    empty = np.zeros(0, np.int32)
    return pad_row({"tokens": empty, "targets": empty, "segment_ids": empty}, seq_len)


def stack_rows(rows: Sequence[Row]) -> Batch:
    """Rows of one length as a batch, int32 [len(rows), T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Source:
    """A folder that held-out rows come from.

    Attributes:
      name: the folder's own; where two have one name, with as many of those above as differ.
      bytes_per_token: mean text bytes per target.
    """

    name: str
    bytes_per_token: float


@dataclass(frozen=True)
class EvalBatches:
    """Held-out batches; iterate as often as needed, always the same.

    Attributes:
      sources: the folders.
      num_batches: batches in one pass.
      num_predicted: targets in one pass, over all processes (tokens).
      bytes_per_token: mean text bytes per target; bits per byte =
        mean nats per target / ln 2 / bytes_per_token.
      identity: the tokenizer's identity.
      batch_size: rows in the global batch.
      rows: those of them that are read here.
    """

    sources: tuple[Source, ...]
    num_batches: int
    num_predicted: int
    bytes_per_token: float
    identity: dict
    batch_size: int
    rows: tuple[int, ...]
    _datasets: tuple[RowSource, ...]
    _picks: tuple[tuple[int, int], ...]
    _seq_len: int

    def __len__(self) -> int:
        return self.num_batches

    def sources_of(self, batch: int) -> np.ndarray:
        """Index into `sources` of each row of the global batch, int [batch_size]; -1: padding."""
        picks = self._picks[batch * self.batch_size : (batch + 1) * self.batch_size]
        found = np.full(self.batch_size, -1)
        found[: len(picks)] = [k for k, _ in picks]
        return found

    def __iter__(self) -> Iterator[Batch]:
        padding = _padding(self._seq_len)
        for b in range(self.num_batches):
            places = [b * self.batch_size + j for j in self.rows]
            picks = [self._picks[i] if i < len(self._picks) else None for i in places]
            rows = [p and self._datasets[p[0]].row(p[1], self._seq_len) for p in picks]
            yield stack_rows([row or padding for row in rows])


def make_eval_batches(
    config: DataConfig,
    *,
    batch_size: int,
    num_batches: int | None = None,
    num_rows: int | None = None,
    split: str = HELDOUT,
    rows: Sequence[int] | None = None,
) -> EvalBatches:
    """Batches of a held-out split, in order and without shuffling.

    If `num_batches` is None or covers the split, every token is a target at most once and
    the last batch is padded. Otherwise rows are taken at even distances across the split,
    which represents it better than its first documents would. Of several folders each gives
    its share of rows (by `config.weights`, else by size), and one at least where there is room;
    folders without the split are left out, unless all are. Folders of one content are one source,
    with the share of all, so that no document is counted twice.

    Args:
      config: folders, weights and row length.
      batch_size: rows in the global batch.
      num_batches: batches at most; None: the whole split.
      num_rows: rows at most, instead; which they are is the same for any batch size.
      split: "heldout" or "train".
      rows: which rows of each global batch to read and return; None: all.

    Raises:
      ConfigError: a row lies outside the batch.
      DataError: no folder has the split, or it cannot be read.
    """
    mine = _check_rows(batch_size, rows)
    if num_batches is not None and num_batches <= 0:
        raise ConfigError(f"num_batches is {num_batches}: set 1 or more")
    having = [i for i, path in enumerate(config.paths) if has_split(path, split)]
    chosen = having or list(range(len(config.paths)))  # none: let open_mixture say so
    paths = tuple(config.paths[i] for i in chosen)
    opened = open_mixture(dataclasses.replace(config, paths=paths, weights=()), split)
    sizes = [d.num_rows(config.seq_len, partial=True) for d in opened]
    every_weight = [config.weights[i] for i in chosen] if config.weights else sizes
    of_content: dict[str, list[int]] = {}
    for i, dataset in enumerate(opened):
        of_content.setdefault(dataset.fingerprint, []).append(i)
    datasets = [opened[alike[0]] for alike in of_content.values()]
    counts = [sizes[alike[0]] for alike in of_content.values()]
    weights = [sum(every_weight[i] for i in alike) for alike in of_content.values()]
    if num_rows is None and num_batches is not None:
        num_rows = num_batches * batch_size
    limit = sum(counts) if num_rows is None else min(sum(counts), num_rows)
    shares = _shares(limit, weights, counts)
    picks = tuple(
        (k, j * counts[k] // share) for k, share in enumerate(shares) for j in range(share)
    )
    predicted = [0] * len(datasets)
    for k, r in picks:
        predicted[k] += datasets[k].predicted_in_row(r, config.seq_len)
    total = sum(predicted)
    if total == 0:
        raise DataError(
            f"the {split} split of {', '.join(paths)} has nothing to predict: prepare more text"
        )
    num_bytes = sum(n * d.bytes_per_token for n, d in zip(predicted, datasets, strict=True))
    names = _distinct_names([str(d.path) for d in datasets])
    return EvalBatches(
        sources=tuple(map(Source, names, [d.bytes_per_token for d in datasets])),
        num_batches=-(-len(picks) // batch_size),
        num_predicted=total,
        bytes_per_token=num_bytes / total,
        identity=datasets[0].identity,
        batch_size=batch_size,
        rows=mine,
        _datasets=tuple(datasets),
        _picks=picks,
        _seq_len=config.seq_len,
    )


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path; where two have one, as many parts as tell them apart."""
    parts = [os.path.abspath(path).split(os.sep) for path in paths]
    lengths = [1] * len(paths)
    for _ in range(max(map(len, parts))):
        names = ["/".join(part[-n:]) for part, n in zip(parts, lengths, strict=True)]
        lengths = [n + (names.count(name) > 1) for name, n in zip(names, lengths, strict=True)]
    return names


def _shares(limit: int, weights: Sequence[float], counts: Sequence[int]) -> list[int]:
    """Splits `limit` rows by weight, none above its count; full ones pass on their rest.

    Each that has rows gives one at least, as far as the limit goes.
    """
    shares = [0] * len(counts)
    left = limit = min(limit, sum(counts))
    while left:
        open_ = [k for k in range(len(counts)) if shares[k] < counts[k]]
        total = sum(weights[k] for k in open_)
        given = {k: min(counts[k] - shares[k], int(left * weights[k] / total)) for k in open_}
        if not any(given.values()):  # less than one row each: to the largest weights first
            order = sorted(open_, key=lambda k: -weights[k])
            given = dict.fromkeys(itertools.islice(order, left), 1)
        for k, n in given.items():
            shares[k] += n
        left = limit - sum(shares)
    for k, count in enumerate(counts):
        largest = max(range(len(counts)), key=shares.__getitem__)
        if count and not shares[k] and shares[largest] > 1:
            shares[largest] -= 1
            shares[k] = 1
    return shares
