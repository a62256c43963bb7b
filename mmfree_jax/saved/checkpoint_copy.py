"""Copies, on this machine, of the parameters in checkpoints that lie in buckets.

Two thirds of a checkpoint are the optimiser's. Orbax keeps the arrays as values of one OCDBT
database, sorted by name, in files of a quarter GiB; its tree says which of them hold parameters.
Those alone are fetched, and each is compared with the manifest before the copy counts.
"""

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorstore

from mmfree_jax.errors import CheckpointError
from mmfree_jax.files import copy_folder, disk_errors, sha256
from mmfree_jax.object_cache import shared_cache
from mmfree_jax.saved.checkpoint_files import MANIFEST, object_pieces, read_manifest_bytes
from mmfree_jax.saved.manifest import (
    DamagedCheckpointError,
    Manifest,
    check_sizes,
    read_manifest,
    verify,
)
from mmfree_jax.storage import MissingError, Url

_STATE = "state"
_DATA = "d"
"""Folder of a database's values and of its tree."""
_PARAMETERS = b"params."
_AT_ONCE = 16


def copy_parameters(checkpoint: Url) -> Path:
    """A folder with a checkpoint's manifest and all that its parameters are read from.

    It stays in the cache (`object_cache.py`) while this process lives.

    Raises:
      DamagedCheckpointError: a file is missing in the bucket, of another size or of other content.
      CheckpointError: the checkpoint is of a newer format, or the copy was damaged later on.
      StorageError: the bucket refuses, or cannot be reached.
      OutputError: the cache is too small, or its disk full.
    """
    folder, is_new = Path(checkpoint.bucket, checkpoint.key), False
    with tempfile.TemporaryDirectory(prefix="mmfree-tree-") as tree:
        try:
            manifest, text = read_manifest(checkpoint), read_manifest_bytes(checkpoint)
            check_sizes(checkpoint, manifest)
            with disk_errors(tree, "make room there, or set TMPDIR to another folder"):
                names = sorted(_files_of_parameters(checkpoint, manifest, Path(tree)))

            def fill(entry: Path) -> None:
                nonlocal is_new
                copy_folder(tree, entry / folder)
                others = [name for name in names if not (entry / folder / name).exists()]
                _fetch(checkpoint, manifest, others, entry / folder)
                (entry / folder / MANIFEST).write_bytes(text)
                os.utime(entry / folder / MANIFEST, (manifest.unix_time, manifest.unix_time))
                is_new = True

            key = sha256("\n".join([str(checkpoint), sha256(text), *names]).encode())
            size = sum(manifest.files[name][0] for name in names) + len(text)
            entry = shared_cache().keep(key, size, str(checkpoint), fill)
        except MissingError as e:
            raise DamagedCheckpointError(f"checkpoint {checkpoint}: {e}") from e
        except OSError as e:  # the manifest is gone
            raise DamagedCheckpointError(f"checkpoint {checkpoint}: {e.strerror}") from e
    if not is_new:
        try:
            verify(entry / folder, names)
        except DamagedCheckpointError as e:
            raise CheckpointError(
                f"the copy of checkpoint {checkpoint} is damaged ({e}): remove {entry}"
            ) from e
    return entry / folder


def _files_of_parameters(checkpoint: Url, manifest: Manifest, folder: Path) -> set[str]:
    """Names of the files that reading parameters takes; all, where the tree cannot be followed.

    Those that say so are written below `folder`.
    """
    names = {name for name in manifest.files if _DATA not in name.split("/")[:-1]}
    _fetch(checkpoint, manifest, names, folder)

    def fetch(name: str) -> None:
        if not (folder / name).exists():
            _fetch(checkpoint, manifest, [name], folder)

    try:
        base = f"{folder / _STATE}/"
        store = tensorstore.KvStore.open({"driver": "file", "path": base}).result()
        version = tensorstore.ocdbt.dump(store).result()["versions"][-1]
        names.update(_walk(store, version["root"]["location"], b"", fetch))
    except (KeyError, ValueError):  # of another layout
        return set(manifest.files)
    return names if names <= manifest.files.keys() else set(manifest.files)


def _walk(store: Any, location: str, prefix: bytes, fetch: Callable[[str], None]) -> Iterator[str]:
    """Files of a node of the tree, of those below it, and of the parameters' values."""
    name = _file(location)
    fetch(name)
    yield name
    for entry in tensorstore.ocdbt.dump(store, location).result()["entries"]:
        key = prefix + entry["key"]
        if "location" in entry:
            below = prefix + entry["subtree_common_prefix"]
            yield from _walk(store, entry["location"], below, fetch)
        elif "indirect_value" in entry and key.startswith(_PARAMETERS):
            yield _file(entry["indirect_value"])


def _file(location: str) -> str:
    """The file of KIND:BASE:FILE:OFFSET:LENGTH."""
    _, base, file, _, _ = location.split(":")
    return f"{_STATE}/{base}{file}"


def _fetch(checkpoint: Url, manifest: Manifest, names: Iterable[str], folder: Path) -> None:
    """Writes files of a checkpoint below `folder`, each compared with the manifest."""
    stopped = threading.Event()

    def fetch(name: str) -> None:
        size, expected = manifest.files[name]
        file, digest = folder / name, hashlib.sha256()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as out:
            for piece in object_pieces(checkpoint / name, size):
                if stopped.is_set():
                    return
                digest.update(piece)
                out.write(piece)
        if digest.hexdigest() != expected:
            raise DamagedCheckpointError(
                f"checkpoint {checkpoint}: {name} does not match its checksum"
            )

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            list(pool.map(fetch, names))
        except BaseException:  # Ctrl-C too: only the pieces under way are waited for
            stopped.set()
            raise
