"""A checkpoint's `manifest.json`: what the arrays belong to, and the digests of all files.

The manifest is written last, by rename: a checkpoint's folder without one is a save that did not
finish. From format 2 on it holds a digest of itself; its step is the folder's name in any format.
"""

import dataclasses
import json
import warnings
from collections.abc import Collection
from typing import Any

import jax

from mmfree_jax.errors import CheckpointError
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.saved.checkpoint_files import (
    MANIFEST,
    Place,
    digests,
    read_manifest_bytes,
    sizes,
    steps_there,
)
from mmfree_jax.saved.goodput import NO_TIME, Goodput, goodput_fault, goodput_from_json
from mmfree_jax.saved.origin import FROM_NOTHING, Origin, origin_fault, origin_from_json
from mmfree_jax.text_files import decode_text, parse_json

FORMAT = 2
_SELF = "sha256"
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
      unix_time: of the save (s); 0: it does not say.
    """

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    leaves: dict[str, LeafType]
    files: dict[str, tuple[int, str]]
    meter: dict[str, Any] | None = None
    origin: Origin = FROM_NOTHING
    goodput: Goodput = NO_TIME
    unix_time: float = 0.0


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


def read_manifest(folder: Place) -> Manifest:
    """The manifest of the checkpoint in `folder`, whose name is its step.

    Raises:
      DamagedCheckpointError: it is missing, unreadable, altered, or of another step.
      CheckpointError: it is of a newer format.
    """

    def damaged(why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"checkpoint {folder}: {MANIFEST} is damaged ({why})")

    try:
        values = parse_json(decode_text(read_manifest_bytes(folder)))
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
        float(values["unix_time"]) if not fault(values, {"unix_time": (int, float)}) else 0.0,
    )


def leaf_types(tree: Any) -> dict[str, LeafType]:
    """Path, shape and dtype of every leaf of a pytree of arrays or their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): (tuple(x.shape), str(x.dtype)) for p, x in leaves}


def check_sizes(folder: Place, manifest: Manifest, names: Collection[str] | None = None) -> None:
    """Compares the sizes of a checkpoint's files with its manifest.

    Args:
      folder: of the checkpoint.
      manifest: of it.
      names: of the files; None: all.

    Raises:
      DamagedCheckpointError: a file is missing, or of another size.
      StorageError: the bucket refuses, or cannot be reached.
    """
    there = sizes(folder)
    for name in manifest.files if names is None else names:
        size, _ = manifest.files[name]
        if name not in there:
            raise DamagedCheckpointError(f"checkpoint {folder}: {name} is missing")
        if there[name] != size:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: {name} has {there[name]} bytes, not {size}"
            )


def verify(folder: Place, names: Collection[str] | None = None) -> Manifest:
    """Checks files of a checkpoint against its manifest, which is returned.

    Args:
      folder: of the checkpoint.
      names: of the files; None: all.

    Raises:
      DamagedCheckpointError: a file is missing, of another size or of another content.
      StorageError: the bucket refuses, or cannot be reached.
    """
    manifest = read_manifest(folder)
    check_sizes(folder, manifest, names)
    try:
        found = digests(folder, names)
    except OSError as e:
        raise DamagedCheckpointError(f"checkpoint {folder}: {e.filename}: {e.strerror}") from e
    for name in manifest.files if names is None else names:
        if name not in found or found[name][1] != manifest.files[name][1]:
            raise DamagedCheckpointError(f"checkpoint {folder}: {name} does not match its checksum")
    return manifest


def checkpoint_steps(folder: Place) -> list[int]:
    """Steps of the complete checkpoints under `folder`, oldest first."""
    return [step for step, complete in steps_there(folder) if complete]


def newest_first(folder: Place) -> list[int]:
    """`checkpoint_steps` from the newest; warns of later saves that did not finish."""
    steps = steps_there(folder)[::-1]
    for step, complete in steps:
        if complete:
            break
        warnings.warn(
            f"checkpoint {folder / str(step)} has no {MANIFEST}: its save did not finish, as when "
            "a run is killed; falling back to the checkpoint before",
            stacklevel=3,
        )
    return [step for step, complete in steps if complete]


def newest_manifest(folder: Place) -> Manifest | None:
    """The newest readable manifest under `folder`; None if there is no checkpoint."""
    for step in reversed(checkpoint_steps(folder)):
        try:
            return read_manifest(folder / str(step))
        except DamagedCheckpointError:
            continue
    return None
