"""Safetensors files written tensor by tensor, with a version and a checksum for each tensor.

Any safetensors reader opens them. The metadata holds `format`, `version`, what the writer
adds, `sha256:<tensor>` for each tensor and `sha256` of the header itself. The file appears under
its name only when whole. Files for other packages have what the writer adds alone.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mmfree_jax.errors import CheckpointError
from mmfree_jax.files import open_atomically, sha256
from mmfree_jax.json_shape import digest
from mmfree_jax.text_files import open_file, parse_json

_DTYPES = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHECKSUM = "sha256:"
_SELF = "sha256"
_LARGEST_HEADER = 100 * 2**20


@contextlib.contextmanager
def tensor_writer(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], Any]],
    *,
    file_format: str,
    version: int | None,
    metadata: Mapping[str, str] | None = None,
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Gives a function that writes the next tensor, by its name.

    Args:
      path: of the file, which appears when the block ends without an error.
      tensors: name, shape and dtype of each, in the order in which they will be written.
      file_format: what the file is.
      version: of that format; None: neither a version nor checksums, for other packages.
      metadata: more to store.

    Raises:
      OutputError: the file cannot be written.
    """
    pending = [(name, shape, np.dtype(dtype)) for name, shape, dtype in tensors]
    stored = {"format": file_format, **(metadata or {})}
    if version is not None:
        stored |= {"version": str(version), _SELF: "0" * 64}
        stored |= {_CHECKSUM + name: "0" * 64 for name, _, _ in pending}
    entries: dict[str, Any] = {}
    end = 0
    for name, shape, dtype in pending:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }

    def header() -> bytes:
        text = json.dumps({"__metadata__": stored, **entries}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    with open_atomically(path) as file:
        file.write(header())

        def write(name: str, array: np.ndarray) -> None:
            expected, shape, dtype = pending.pop(0)
            assert (name, array.shape, array.dtype) == (expected, shape, dtype), (name, expected)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            if version is not None:
                stored[_CHECKSUM + name] = sha256(data)
            file.write(data)

        yield write
        assert not pending, pending[0]
        if version is not None:
            del stored[_SELF]
            stored[_SELF] = digest({"__metadata__": stored, **entries})
        file.seek(0)
        file.write(header())


class _Entry(NamedTuple):
    """Where a tensor lies in the file (bytes behind the header)."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def _entry(value: Any) -> _Entry:
    """A tensor's entry in the header.

    Raises:
      ValueError, KeyError, TypeError: it is malformed.
    """
    shape, (start, end) = tuple(value["shape"]), value["data_offsets"]
    dtype = _DTYPES[value["dtype"]]
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise ValueError("a size or an offset is no whole number")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("the offsets do not fit the shape")
    return _Entry(dtype, shape, start, end)


class Reader:
    """Opens such a file and reads its tensors one at a time, checking each.

    Attributes:
      metadata: what the writer added.
      version: of the file's format.
      digest: of the header, and so of every tensor; None in files of older versions.
    """

    def __init__(self, path: Path, *, file_format: str, version: int) -> None:
        """Reads the header.

        Raises:
          CheckpointError: the file is missing, truncated, of another format or too new.
        """
        self._path = path
        self._what = f"{file_format} file {path}"
        try:
            with open_file(path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                text = file.read(length) if length <= _LARGEST_HEADER else b""
        except OSError as e:
            raise CheckpointError(f"{self._what}: {e.strerror}; give a readable file") from e
        try:
            header = parse_json(text)
            own = header["__metadata__"].pop(_SELF, None)  # files of older versions have none
            intact = own in (None, digest(header))
            self.metadata: dict[str, str] = header.pop("__metadata__")
            self._entries = {name: _entry(value) for name, value in header.items()}
            found, self.version = self.metadata["format"], int(self.metadata["version"])
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(
                f"{self._what} has no readable header: it is damaged, or not a {file_format} file"
            ) from e
        if found != file_format:
            raise CheckpointError(f"{path} is a {found!r} file: give a {file_format!r} file")
        if self.version > version:
            raise CheckpointError(
                f"{self._what} has version {self.version}: this program reads up to {version}; "
                "install a newer mmfree-jax"
            )
        if not intact:
            raise CheckpointError(
                f"{self._what}: its header does not match its checksum; copy or make it again"
            )
        self.digest: str | None = own
        self._start = 8 + length
        end = self._start + max((entry.end for entry in self._entries.values()), default=0)
        if size != end:
            raise CheckpointError(
                f"{self._what} has {size} bytes, not {end}: it is truncated or damaged; copy or "
                "make it again"
            )

    def names(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._entries)

    def tensors(self) -> list[tuple[str, tuple[int, ...], np.dtype]]:
        """Name, shape and dtype of each, in the order in which they lie."""
        return [(name, entry.shape, entry.dtype) for name, entry in self._entries.items()]

    @property
    def written(self) -> dict[str, str]:
        """Of the metadata what `tensor_writer` was given to store."""
        own = ("format", "version")
        return {
            name: text
            for name, text in self.metadata.items()
            if name not in own and not name.startswith(_CHECKSUM)
        }

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor, of which nothing is read.

        Raises:
          CheckpointError: it is missing.
        """
        return self._entry_of(name).dtype

    def _entry_of(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self._what} has no tensor {name}: make it again")
        return self._entries[name]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """One tensor, after its checksum was compared.

        Args:
          name: of the tensor.
          shape: that it must have; None: any.

        Raises:
          CheckpointError: it is missing, of another shape, or damaged.
        """
        entry = self._entry_of(name)
        if shape not in (None, entry.shape):
            raise CheckpointError(
                f"{self._what}: {name} has shape {entry.shape}, not {shape}: it is of another "
                "model, or damaged"
            )
        with self._path.open("rb") as file:
            file.seek(self._start + entry.start)
            data = bytearray(entry.end - entry.start)
            file.readinto(data)
        if sha256(data) != self.metadata.get(_CHECKSUM + name):
            raise CheckpointError(
                f"{self._what}: {name} does not match its checksum; copy or make the file again"
            )
        return np.frombuffer(data, entry.dtype).reshape(entry.shape)
