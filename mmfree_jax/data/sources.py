"""Reading documents out of text, JSON-lines, Parquet and Arrow files, as a stream.

Files are read record by record; only a batch of about a mebibyte is held. What a record is:
a `.txt` file, or a part of one between separators; a line of a `.jsonl`; a row of a table.
Nothing here imports JAX.
"""

import codecs
import gzip
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mmfree_jax.data.bucket_inputs import local_file
from mmfree_jax.data.tables import arrow_rows, parquet_rows
from mmfree_jax.data.text_split import split_text
from mmfree_jax.errors import DataError
from mmfree_jax.storage import Url
from mmfree_jax.text_files import LONGEST_MARK, find_encoding, open_file, unmarked_encoding

BATCH_BYTES = 2**20
BATCH_RECORDS = 4096
_BLOCK = 2**17
_TEXT, _LINES = (".txt",), (".jsonl", ".ndjson")
_COMPRESSED = ("", ".gz", ".zst")
_PARQUET, _ARROW = ".parquet", ".arrow"
SUFFIXES = (*(s + c for s in _TEXT + _LINES for c in _COMPRESSED), _PARQUET, _ARROW)
_POINTER = b"version https://git-lfs.github.com/spec/"
_ZSTD_WINDOW = 2**31


@dataclass(frozen=True)
class ReadOptions:
    """How files become documents."""

    txt_separator: str | None = None
    """Cuts `.txt` files into documents; None: a file is a document."""
    max_document_bytes: int = 2**22
    """Longer documents are cut into several, at a line end if there is one (bytes)."""


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    path: Path | Url
    """Of this machine, or in a bucket."""
    text_field: str = "text"
    """Field or column that holds a document's text; "a.b" is that field, else b in a."""
    place: int = 0
    """Which of the inputs it comes from."""


@dataclass
class RecordBatch:
    """Some records of one file, as they were read."""

    file: str
    """Path of the file."""
    kind: str
    """"text" (UTF-8 bytes of documents), "json" (lines) or "row" (strings or None)."""
    first: int
    """Number of the first record in the file, from 0."""
    records: list[Any] = field(default_factory=list)
    """The records."""
    size: int = 0
    """Roughly their size (bytes)."""
    position: int = 0
    """How far the file has been read (bytes on disk)."""
    cut: int = 0
    """Records that are parts of a document that was too long."""
    separators: int = 0
    """Records that end at a separator."""
    text_field: str = "text"
    """Field of a JSON line that holds the text."""
    place: int = 0
    """Which of the inputs the file comes from."""


def is_plain_text(path: Path | Url) -> bool:
    """Whether a file is text, which a separator may cut, and not a table or lines of JSON."""
    return path.name.removesuffix(".gz").removesuffix(".zst").endswith(_TEXT)


def read_batches(file: InputFile, options: ReadOptions, start: int = 0) -> Iterator[RecordBatch]:
    """The records of a file from number `start` on, in batches.

    Raises:
      DataError: the file cannot be read or is damaged; the message names it.
      StorageError, OutputError: as `local_file`.
    """
    with local_file(file.path) as path:
        yield from _read_batches(path, file, options, start)


def _read_batches(
    path: Path, file: InputFile, options: ReadOptions, start: int
) -> Iterator[RecordBatch]:
    name = str(file.path)
    records: Iterator[tuple[bytes | str | None, int, str]]
    try:
        _refuse_pointer(path)
        if name.endswith(_PARQUET):
            records = ((*row, "") for row in parquet_rows(path, file.text_field, start))
            kind = "row"
        elif name.endswith(_ARROW):
            records = ((*row, "") for row in arrow_rows(path, file.text_field, start))
            kind = "row"
        else:
            kind = "text" if is_plain_text(path) else "json"
            records = _byte_records(path, options, start, kind == "text")
        batch = RecordBatch(name, kind, start, text_field=file.text_field, place=file.place)
        for record, position, end in records:
            batch.records.append(record)
            batch.size += len(record or "")
            batch.position = position
            batch.cut += end == "cut"
            batch.separators += end == "separator"
            if batch.size >= BATCH_BYTES or len(batch.records) >= BATCH_RECORDS:
                yield batch
                first = batch.first + len(batch.records)
                batch = RecordBatch(name, kind, first, text_field=file.text_field, place=file.place)
        if batch.records:
            yield batch
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or e}; make it a readable file") from e


