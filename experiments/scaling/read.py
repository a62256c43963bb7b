"""Read runs from CSV and parquet files and from this project's run directories."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mmfree_jax.experiments.scaling.checks import complete
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import NUMBERS, WORDS, RunFrame, join, make_frame
from mmfree_jax.experiments.scaling.run_directory import READ, is_run_directory, read_run_directory
from mmfree_jax.experiments.scaling.table_file import numbers, read_file, rows_where
from mmfree_jax.experiments.scaling.units import check_units
from mmfree_jax.fetched import copied, nothing
from mmfree_jax.files import StrPath
from mmfree_jax.storage import is_url, parse_url


@dataclass(frozen=True)
class Columns:
    """Which column of the file holds what; empty fields are found by common names, and `none`
    says that no column holds it, whatever its name."""

    params: str = ""
    """Parameters in all (a raw count)."""
    params_non_embedding: str = ""
    """Parameters without token embedding and head (a raw count)."""
    params_ternary: str = ""
    """Ternary parameters (a raw count)."""
    tokens: str = ""
    """Training tokens (a raw count); derived as FLOPs / (6 params) where absent."""
    flops: str = ""
    """Training FLOPs (a raw count)."""
    loss: str = ""
    """Final loss (nats a token)."""
    loss_sd: str = ""
    """Standard error of the loss (nats a token)."""
    budget: str = ""
    """FLOP budget that the run belongs to, for isoFLOP designs (FLOPs)."""
    bits: str = ""
    """Bits of a weight during training (bits)."""
    unique_tokens: str = ""
    """Tokens of the data, each counted once (a raw count)."""
    accuracy: str = ""
    """Accuracy on a task (a share from 0 to 1)."""
    chance: str = ""
    """Accuracy by guessing (a share from 0 to 1)."""
    family: str = ""
    """Model family (a word); none: all rows are one family."""
    seed: str = ""
    """Random seed (a word)."""
    run: str = ""
    """Name of the run; rows of one run are resampled together (a word)."""
    provenance: str = ""
    """Where the row comes from (a word)."""


NONE = "none"
"""As a column's name: the file has none such."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "params": ("params", "n", "nparams", "parameters", "numparams", "numparameters", "modelsize",
               "size", "paramstotal", "totalparams", "totalparameters", "nparameters",
               "modelparams"),
    "params_non_embedding": ("paramsnonembedding", "nonembeddingparams", "nonembedding", "nnonemb",
                             "nonembeddingparameters", "paramsnoembed", "nonembparams"),
    "params_ternary": ("paramsternary", "ternaryparams", "ternary", "ternaryparameters"),
    "tokens": ("tokens", "d", "trainingtokens", "traintokens", "ntokens", "numtokens",
               "tokensseen", "datasetsize", "trainingdata"),
    "flops": ("flops", "c", "compute", "trainingflop", "trainingflops", "trainflops", "flop",
              "trainingcompute", "totalflops"),
    "loss": ("loss", "l", "finalloss", "valloss", "validationloss", "evalloss", "testloss",
             "trainloss", "trainingloss"),
    "loss_sd": ("losssd", "lossstd", "losserr", "lossstderr", "losserror", "sigma"),
    "budget": ("budget", "flopbudget", "flopsbudget", "isoflop", "computebudget", "group"),
    "bits": ("bits", "weightbits", "bitsperweight"),
    "unique_tokens": ("uniquetokens", "tokensunique", "uniquedata"),
    "accuracy": ("accuracy", "acc", "taskaccuracy"),
    "chance": ("chance", "chancelevel"),
    "family": ("family", "architecture", "arch", "modelfamily"),
    "seed": ("seed",),
    "run": ("run", "runname", "runid"),
    "provenance": ("provenance", "source"),
}  # fmt: skip


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _assign(header: list[str], columns: Columns, path: Path) -> dict[str, str]:
    """Frame column -> file column: as told by flags, else by common names."""
    chosen: dict[str, str] = {}
    absent = {f.name for f in fields(Columns)
              if getattr(columns, f.name) == NONE and NONE not in header}  # fmt: skip
    for f in fields(Columns):
        told = getattr(columns, f.name)
        if told and f.name not in absent:
            if told not in header:
                flag = f.name.replace("_", "-")
                raise ScalingError(f"{path}: --columns.{flag} names {told!r}, which is not a "
                                   f"column; found {', '.join(map(repr, header))}")  # fmt: skip
            chosen[f.name] = told
    for name, synonyms in SYNONYMS.items():
        if name in chosen or name in absent:
            continue
        for synonym in synonyms:
            matches = [h for h in header if _key(h) == synonym and h not in chosen.values()]
            if len(matches) > 1:
                raise ScalingError(
                    f"{path}: columns {', '.join(map(repr, matches))} could all be {name}; "
                    f"choose with --columns.{name.replace('_', '-')}"
                )
            if matches:
                chosen[name] = matches[0]
                break
    if "loss" not in chosen:
        raise ScalingError(f"{path}: no column looks like the loss; name it with --columns.loss "
                           f"(found {', '.join(map(repr, header))})")  # fmt: skip
    return chosen


