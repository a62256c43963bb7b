"""From prepared data sets to batches: seeded shuffle, mixtures, exact position.

The rows of a batch are a pure function of the config, the global batch size and the number of its
first row in the shuffled order. Each process reads those that its devices hold, so any number of
processes sees the same global batch, and a run resumes by asking for the row that comes next.

A batch is `{"tokens", "targets", "segment_ids"}`, int32 [rows, T]: see ARCHITECTURE.md.
"""

import bisect
import dataclasses
import itertools
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import grain.experimental
import numpy as np

from mmfree_jax.config import DataConfig
from mmfree_jax.data.ahead import Ahead
from mmfree_jax.data.dataset import (
    HELDOUT,
    PADDING,
    TRAIN,
    Row,
    TokenDataset,
    check_compatible,
    read_rows,
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
    place: Callable[[Batch], Any] | None = None,
) -> Ahead[Any]:
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
      place: what is done with each batch ahead, in order and in the prefetching thread, as putting
        it on devices; None: nothing.

    Returns:
      An iterator over dicts of int32 [len(rows), seq_len], or over what `place` makes of them;
      `config.prefetch` are made ahead by a thread, which `close()` ends.

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
    order = _row_order(datasets, config)
    order(0)  # grain sets up its statistics on first use, which is not thread-safe

    def in_order() -> Iterator[tuple[int, int]]:
        for first in itertools.count(start_row, batch_size):
            yield from (order(first + j) for j in mine)

    def batches() -> Iterator[Any]:
        for first in itertools.count(start_row, batch_size):
            picks = [order(first + j) if j < batch_size else None for j in mine]
            batch = _read(datasets, picks, config.seq_len)
            yield batch if place is None else place(batch)

    stop = fetch_ahead(datasets, in_order(), config.seq_len)
    ahead = Ahead(batches(), config.prefetch)
    weakref.finalize(ahead, stop.set)
    return ahead


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


def _row_order(
    datasets: Sequence[RowSource], config: DataConfig
) -> Callable[[int], tuple[int, int]]:
    """An endless map from row number to (index into `datasets`, row)."""
    counts = []
    for dataset in datasets:
        check_length(dataset, config.seq_len)
        counts.append(dataset.num_rows(config.seq_len))
    # The epoch is added to the seed: hash it first, so that neighbouring seeds and
    # neighbouring folders do not repeat each other's epochs.
    seeds = np.random.SeedSequence(config.seed % 2**64).generate_state(len(datasets), np.uint32)

    if not config.weights or len(datasets) == 1:
        *starts, total = itertools.accumulate(counts, initial=0)

        def together(i: int) -> tuple[int, int]:
            row = _shuffled(i, total, int(seeds[0]))
            k = bisect.bisect_right(starts, row) - 1
            return k, row - starts[k]

        return together

    def of_folder(k: int) -> grain.MapDataset:
        return grain.MapDataset.range(sys.maxsize).map(lambda i: (k, i))

    mixed: Any = grain.MapDataset.mix(list(map(of_folder, range(len(datasets)))), config.weights)

    def apart(i: int) -> tuple[int, int]:
        k, place = mixed[i]
        return k, _shuffled(place, counts[k], int(seeds[k]))

    return apart


def _shuffled(i: int, count: int, seed: int) -> int:
    """Place `i` of endless epochs, each a permutation of 0 ... `count` - 1 of its own.

    It is grain's `MapDataset.range(count).shuffle(seed=seed).repeat()[i]` without the layers, of
    which each costs more than the permutation does.
    """
    epoch, place = divmod(i, count)
    return grain.experimental.index_shuffle(
        place, max_index=count - 1, seed=(seed + epoch) % 2**32, rounds=4
    )


def _read(
    datasets: Sequence[RowSource], picks: Sequence[tuple[int, int] | None], seq_len: int
) -> Batch:
    """Rows, each (index into `datasets`, row), as a batch, int32 [len(picks), seq_len].

    None is a row of padding.
    """
    found: list[Any] = [pick and (datasets[pick[0]], pick[1]) for pick in picks]
    if all(pick is None or isinstance(pick[0], TokenDataset) for pick in found):
        return read_rows(found, seq_len)
    padding = {name: np.full(seq_len, fill, np.int32) for name, fill in PADDING.items()}
    return stack_rows([pick[0].row(pick[1], seq_len) if pick else padding for pick in found])


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
        for b in range(self.num_batches):
            places = [b * self.batch_size + j for j in self.rows]
            picks = [self._picks[i] if i < len(self._picks) else None for i in places]
            yield _read(self._datasets, picks, self._seq_len)


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
