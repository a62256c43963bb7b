"""The vocabulary of a model that none is named for: the data's.

A rung of the ladder or a bare shape is sizes of blocks. With `ModelConfig`'s default, 32,000, the
embedding and the head of a small one on bytes would be many times its blocks.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.data.dataset_index import INDEX_NAME, load_index
from mmfree_jax.data.mqar import is_mqar, parse_mqar
from mmfree_jax.places import locate
from mmfree_jax.storage import Url


def gives_vocabulary(values: Mapping[Any, Any]) -> bool:
    """Whether settings of a training config, nested as in YAML, hold `model.vocab_size`."""
    model = values.get("model")
    return isinstance(model, Mapping) and not {"vocab_size", "vocab-size"}.isdisjoint(model)


def data_vocabulary(paths: Sequence[str]) -> int | None:
    """The largest vocabulary of some `data.paths` (tokens); None where a folder is not there.

    Raises:
      DataError: a folder is damaged.
      ConfigError: one is a URL of what is no bucket, or a malformed task.
      StorageError: a bucket cannot be read.
    """
    sizes = [
        parse_mqar(path).vocab if is_mqar(path) else _vocabulary(locate(path, "data folder"))
        for path in paths
    ]
    return max((size or 0 for size in sizes), default=None) if all(sizes) else None


def _vocabulary(folder: Path | Url) -> int | None:
    """That of one prepared folder; None: it is not there."""
    if isinstance(folder, Url):
        return _read(folder, None)
    file = folder / INDEX_NAME
    return _read(folder, file.stat().st_mtime_ns) if file.is_file() else None


@functools.lru_cache(maxsize=64)
def _read(folder: Path | Url, _changed: int | None) -> int:
    return int(load_index(str(folder)).tokenizer["vocab_size"])


def with_data_vocabulary(config: TrainConfig) -> TrainConfig:
    """`config` with the vocabulary of its data; as it is where they are not there.

    Raises:
      DataError, ConfigError: as `data_vocabulary`.
    """
    size = data_vocabulary(config.data.paths)
    return config if size is None else replace_model(config, vocab_size=size)
