"""Tables as they lie in files: CSV and parquet, cells as numbers, rows by a condition."""

import csv
import gzip
import io
import operator
import re
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.text_files import LARGEST, decode_text, open_file, read_bytes

Table = dict[str, list]
_MISSING = {"", "na", "nan", "none", "null", "n/a", "-"}


def read_file(path: Path) -> Table:
    """Column -> cells of a CSV (comma, tab or semicolon; .gz too) or parquet file.

    Raises:
        ScalingError: the file is damaged, or holds no row.
    """
    table = _parquet(path) if path.suffix in (".parquet", ".pq") else _csv(path)
    if not table or not len(next(iter(table.values()))):
        raise ScalingError(f"{path}: holds no runs")
    return table


def _csv(path: Path) -> Table:
    try:
        data = read_bytes(path)
        text = decode_text(_decompress(data) if path.suffix == ".gz" else data)
    except UnicodeDecodeError:
        raise ScalingError(f"{path}: is not UTF-8 text; save it as UTF-8 CSV") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ScalingError(f"{path}: cannot be read ({reason}); give a whole file") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(lines) < 2:
        raise ScalingError(f"{path}: holds {len(lines)} lines; a header and at least one run are "
                           "needed")  # fmt: skip
    delimiter = max(",\t;", key=lines[0].count)
    try:
        rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise ScalingError(f"{path}: is no CSV ({error}); save it anew") from None
    header = [name.strip() for name in rows[0]]
    _refuse_doubled(header, path)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(header):
            raise ScalingError(f"{path}: row {number} has {len(row)} fields where the header has "
                               f"{len(header)}")  # fmt: skip
    return {name: [row[j].strip() for row in rows[1:]] for j, name in enumerate(header)}


def _decompress(data: bytes) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        text = stream.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise OSError(f"more than {LARGEST >> 20} MiB of text")
    return text


def _refuse_doubled(header: list[str], path: Path) -> None:
    doubled = {name for name in header if name and header.count(name) > 1}
    if doubled:
        raise ScalingError(f"{path}: column {sorted(doubled)[0]!r} occurs twice; rename one")


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        open_file(path).close()  # the library would wait for ever for a pipe
        _refuse_doubled(pq.read_schema(path).names, path)
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ScalingError(f"{path}: is not a readable parquet file ({error})") from None
    return {name: table.column(name).to_pylist() for name in table.column_names}


def numbers(values: list, path: Path, column: str) -> np.ndarray:
    """Cells as numbers [n], NaN for what stands for nothing.

    Raises:
        ScalingError: a cell is no number; the message names its column and row.
    """
    out = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if value is None or (isinstance(value, str) and value.lower() in _MISSING):
            continue
        try:
            out[row] = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ScalingError(
                f"{path}: column {column!r}, row {row + 2}: {str(value)[:100]!r} is not a number; "
                "counts are written raw, such as 1.3e9"
            ) from None
    return out


_FILTER = re.compile(r"^\s*(.+?)\s*(<=|>=|!=|==|=|<|>)\s*(.+?)\s*$")
_OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
              "=": operator.eq, "==": operator.eq, "!=": operator.ne}  # fmt: skip


def rows_where(table: Table, conditions: Iterable[str], path: Path) -> tuple[np.ndarray, list[str]]:
    """Rows that satisfy all conditions such as `loss < 3.5` or `family = mmfree`."""
    rows = len(next(iter(table.values())))
    keep, notes = np.ones(rows, bool), []
    for condition in conditions:
        match = _FILTER.match(condition)
        if not match:
            raise ScalingError(f"where: {condition!r} is not 'column < value' (also <= > >= = !=)")
        name, sign, value = match.groups()
        if name not in table:
            raise ScalingError(f"where: {path} has no column {name!r}; it has "
                               f"{', '.join(map(repr, table))}")  # fmt: skip
        try:
            number = float(value)
            column = numbers(table[name], path, name)
            hit = _OPERATORS[sign](column, number)
        except (ValueError, ScalingError):
            if sign not in ("=", "==", "!="):
                raise ScalingError(f"where: {condition!r} orders words; only = and != do") from None
            hit = _OPERATORS[sign](np.array([str(v) for v in table[name]]), value)
        keep &= hit
        notes.append(f"{path.name}: {int((~hit).sum())} of {rows} rows do not satisfy "
                     f"{condition.strip()!r}: left out")  # fmt: skip
    return keep, notes
