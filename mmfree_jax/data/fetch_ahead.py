"""Fetching shards before training comes to them, in the order in which it will.

Rows are shuffled over all shards, so the first batches ask for most of them. Nothing here imports
JAX.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mmfree_jax.data.dataset import TokenDataset
from mmfree_jax.data.row_source import RowSource
from mmfree_jax.data.shards import BucketShards
from mmfree_jax.errors import MMFreeError

AT_ONCE = 4
"""Shards that are fetched at the same time."""


def fetch_ahead(
    datasets: Sequence[RowSource], rows: Iterable[tuple[int, int]], seq_len: int
) -> threading.Event:
    """Begins to fetch the shards of rows that lie in buckets, until the cache is full.

    What fails is left for whoever reads the row, who says so.

    Args:
      datasets: of which rows are read.
      rows: (index into `datasets`, row), in the order of reading.
      seq_len: length of a row (tokens).

    Returns:
      Ends it when it is set.
    """
    stop = threading.Event()
    remote = {
        k: dataset
        for k, dataset in enumerate(datasets)
        if isinstance(dataset, TokenDataset) and isinstance(dataset.open_shard, BucketShards)
    }
    if not remote:
        return stop
    shards, turn = _in_order(remote, rows, seq_len), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with turn:
                found = next(shards, None)
            if found is None:
                return
            try:
                with remote[found[0]].open_shard(found[1]):
                    pass
            except MMFreeError:
                stop.set()

    for _ in range(AT_ONCE):
        threading.Thread(target=work, name="fetch ahead", daemon=True).start()
    return stop


def _in_order(
    remote: Mapping[int, TokenDataset],
    rows: Iterable[tuple[int, int]],
    seq_len: int,
) -> Iterator[tuple[int, int]]:
    """(index into `datasets`, shard), each once, while they fit into the cache together."""
    left = sum(len(dataset.shards) for dataset in remote.values())
    seen: set[tuple[int, int]] = set()
    taken = 0
    for k, row in rows:
        if not left:
            return
        for shard in remote[k].shards_of_row(row, seq_len) if k in remote else ():
            if (k, shard) in seen:
                continue
            seen.add((k, shard))
            left -= 1
            source = remote[k].open_shard
            assert isinstance(source, BucketShards)
            taken += source.size(shard)
            if taken > source.cache.limit:
                return
            yield k, shard