def read_table(path: Path, columns: Columns, where: Iterable[str] = ()) -> RunFrame:
    """Read one CSV (comma, tab or semicolon; .gz too) or parquet file.

    Raises:
        ScalingError: the file is missing or damaged, a column is missing or ambiguous, or a
            cell is not a number. The message names the file, the column and the row.
    """
    table = read_file(path)
    chosen = _assign(list(table), columns, path)
    keep, notes = rows_where(table, where, path)
    data: dict = {}
    for name, source in chosen.items():
        if name in NUMBERS:
            data[name] = numbers(table[source], path, source)[keep]
        else:
            words = ["" if v is None else str(v) for v in table[source]]
            data[name] = np.array(words, dtype=str)[keep]
    rows = np.flatnonzero(keep) + 2  # as numbered in the file, below its header
    told = data.get("provenance", [""] * len(rows))
    data["provenance"] = [f"{path.name}, row {row}" + (f" ({origin})" if origin else "")
                          for row, origin in zip(rows, told, strict=True)]  # fmt: skip
    guessed = ", ".join(f"{n} = {s!r}" for n, s in chosen.items()
                        if not getattr(columns, n) and n != s)  # fmt: skip
    if guessed:
        notes.append(f"{path.name}: columns taken by name: {guessed}")
    if not keep.any():
        raise ScalingError(f"{path}: no row satisfies every --where condition")
    sources = {name: source for name, source in chosen.items() if name != source}
    frame = make_frame(**data, sources=sources, notes=notes)
    return replace(frame, notes=(*check_units(frame, path.name), *frame.notes))


