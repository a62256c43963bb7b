"""A checkpoint's `manifest.json`: what the arrays belong to, and the digests of all files.

The manifest is written last, by rename: a checkpoint's folder without one is a save that did not
finish. From format 2 on it holds a digest of itself; its step is the folder's name in any format.
"""

import dataclasses
import hashlib
import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.errors import CheckpointError
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.saved.goodput import NO_TIME, Goodput, goodput_fault, goodput_from_json
from mmfree_jax.saved.origin import FROM_NOTHING, Origin, origin_fault, origin_from_json
from mmfree_jax.text_files import read_json

MANIFEST = "manifest.json"
FORMAT = 2
_SELF = "sha256"
_PIECE_BYTES = 2**20
"""That a digest takes at once: Python's lock is let go for each, and not for less than it costs."""

LeafType = tuple[tuple[int, ...], str]


class DamagedCheckpointError(CheckpointError):
    """A checkpoint's files are not as they were written."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint is of.

    Attributes:
      step: that the checkpoint was made after.
      config: the run's, resolved, as plain values.
      data: which data the run trains on ("fingerprints", "tokens", "paths", "tokenizer").
      leaves: shape and dtype of every array, by path.
      files: size (bytes) and SHA-256 of every file, by name.
      meter: what the run measured of itself since the last record; None: nothing.
      origin: what the run branched from.
      goodput: where the run's time had gone; of an older version, nowhere.
    """

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    leaves: dict[str, LeafType]
    files: dict[str, tuple[int, str]]
    meter: dict[str, Any] | None = None
    origin: Origin = FROM_NOTHING
    goodput: Goodput = NO_TIME


_TYPES: dict[str, Any] = {
    "step": int,
    "config": dict,
    "data": {"fingerprints": [str], "tokens": [int], "paths": [str], "tokenizer": dict},
    "leaves": dict,
    "files": dict,
}
_METER: dict[str, Any] = {"window": dict, "skipped": int, "skipped_in_a_row": int}


def manifest_text(step: int, metadata: dict[str, Any], unix_time: float, **parts: Any) -> str:
    """The text of a manifest.

    Args:
      step: of the checkpoint.
      metadata: at least "config" and "data", see `Manifest`; "origin" of a branch.
      unix_time: of the save (s).
      parts: "leaves" and "files".
    """
    values = {"format": FORMAT, "step": step, "unix_time": unix_time, **metadata, **parts}
    values = json.loads(json.dumps(values))  # what a reader finds, tuples as lists
    return json.dumps(values | {_SELF: digest(values)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`, whose name is its step.

    Raises:
      DamagedCheckpointError: it is missing, unreadable, altered, or of another step.
      CheckpointError: it is of a newer format.
    """

    def damaged(why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged ({why})")

    try:
        values = read_json(folder / MANIFEST)
    except OSError as e:
        raise DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST}: {e.strerror}") from e
    except ValueError as e:
        raise damaged("not valid JSON") from e
    if wrong := fault(values, {"format": int}):
        raise damaged(wrong)
    found = values.pop(_SELF, None)
    if found != digest(values) and (found is not None or values["format"] > 1):
        raise damaged("it does not match its own checksum")
    if values["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {values['format']}: this version reads "
            f"up to {FORMAT}; install a newer mmfree-jax"
        )
    meter, origin = values.get("meter"), values.get("origin")
    if wrong := fault(values, _TYPES) or (meter is not None and fault(meter, _METER, "meter")):
        raise damaged(wrong)
    if origin is not None and (wrong := origin_fault(origin)):
        raise damaged(wrong)
    goodput = values.get("goodput")
    if goodput is not None and (wrong := goodput_fault(goodput)):
        raise damaged(wrong)
    if str(values["step"]) != folder.name:
        raise damaged(f"step is {values['step']}, but the folder's name {folder.name}")
    try:
        leaves = {
            name: (tuple(map(int, shape)), str(dtype))
            for name, (shape, dtype) in values["leaves"].items()
        }
        files = {name: (int(size), str(sha)) for name, (size, sha) in values["files"].items()}
    except (TypeError, ValueError) as e:
        raise damaged("leaves or files are malformed") from e
    return Manifest(
        values["step"],
        values["config"],
        values["data"],
        leaves,
        files,
        meter,
        FROM_NOTHING if origin is None else origin_from_json(origin),
        NO_TIME if goodput is None else goodput_from_json(goodput),
    )


def leaf_types(tree: Any) -> dict[str, LeafType]:
    """Path, shape and dtype of every leaf of a pytree of arrays or their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): (tuple(x.shape), str(x.dtype)) for p, x in leaves}


def _digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file, which is also flushed to disk."""
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        sha, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        while size := file.readinto(piece):
            sha.update(piece[:size])
    return path.stat().st_size, sha.hexdigest()


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of every file of a checkpoint but its manifest, by relative name."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = list(pool.map(_digest, files))
    return {str(p.relative_to(folder)): r for p, r in zip(files, results, strict=True)}


def verify(folder: Path) -> Manifest:
    """Checks every file of a checkpoint against its manifest, which is returned.

    Raises:
      DamagedCheckpointError: a file is missing, of another size or of another content.
    """
    manifest = read_manifest(folder)
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder}: {name} is missing")
        if path.stat().st_size != size:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: {name} has {path.stat().st_size} bytes, not {size}"
            )
    try:
        found = digests(folder)
    except OSError as e:
        raise DamagedCheckpointError(f"checkpoint {folder}: {e.filename}: {e.strerror}") from e
    for name, (_, sha) in manifest.files.items():
        if name not in found or found[name][1] != sha:
            raise DamagedCheckpointError(f"checkpoint {folder}: {name} does not match its checksum")
    return manifest


def _steps(folder: Path) -> list[tuple[int, bool]]:
    """Steps that `folder` has a folder for, oldest first, and whether each is complete."""
    if not folder.is_dir():
        return []
    names = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()]
    return sorted((int(p.name), (p / MANIFEST).is_file()) for p in names)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints under `folder`, oldest first."""
    return [step for step, complete in _steps(folder) if complete]


def newest_first(folder: Path) -> list[int]:
    """`checkpoint_steps` from the newest; warns of later saves that did not finish."""
    steps = _steps(folder)[::-1]
    for step, complete in steps:
        if complete:
            break
        warnings.warn(
            f"checkpoint {folder / str(step)} has no {MANIFEST}: its save did not finish, as when "
            "a run is killed; falling back to the checkpoint before",
            stacklevel=3,
        )
    return [step for step, complete in steps if complete]


def newest_manifest(folder: Path) -> Manifest | None:
    """The newest readable manifest under `folder`; None if there is no checkpoint."""
    for step in reversed(checkpoint_steps(folder)):
        try:
            return read_manifest(folder / str(step))
        except DamagedCheckpointError:
            continue
    return None