def _refuse_pointer(path: Path) -> None:
    """A clone without Git LFS holds a few lines of text in place of a file."""
    if path.stat().st_size < 1024:
        with open_file(path) as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise DataError(
                    f"{path} is a Git LFS pointer, not the file: run git lfs pull in its clone"
                )


def _byte_records(
    file: Path, options: ReadOptions, start: int, is_text: bool
) -> Iterator[tuple[bytes, int, str]]:
    with open_file(file) as raw:
        blocks = _as_utf8(_blocks(raw, file), file)
        records: Iterator[tuple[bytes, str]]
        if is_text:
            records = split_text(blocks, options.txt_separator, options.max_document_bytes)
        else:
            records = ((line, "") for line in _lines(blocks))
        for number, (record, end) in enumerate(records):
            if number >= start:
                yield record, raw.tell(), end


def _as_utf8(blocks: Iterator[bytes], file: Path) -> Iterator[bytes]:
    """Blocks of a text without its byte-order mark, and as UTF-8 if that says another encoding."""
    first = b""
    for block in blocks:
        first += block
        if len(first) >= LONGEST_MARK:
            break
    encoding, mark = find_encoding(first[:LONGEST_MARK])
    if not mark and (unmarked := unmarked_encoding(first)):
        raise DataError(
            f"{file} is {unmarked} without a byte-order mark, or no text: convert it to UTF-8"
        )
    blocks = itertools.chain([first[mark:]], blocks)
    if encoding == "utf-8":
        yield from blocks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        for block in blocks:
            yield decoder.decode(block).encode()
        decoder.decode(b"", final=True)
    except UnicodeError as e:
        raise DataError(
            f"{file} begins with the mark of {encoding.upper()} and is not whole text of it "
            f"({e.args[-1]}): convert it to UTF-8"
        ) from e


def _blocks(raw: BinaryIO, file: Path) -> Iterator[bytes]:
    """The contents of a file, decompressed by its suffix, in blocks."""
    if file.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as stream:
            try:
                while block := stream.read(_BLOCK):
                    yield block
            except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                raise DataError(f"{file} is not whole gzip data ({e}): fetch it again") from e
    elif file.suffix == ".zst":
        yield from _zstd_blocks(raw, file)
    else:
        while block := raw.read(2**20):
            yield block


def _zstd_blocks(raw: BinaryIO, file: Path) -> Iterator[bytes]:
    import zstandard

    # `stream_reader` would end without a word where a file was cut short.
    # Frames of `zstd --long=31` refer back by up to 2 GiB; memory is used as the data needs it.
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame, started = decompressor.decompressobj(), False
    try:
        while block := raw.read(_BLOCK):
            while block:
                started = True
                if data := frame.decompress(block):
                    yield data
                block = b""
                if frame.eof:
                    block = frame.unused_data
                    frame, started = decompressor.decompressobj(), False
    except (zstandard.ZstdError, MemoryError) as e:
        if "dictionary" in str(e).lower():
            raise DataError(
                f"{file} was compressed with a dictionary ({e}): compress it without one"
            ) from e
        if isinstance(e, MemoryError) or "memory" in str(e):
            raise DataError(
                f"{file} needs more memory to decompress than there is or than zstd allows (a "
                f"window of at most {_ZSTD_WINDOW >> 20} MiB; {e}): compress it with a smaller "
                "--long"
            ) from e
        raise DataError(f"{file} is not whole zstd data ({e}): fetch it again") from e
    if started:
        raise DataError(f"{file} is not whole zstd data (it ends too early): fetch it again")


def _lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        *lines, last = block.split(b"\n")
        for line in lines:
            yield b"".join([*rest, line])
            rest = []
        rest.append(last)
    if line := b"".join(rest):
        yield line
