"""What a prepared folder is made from, and guards against mixing two data sets in one.

The index and the journal of an unfinished preparation remember the settings, and of each
input file its name, size and a checksum over both ends. Nothing here imports JAX.
"""

import contextlib
import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmfree_jax.data.dataset import describe_identity
from mmfree_jax.data.sources import InputFile
from mmfree_jax.data.tokenizer import TOKENIZER_FOLDER
from mmfree_jax.data.writer import disk_errors
from mmfree_jax.errors import DataError
from mmfree_jax.files import is_leftover, lock
from mmfree_jax.storage import Url, find_object, read_bytes

PROGRESS_NAME = "progress.json"
_LOCK_NAME = ".lock"
_EDGE = 2**20


def describe_settings(config: Any, tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What the shards depend on, apart from the inputs' contents."""
    settings = asdict(config)
    # skip_bad_records matters only if there are any: see check_same.
    # Splits decide which files are read, and these are described each.
    for name in ("out", "input", "splits", "workers", "tokenizer", "skip_bad_records"):
        del settings[name]
    return settings | {"tokenizer": tokenizer}


def describe_file(file: InputFile, text_field: str) -> dict[str, Any]:
    """Name, size and a checksum over both ends of an input file; its field, if a special one."""
    path = file.path
    try:
        size, ends = _ends_of_object(path) if isinstance(path, Url) else _ends_of_file(path)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}; make it a readable file") from e
    digest = hashlib.sha256(ends).hexdigest()
    described = {"name": path.name, "bytes": size, "ends_sha256": digest}
    return described | ({} if file.text_field == text_field else {"text_field": file.text_field})


def _ends_of_file(path: Path) -> tuple[int, bytes]:
    """Size of a file, and both its ends."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_EDGE)
        file.seek(max(_EDGE, size - _EDGE))
        return size, first + file.read(_EDGE)


def _ends_of_object(url: Url) -> tuple[int, bytes]:
    found = find_object(url)
    if found is None:
        raise DataError(f"{url} was deleted meanwhile: run the command again")
    first = read_bytes(url, 0, min(_EDGE, found.size))
    return found.size, first + read_bytes(url, max(_EDGE, found.size - _EDGE), found.size)


def check_same(
    found: dict[str, Any],
    settings: dict[str, Any],
    inputs: list[dict[str, Any]],
    folder: Path,
    state: str,
    *,
    skip_bad_records: bool,
) -> None:
    """Refuses a folder that was made, or begun, with other settings or inputs."""
    way_out = f"use the same, remove {folder}, or give another --out"
    before = found.get("settings", {})
    for name, value in settings.items():
        if before.get(name) != value:
            old, new = before.get(name), value
            if name == "tokenizer":
                old, new = describe_identity(old or {}), describe_identity(value)
            raise DataError(f"{folder} {state} made with {name} {old!r}, not {new!r}: {way_out}")
    bad = found.get("counts", {}).get("bad_records", 0)
    if bad and not skip_bad_records:
        raise DataError(f"{folder} {state} made without {bad} malformed records: {way_out}")
    old_inputs = found.get("inputs", [])
    if old_inputs != inputs:
        changed = [new["name"] for old, new in zip(old_inputs, inputs, strict=False) if old != new]
        what = f"{changed[0]} differs" if changed else f"{len(old_inputs)} files, now {len(inputs)}"
        raise DataError(f"{folder} {state} made from other inputs ({what}): {way_out}")


def check_empty(folder: Path) -> None:
    """Refuses to mix a new data set with files that are something else."""
    with disk_errors(folder):
        found = folder.iterdir() if folder.exists() else ()
        refuse_others(
            folder, {p.name for p in found if p.name != _LOCK_NAME and not is_leftover(p.name)}
        )


def refuse_others(place: Path | Url, names: set[str]) -> None:
    """Refuses a folder, here or in a bucket, that holds files of some names."""
    if names:
        raise DataError(
            f"{place} is not empty (it holds {min(names)}) and not an unfinished data set: give "
            "another --out"
        )


def start_afresh(folder: Path) -> None:
    """Removes what a preparation left that had not finished anything."""
    shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    for pattern in ("*.tokens", "*.documents"):
        for file in folder.glob(pattern):
            file.unlink()


def locked(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keeps two processes from preparing the same folder."""
    return lock(folder / _LOCK_NAME, f"data folder {folder}")
