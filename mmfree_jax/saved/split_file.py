"""Tensors spread over several files, so that none is larger than some store takes.

The first file is the one that is opened, and has what a file of its own would have. Beside it lie
`NAME-00002-of-00003.safetensors` and so on, with tensors alone. The first names them in its
metadata (`parts`: name -> digest of their header), so that a part of another model, or one that
is damaged or lacking, is found when the first is opened; each tensor has its checksum as ever.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.saved.tensor_file import Reader, tensor_writer
from mmfree_jax.text_files import parse_json

Tensor = tuple[str, tuple[int, ...], Any]

_PARTS = "parts"
_HEADER = 400
"""Bytes of a tensor's entry and checksum in a header, at most."""


def split(tensors: Sequence[Tensor], largest: int | None, room: int) -> list[list[Tensor]]:
    """Tensors in their order, in as few groups as files of `largest` bytes take.

    Args:
      tensors: name, shape and dtype of each.
      largest: bytes of a file; None: one group.
      room: bytes that the last group's file needs beside its tensors, for the metadata.

    Raises:
      ConfigError: a tensor alone is larger.
    """
    sizes = [
        int(np.prod(shape)) * np.dtype(dtype).itemsize + _HEADER for _, shape, dtype in tensors
    ]
    if largest is not None and max(sizes) + room > largest:
        name = tensors[sizes.index(max(sizes))][0]
        raise ConfigError(
            f"max_file_mb is {largest / 1e6:g}: {name} alone has {max(sizes) / 1e6:.1f} MB; set "
            f"--max-file-mb {(max(sizes) + room) / 1e6 + 0.1:.1f} or more, or a smaller --embedding"
        )
    groups: list[list[Tensor]] = [[]]
    filled = room
    for tensor, size in zip(tensors, sizes, strict=True):
        if largest is not None and filled + size > largest:
            groups.append([])
            filled = room
        groups[-1].append(tensor)
        filled += size
    return groups


@contextmanager
def split_writer(
    path: Path,
    groups: Sequence[Sequence[Tensor]],
    *,
    file_format: str,
    version: int,
    metadata: Mapping[str, str],
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """As `tensor_writer`, over as many files as there are groups.

    The first file has the last group: it is written last, as it holds the others' digests.

    Raises:
      OutputError: a file cannot be written.
    """
    *others, last = groups
    names = [_part_name(path, i + 2, len(groups)) for i in range(len(others))]
    digests: dict[str, str] = {}
    pending: list[tuple[Path, Sequence[Tensor], str, Mapping[str, str]]] = [
        (path.with_name(name), group, _part_format(file_format), {})
        for name, group in zip(names, others, strict=True)
    ]
    pending.append((path, last, file_format, metadata))
    open_now = ExitStack()
    write_now: Callable[[str, np.ndarray], None]
    left = 0

    def begin() -> None:
        nonlocal write_now, left
        file, group, kind, more = pending[0]
        if digests and file == path:
            more = {**more, _PARTS: json.dumps(digests)}
        write_now = open_now.enter_context(
            tensor_writer(file, group, file_format=kind, version=version, metadata=more)
        )
        left = len(group)

    def end() -> None:
        open_now.close()
        file, _, kind, _ = pending.pop(0)
        digests[file.name] = Reader(file, file_format=kind, version=version).digest or ""
        begin()

    def write(name: str, array: np.ndarray) -> None:
        nonlocal left
        write_now(name, array)
        left -= 1
        if not left and pending[0][0] != path:
            end()

    try:
        with open_now:  # an error in the block is told by the writer of the file that is open
            begin()
            yield write
    except BaseException:
        for name in names:
            path.with_name(name).unlink(missing_ok=True)
        raise


class SplitReader(Reader):
    """A `Reader` of such files, or of one that is not split."""

    def __init__(self, path: Path, *, file_format: str, version: int) -> None:
        """Reads the headers of all of them.

        Raises:
          CheckpointError: as `Reader`, or a part is another file than was written with the first.
        """
        super().__init__(path, file_format=file_format, version=version)
        self.parts: dict[str, Reader] = {}
        try:
            digests = parse_json(self.metadata.get(_PARTS, "{}"))
            pattern = re.compile(re.escape(path.stem) + r"-\d{5}-of-\d{5}\.safetensors")
            named = {name: digest for name, digest in digests.items() if pattern.fullmatch(name)}
        except (ValueError, AttributeError, TypeError) as e:
            raise CheckpointError(f"{path}: its list of parts is damaged; make it again") from e
        if named != digests:
            raise CheckpointError(f"{path}: its list of parts is damaged; make it again")
        for name, digest in named.items():
            part = Reader(path.with_name(name), file_format=_part_format(file_format),
                          version=version)  # fmt: skip
            if part.digest != digest:
                raise CheckpointError(
                    f"{path.with_name(name)} is not the part that {path.name} was written with: "
                    "copy all files of the model again"
                )
            self.parts[name] = part

    def names(self) -> Iterator[str]:
        """Names of the tensors, in the order in which they were written."""
        for part in self.parts.values():
            yield from part.names()
        yield from super().names()

    def __contains__(self, name: str) -> bool:
        return self._home(name) is not None or super().__contains__(name)

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """As `Reader.read`."""
        home = self._home(name)
        return super().read(name, shape) if home is None else home.read(name, shape)

    def dtype(self, name: str) -> np.dtype:
        """As `Reader.dtype`."""
        home = self._home(name)
        return super().dtype(name) if home is None else home.dtype(name)

    def own_names(self) -> Iterator[str]:
        """Names of the tensors in the first file."""
        return super().names()

    def _home(self, name: str) -> Reader | None:
        return next((part for part in self.parts.values() if name in part), None)


def _part_name(path: Path, number: int, count: int) -> str:
    return f"{path.stem}-{number:05}-of-{count:05}.safetensors"


def _part_format(file_format: str) -> str:
    return f"{file_format}-part"