def read_columns(
    place: StrPath, names: Sequence[str], *, where: Iterable[str] = (), family: str = ""
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Columns of positive numbers by their own names, of one family, and notes on rows left out.

    Args:
        place: a CSV or parquet file, or its URL in a bucket.
        names: of the columns; rows without one of them are left out.
        where: conditions on the file's columns; all must hold.
        family: column of families; empty: by its usual names; `none`: there is none.

    Raises:
        ScalingError: a column is missing, a number is not positive, or families are mixed.
    """
    with copied(place, "table", nothing, nothing) as path:
        return _read_columns(path, names, tuple(where), family)


def _read_columns(
    path: Path, names: Sequence[str], where: tuple[str, ...], family: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    if path.is_dir():
        raise ScalingError(f"{path}: is a directory; give a CSV or parquet file, such as the "
                           "results.csv of a sweep")  # fmt: skip
    if not path.exists():
        raise ScalingError(f"{path}: does not exist; give a CSV or parquet file")
    table = read_file(path)
    usual = [h for h in table if _key(h) in SYNONYMS["family"]] if not family else [family]
    groups = [h for h in usual if h != NONE or h in table]
    for name in (*names, *groups):
        if name not in table:
            raise ScalingError(f"{path}: has no column {name!r}; found "
                               f"{', '.join(map(repr, table))}")  # fmt: skip
    keep, notes = rows_where(table, where, path)
    columns = {name: numbers(table[name], path, name) for name in names}
    gaps = keep & np.any([np.isnan(c) for c in columns.values()], axis=0)
    if gaps.any():
        notes.append(f"{path.name}: {int(gaps.sum())} rows lack one of {', '.join(names)}, the "
                     f"first row {int(np.argmax(gaps)) + 2}: left out")  # fmt: skip
    keep &= ~gaps
    if not keep.any():
        raise ScalingError(f"{path}: no row has {', '.join(names)} and satisfies --where")
    for name, column in columns.items():
        wrong = np.flatnonzero(keep & ~((column > 0) & np.isfinite(column)))
        if len(wrong):
            raise ScalingError(f"{path}: column {name!r}, row {wrong[0] + 2}: "
                               f"{column[wrong[0]]:g} must be positive and finite")  # fmt: skip
    for name in groups:
        found = sorted({str(table[name][i]) for i in np.flatnonzero(keep)})
        if len(found) > 1:
            raise ScalingError(f"{path}: holds {len(found)} families ({', '.join(found)}) by the "
                               f"column {name!r}; choose one with --where '{name} = {found[0]}', "
                               "or take all as one with --family none")  # fmt: skip
    return {name: column[keep] for name, column in columns.items()}, notes


def read_runs(
    paths: Iterable[StrPath],
    columns: Columns | None = None,
    *,
    where: Iterable[str] = (),
    points: str = "last",
) -> RunFrame:
    """Read and stack any mix of CSV files, parquet files and run directories.

    Args:
        paths: files, run directories, or directories of run directories; or their URLs.
        columns: names of the columns in the files.
        where: conditions on the files' own columns; all must hold.
        points: of a run directory, the `last` evaluation or `all` of them.

    Raises:
        ScalingError: as `read_table` and `read_run_directory`.
    """
    columns, where, frames = columns or Columns(), tuple(where), []
    for item in paths:
        with copied(item, "runs", lambda name: name.name in READ, nothing) as path:
            frames += [_named(frame, path, item) for frame in _frames(path, columns, where, points)]
    if not frames:
        raise ScalingError("runs: give at least one CSV or parquet file or run directory")
    return complete(join(frames))


def _named(frame: RunFrame, path: Path, given: StrPath) -> RunFrame:
    """The frame, whose rows come from what was given, not from a copy of it."""
    if not is_url(given):
        return frame
    url = str(parse_url(given))
    places = [str(where).replace(str(path), url) for where in frame.provenance]
    return replace(frame, provenance=np.array(places, dtype=str))


def _frames(
    path: Path, columns: Columns, where: tuple[str, ...], points: str
) -> Iterator[RunFrame]:
    """The runs of a file, of a run directory or of each in a directory."""
    if not path.exists():
        raise ScalingError(f"{path}: does not exist; give a CSV or parquet file or a run "
                           "directory")  # fmt: skip
    if not path.is_dir():
        yield read_table(path, columns, where)
        return
    runs = [path] if is_run_directory(path) else sorted(
        p for p in path.iterdir() if is_run_directory(p))  # fmt: skip
    if not runs:
        raise ScalingError(f"{path}: neither a run directory (metrics.jsonl) nor a directory "
                           "of run directories")  # fmt: skip
    for run in runs:
        frame = read_run_directory(run, points=points)
        if where:
            table = {n: list(getattr(frame, n)) for n in (*NUMBERS, *WORDS)}
            keep, notes = rows_where(table, where, run)
            frame = frame.take(keep).noted(*notes)
        yield frame
