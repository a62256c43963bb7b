"""The results table: one CSV, one row a finished run, written whole under a lock.

Several processes and hosts may append at once: each takes the lock beside the file, reads it,
writes the longer one beside it and renames it into place, so that a reader never sees half a
row and a crash never costs one. In a bucket each reads it and replaces it on the condition that
it is still the one that was read; who comes second reads anew.
"""

import csv
import io
import math
import random
import re
import time
from pathlib import Path

from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.files import lock, write_text
from mmfree_jax.readable import brief
from mmfree_jax.storage import ChangedError, Url, create, find_object, read_bytes, replace
from mmfree_jax.text_files import decode_text, read_text

RESULTS = "results.csv"
COLUMNS: tuple[str, ...] = (
    "run", "family", "size", "params", "params_non_embedding", "params_ternary", "tokens", "steps",
    "flops", "budget", "learning_rate", "seed", "loss", "bits_per_byte", "train_loss",
    "tokens_per_s", "mfu", "train_s", "wall_s", "parallel", "device", "device_count", "host",
    "code", "jax", "config_hash", "data_fingerprint", "finished_at", "batch_size", "b2",
    "weight_decay", "warmup_steps", "trunk", "trunk_tokens",
)  # fmt: skip
"""`mmfree fit` finds params, params_non_embedding, params_ternary, tokens, flops, budget, loss,
family, seed and run by these names. train_s: time in the trainer over all its restarts, wall_s:
time of the process that finished the run (seconds); parallel: runs that could share the device;
code: git commit ("+" if files differ from it) or package version; trunk: the run whose checkpoint
it went on from, trunk_tokens: how many of its tokens that one trained ("" without)."""

LATER = ("batch_size", "b2", "weight_decay", "warmup_steps", "trunk", "trunk_tokens")
"""Columns that older tables lack: "" in their rows."""

_WHOLE = (
    "params", "params_non_embedding", "params_ternary", "tokens", "steps", "seed", "parallel",
    "device_count", "batch_size", "warmup_steps", "trunk_tokens",
)  # fmt: skip
_LOSSES = ("loss", "bits_per_byte", "train_loss")
"""A run that diverged has none that is finite."""
_NUMBERS = (
    "flops", "budget", "learning_rate", "tokens_per_s", "mfu", "train_s", "wall_s", "b2",
    "weight_decay",
)  # fmt: skip
_NEEDED = ("run", "family", "size", "params_non_embedding", "tokens", "flops", "learning_rate",
           "seed", "loss")  # fmt: skip
"""Columns without an empty cell."""

Row = dict[str, str]


def own_tokens(row: Row) -> float:
    """Tokens that a run trained itself, without those of its trunk."""
    return float(row["tokens"]) - float(row.get("trunk_tokens") or 0)


def read_results(out: Path) -> list[Row]:
    """Rows of the table in `out`, in order of finishing; none if there is no table yet.

    Raises:
      SweepError: the file is not such a table, or a cell is none that a run can have.
    """
    rows = _read(out / RESULTS)
    _check_cells(rows, out / RESULTS)
    return rows


def _read(path: Path) -> list[Row]:
    """Rows of a table as they are."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as e:
        raise SweepError(f"{path} cannot be read ({e}); restore it or move it away") from e
    return _rows(text, path)


def _rows(text: str, path: Path | Url) -> list[Row]:
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error as e:
        raise SweepError(f"{path} is no CSV ({e}); restore it or move it away") from e
    header = lines[0] if lines else []
    if header != [column for column in COLUMNS if column in header or column not in LATER]:
        raise SweepError(f"{path} has other columns than this version writes: move it away")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise SweepError(f"{path}, line {number} has {len(line)} fields, not {len(header)}: "
                             "restore the file or delete the line")  # fmt: skip
    empty = dict.fromkeys(COLUMNS, "")
    return [empty | dict(zip(header, line, strict=True)) for line in lines[1:]]


def _check_cells(rows: list[Row], path: Path) -> None:
    """Refuses what no run can have written: somebody may have edited the file."""
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        for column in COLUMNS:
            if wrong := _wrong_cell(column, row[column]):
                raise SweepError(f"{path}, line {number}: {column} is {brief(row[column])}, "
                                 f"{wrong}: restore the file")  # fmt: skip
        if (before := seen.setdefault(row["run"], number)) != number:
            raise SweepError(f"{path}, line {number} is run {brief(row['run'])} again, as line "
                             f"{before}: delete one of them")  # fmt: skip


def _wrong_cell(column: str, text: str) -> str | None:
    """What is wrong with a cell, which somebody may have edited; None: nothing."""
    if not text:
        return "not given" if column in _NEEDED else None
    if column in _WHOLE:
        return None if re.fullmatch("[0-9]+", text) else "not a whole number"
    if column not in (*_LOSSES, *_NUMBERS):
        return None
    try:
        value = float(text)
    except ValueError:
        return "not a number"
    if value < 0:
        return "below 0"
    return None if column in _LOSSES or math.isfinite(value) else "not finite"


def append_result(out: Path | Url, row: Row) -> None:
    """Adds one row; one of the same run and config that is there already stays as it is.

    Raises:
      SweepError: the table holds the run with another config.
      OutputError: it cannot be written.
      StorageError: the bucket refuses, or cannot be reached.
    """
    if tuple(row) != COLUMNS:
        raise SweepError(f"row has columns {list(row)}, the table {list(COLUMNS)}")
    if isinstance(out, Url):
        while not _append_object(out / RESULTS, row):
            time.sleep(random.random())  # others write it at the same time
        return
    path = out / RESULTS
    with lock(out / f".{RESULTS}.lock", str(path), wait=True):
        # Whatever is wrong with another run's row, this one is kept.
        if (text := _with_row(_read(path), row, path)) is not None:
            write_text(path, text)


def _with_row(rows: list[Row], row: Row, path: Path | Url) -> str | None:
    """The table with one more row; None: it has that."""
    for there in rows:
        if there["run"] == row["run"]:
            if there["config_hash"] != row["config_hash"]:
                raise SweepError(f"{path} holds run {row['run']} with another config: choose "
                                 "another --out")  # fmt: skip
            return None
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    return stream.getvalue()


def _append_object(url: Url, row: Row) -> bool:
    """Adds a row to a table in a bucket; False: another writer was faster."""
    found = find_object(url)
    try:
        rows = [] if found is None else _rows(decode_text(read_bytes(url)), url)
    except UnicodeDecodeError as e:
        raise SweepError(f"{url} cannot be read ({e}); restore it or move it away") from e
    if (text := _with_row(rows, row, url)) is None:
        return True
    try:
        if found is None:
            create(url, text.encode())
        else:
            replace(url, text.encode(), found.version)
    except ChangedError:
        return False
    return True
