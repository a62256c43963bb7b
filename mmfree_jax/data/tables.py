"""Rows of Parquet and Arrow files: one column of text, at the top or inside structures."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfree_jax.errors import DataError
from mmfree_jax.text_files import open_file

Row = tuple[str | bytes | None, int]
"""A text, or bytes that are none, and how far the file has been read (bytes)."""


def parquet_rows(file: Path, column: str, start: int) -> Iterator[Row]:
    """The texts of a Parquet file from row `start` on.

    Raises:
      DataError: it is damaged, or `column` is missing, there twice or no text.
    """
    import pyarrow.parquet as pq

    open_file(file).close()  # the library would wait for ever for a pipe
    size = file.stat().st_size
    try:
        with pq.ParquetFile(file, memory_map=True, pre_buffer=False) as table:
            path = _find_column(file, table.schema_arrow, column)
            total, first = table.metadata.num_rows, 0
            for group in range(table.metadata.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if first + rows > start:
                    number = first
                    for batch in table.iter_batches(
                        batch_size=64, row_groups=[group], columns=[column], use_threads=False
                    ):
                        for text in _column(batch, path):
                            number += 1
                            if number > start:
                                yield _text(text), size * number // total
                first += rows
    except _damages() as e:
        raise _not_whole(file, "a whole Parquet file", e) from e


def arrow_rows(file: Path, column: str, start: int) -> Iterator[Row]:
    """The texts of an Arrow file from row `start` on.

    Raises:
      DataError: it is damaged, or `column` is missing, there twice or no text.
    """
    import pyarrow as pa

    open_file(file).close()  # likewise
    try:
        with pa.memory_map(str(file)) as source:
            # Hugging Face writes the stream format; other tools the file format.
            magic = source.read(6)
            source.seek(0)
            if magic == b"ARROW1":
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(source)
                batches = iter(reader)
            path = _find_column(file, reader.schema, column)
            size, number = source.size(), 0
            for batch in batches:
                rows = batch.num_rows
                if number + rows > start:
                    skip = max(0, start - number)
                    values = _column(batch, path)
                    _check_offsets(values)
                    position = source.tell() if magic != b"ARROW1" else size
                    for i in range(skip, rows):
                        yield _text(values[i]), position
                number += rows
    except _damages() as e:
        raise _not_whole(file, "a whole Arrow file", e) from e


def _damages() -> tuple[type[Exception], ...]:
    """What the library raises of a damaged file; UnicodeDecodeError of a column's name."""
    import pyarrow as pa

    return pa.ArrowException, UnicodeDecodeError, OSError


def _not_whole(file: Path, what: str, e: Exception) -> Exception:
    """The error of a damaged file; `e` itself where the disk failed, which has a number."""
    if isinstance(e, OSError) and e.errno is not None:
        return e
    return DataError(f"{file} is not {what} ({e}): fetch it again")


def _check_offsets(values: Any) -> None:
    """Refuses texts that lie outside of the file, of which the library would end the process.

    Raises:
      ArrowInvalid: there are some.
    """
    import pyarrow as pa

    # As bytes: which texts are not UTF-8 is looked at one by one.
    if pa.types.is_string(values.type):
        values = values.view(pa.binary())
    elif pa.types.is_large_string(values.type):
        values = values.view(pa.large_binary())
    values.validate(full=True)


def _text(value: Any) -> str | bytes | None:
    """A text of a column; its bytes where they are not UTF-8, which Arrow does not look at."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return getattr(value, "value", value).as_buffer().to_pybytes()


def _column(batch: Any, path: list[str]) -> Any:
    """The array at `path` in a batch; null where a structure around it is."""
    import pyarrow.compute as pc

    values = batch.column(batch.schema.get_field_index(path[0]))
    return pc.struct_field(values, path[1:]) if path[1:] else values  # type: ignore[attr-defined]


def _find_column(file: Path, schema: Any, column: str) -> list[str]:
    """The names that lead to a column of text: "a.b" is that column, else b in a."""
    import pyarrow as pa

    found = _look_up(file, list(schema), column)
    if found is None:
        raise DataError(
            f"{file} has no column {column!r} (it has: {', '.join(schema.names)}): set --text-field"
        )
    path, kind = found
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or str(kind) == "string_view"
    ):
        raise DataError(f"{file}: column {column!r} holds {kind}, not text: set --text-field")
    return path


def _look_up(file: Path, fields: list[Any], column: str) -> tuple[list[str], Any] | None:
    import pyarrow as pa

    for head, rest in split_name(column):
        named = [field for field in fields if field.name == head]
        if len(named) > 1:
            raise DataError(
                f"{file}: column {head!r} occurs {len(named)} times: rename all but one"
            )
        if not named:
            continue
        kind = named[0].type
        if not rest:
            return [head], kind
        if pa.types.is_struct(kind):
            inner = _look_up(file, [kind.field(i) for i in range(kind.num_fields)], rest)
            if inner is not None:
                return [head, *inner[0]], inner[1]
    return None


def split_name(field: str) -> Iterator[tuple[str, str]]:
    """The ways to read a field's name: whole, then cut at each dot from the last to the first."""
    yield field, ""
    stop = field.rfind(".")
    while stop > 0:
        yield field[:stop], field[stop + 1 :]
        stop = field.rfind(".", 0, stop)
