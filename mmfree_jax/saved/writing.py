"""Writing safetensors files, and folders that appear whole or not at all."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mmfree_jax.errors import ConfigError

# Largest file of a written folder (bytes); further tensors go to the next one.
SHARD_BYTES = 5_000_000_000


def write_tensors(
    folder: Path,
    tensors: Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]],
    *,
    itemsize: int,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes safetensors files into `folder`, one of at most `shard_bytes` at a time in memory.

    Args:
      folder: exists.
      tensors: names, shapes, and functions that make the values.
      itemsize: bytes of one value.
      stem: of the file names.
      shard_bytes: most bytes in one file.
    """
    shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
    used = total = 0
    for name, shape, make in tensors:
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append((name, make))
        used += size
        total += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {key: np.ascontiguousarray(make()) for key, make in shard}
        # Readers of the PyTorch side ask for this mark.
        save_file(values, str(folder / name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
        del values
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `path` to write into, which becomes `path` when all went well.

    Raises:
      ConfigError: `path` exists and holds something, and `overwrite` is off.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not overwrite):
        raise ConfigError(f"{path} exists already: choose another folder, or pass --overwrite")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.rglob("*"):
            if file.is_file():
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.is_dir():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written ({e.strerror or e})") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
