"""The vocabulary of a model that none is named for: the data's.

A rung of the ladder or a bare shape is sizes of blocks. With `ModelConfig`'s default, 32,000, the
embedding and the head of a small one on bytes would be many times its blocks.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.config import TrainConfig, replace_model
from mmfree_jax.data.dataset import INDEX_NAME, load_index


def gives_vocabulary(values: Mapping[Any, Any]) -> bool:
    """Whether settings of a training config, nested as in YAML, hold `model.vocab_size`."""
    model = values.get("model")
    return isinstance(model, Mapping) and not {"vocab_size", "vocab-size"}.isdisjoint(model)


def data_vocabulary(paths: Sequence[str]) -> int | None:
    """The largest vocabulary of some prepared folders (tokens); None where one is not there.

    Raises:
      DataError: a folder is damaged.
      ConfigError: one is a URL.
    """
    files = [Path(path) / INDEX_NAME for path in paths]
    if not files or not all(file.is_file() for file in files):
        return None
    return max(_vocabulary(file, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=64)
def _vocabulary(index: Path, _changed: int) -> int:
    return int(load_index(index.parent).tokenizer["vocab_size"])


def with_data_vocabulary(config: TrainConfig) -> TrainConfig:
    """`config` with the vocabulary of its data; as it is where they are not there.

    Raises:
      DataError, ConfigError: as `data_vocabulary`.
    """
    size = data_vocabulary(config.data.paths)
    return config if size is None else replace_model(config, vocab_size=size)
