"""A model in safetensors files as other packages lay them out."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfree_jax.files import write_text
from mmfree_jax.saved.tensor_file import tensor_writer

# Largest file of a written folder (bytes); further tensors go to the next one.
SHARD_BYTES = 5_000_000_000


class StoredTensor(NamedTuple):
    """A tensor to write: its name, shape and dtype, and the function that makes its values."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]


def write_tensors(
    folder: Path,
    tensors: Iterable[StoredTensor],
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes safetensors files into `folder`, one tensor at a time in memory.

    Args:
      folder: exists.
      tensors: to write, in this order.
      stem: of the file names.
      shard_bytes: most bytes in one file.
    """
    shards: list[list[StoredTensor]] = [[]]
    used = total = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
        total += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        layout = [(tensor.name, tensor.shape, tensor.dtype) for tensor in shard]
        # Readers of the PyTorch side ask for this mark.
        with tensor_writer(folder / name, layout, file_format="pt", version=None) as write:
            for tensor in shard:
                write(tensor.name, tensor.make())
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        write_text(folder / f"{stem}.safetensors.index.json", text)
