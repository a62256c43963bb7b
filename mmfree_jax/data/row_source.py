"""What the rows of a batch come from: a prepared data set, or a task that makes them.

`data.paths` names either. What needs documents or text opens a data set (`open_dataset`).
Nothing here imports JAX.
"""

import os
from pathlib import Path
from typing import Any, Protocol

from mmfree_jax.data.dataset import TRAIN, Row, open_dataset
from mmfree_jax.data.dataset_index import load_index
from mmfree_jax.data.mqar import MqarRows, is_mqar, parse_mqar
from mmfree_jax.object_cache import ObjectCache
from mmfree_jax.storage import Url


class RowSource(Protocol):
    """One split, read by rows."""

    split: str
    num_tokens: int
    vocab_size: int
    identity: dict[str, Any]

    @property
    def path(self) -> Path | Url | str:
        """The folder, its URL, or the task as text."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 that stands for what the rows hold (hex)."""
        ...

    @property
    def bytes_per_token(self) -> float:
        """Text bytes for each target; 0: not known."""
        ...

    def num_rows(self, seq_len: int, *, partial: bool = False) -> int:
        """As `TokenDataset.num_rows`."""
        ...

    def row(self, r: int, seq_len: int) -> Row:
        """As `TokenDataset.row`."""
        ...

    def predicted_in_row(self, r: int, seq_len: int) -> int:
        """As `TokenDataset.predicted_in_row`."""
        ...


def open_rows(
    path: str | os.PathLike[str], split: str = TRAIN, cache: ObjectCache | None = None
) -> RowSource:
    """Opens one split of what a path of `data.paths` names.

    Raises:
      ConfigError: it is a malformed task.
      DataError: as `open_dataset`.
    """
    if is_mqar(path):
        return MqarRows(parse_mqar(str(path)), split)
    return open_dataset(path, split, cache)


def has_split(path: str | os.PathLike[str], split: str) -> bool:
    """Whether what a path names has a split of that name.

    Raises:
      DataError: as `load_index`.
    """
    return is_mqar(path) or bool(load_index(path).splits.get(split))
