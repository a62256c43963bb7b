"""The files of checkpoints, in a folder of this machine or below a URL.

A checkpoint has the same files in either. A bucket has no folders and renames nothing: there the
manifest alone says that a checkpoint is whole, and one that is set aside loses it.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmfree_jax.files import sync_folder, write_text
from mmfree_jax.places import is_file
from mmfree_jax.storage import (
    MissingError,
    Url,
    create,
    delete,
    delete_below,
    list_below,
    read_bytes,
    write_bytes,
)
from mmfree_jax.text_files import read_bytes as read_file

Place = Path | Url
MANIFEST = "manifest.json"
DAMAGED = "manifest.damaged.json"
"""Where the manifest of a checkpoint in a bucket goes that was found damaged."""
_PIECE_BYTES = 2**20
"""That a digest takes at once: Python's lock is let go for each, and not for less than it costs."""
_FETCHED_BYTES = 2**24
"""Likewise of an object."""


def read_manifest_bytes(folder: Place) -> bytes:
    """The manifest of a checkpoint.

    Raises:
      OSError: it is missing or cannot be read.
      StorageError: the bucket refuses, or cannot be reached.
    """
    if isinstance(folder, Path):
        return read_file(folder / MANIFEST)
    try:
        return read_bytes(folder / MANIFEST)
    except MissingError as e:
        raise FileNotFoundError(2, os.strerror(2), str(folder / MANIFEST)) from e


def is_complete(folder: Place) -> bool:
    """Whether a checkpoint has its manifest."""
    return is_file(folder / MANIFEST)


def complete(folder: Place, text: str) -> None:
    """Writes the manifest of a checkpoint, all of whose other files are there.

    In a bucket on the condition that there is none: no other job's is replaced.
    """
    if isinstance(folder, Path):
        write_text(folder / MANIFEST, text)
        sync_folder(folder.parent)
    else:
        create(folder / MANIFEST, text.encode())


def steps_there(folder: Place) -> list[tuple[int, bool]]:
    """Steps that `folder` holds anything of, oldest first, and whether each is complete.

    Those that were set aside are left out.
    """
    if isinstance(folder, Path):
        if not folder.is_dir():
            return []
        names = [p for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()]
        return sorted((int(p.name), (p / MANIFEST).is_file()) for p in names)
    return sorted(
        (step, MANIFEST in names)
        for step, names in _objects_there(folder).items()
        if MANIFEST in names or DAMAGED not in names
    )


def _objects_there(folder: Url) -> dict[int, set[str]]:
    """Names of the objects of each step in a bucket."""
    found: dict[int, set[str]] = {}
    for held in list_below(folder):
        step, _, name = held.url.key.removeprefix(f"{folder.key}/").partition("/")
        if step.isdecimal():
            found.setdefault(int(step), set()).add(name)
    return found


def steps_set_aside(folder: Place) -> list[int]:
    """Steps of checkpoints that were found damaged and have not been saved again, oldest first."""
    if isinstance(folder, Path):
        names = [p.name.partition(".damaged") for p in folder.glob("*.damaged*")]
        steps = {int(step) for step, _, _ in names if step.isdecimal()}
        return sorted(steps - {step for step, whole in steps_there(folder) if whole})
    found = _objects_there(folder)
    return sorted(s for s, names in found.items() if DAMAGED in names and MANIFEST not in names)


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of every file of a checkpoint but its manifest, by relative name."""
    if isinstance(folder, Path):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
        return {str(p.relative_to(folder)): p.stat().st_size for p in files}
    found = {o.url.key.removeprefix(f"{folder.key}/"): o.size for o in list_below(folder)}
    return {name: size for name, size in found.items() if name not in (MANIFEST, DAMAGED)}


def digests(folder: Place, names: Collection[str] | None = None) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of files of a checkpoint, by relative name.

    What is on a disk is also flushed to it.

    Args:
      folder: of the checkpoint.
      names: of the files; None: all but its manifest.
    """
    digest: Callable[[str, int], tuple[int, str]]
    if isinstance(folder, Path):
        digest = lambda name, _: _digest_of_file(folder / name)  # noqa: E731
    else:
        digest = lambda name, size: _digest_of_object(folder / name, size)  # noqa: E731
    found = {n: size for n, size in sizes(folder).items() if names is None or n in names}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = list(pool.map(digest, found, found.values()))
    return dict(zip(found, results, strict=True))


def _digest_of_file(path: Path) -> tuple[int, str]:
    with path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        sha, piece = hashlib.sha256(), memoryview(bytearray(_PIECE_BYTES))
        while size := file.readinto(piece):
            sha.update(piece[:size])
    return path.stat().st_size, sha.hexdigest()


def _digest_of_object(url: Url, size: int) -> tuple[int, str]:
    sha = hashlib.sha256()
    for piece in object_pieces(url, size):
        sha.update(piece)
    return size, sha.hexdigest()


def object_pieces(url: Url, size: int) -> Iterator[bytes]:
    """The bytes of an object, a piece at a time.

    Raises:
      MissingError: there is none.
      StorageError: the bucket refuses, cannot be reached, or has fewer bytes.
    """
    for start in range(0, size, _FETCHED_BYTES):
        yield read_bytes(url, start, min(size, start + _FETCHED_BYTES))


def remove(folder: Place) -> None:
    """Deletes a checkpoint or what there is of it, its manifest first.

    Without that it no longer counts, however far the deletion gets.
    """
    if isinstance(folder, Path):
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    else:
        delete(folder / MANIFEST)
        delete_below(folder)


def set_aside(folder: Place) -> None:
    """Keeps a damaged checkpoint under another name, so that its step can be saved again.

    On a disk that is `<step>.damaged`. In a bucket only its manifest gets another name, and the
    rest goes when the step is saved again.
    """
    if isinstance(folder, Path):
        target, n = folder.with_name(f"{folder.name}.damaged"), 1
        while target.exists():
            target, n = folder.with_name(f"{folder.name}.damaged-{n}"), n + 1
        folder.rename(target)
    else:
        write_bytes(folder / DAMAGED, read_manifest_bytes(folder) or b"{}")
        delete(folder / MANIFEST)


def remove_unfinished(folder: Place) -> None:
    """Deletes what interrupted saves and deletions left."""
    if isinstance(folder, Path):
        complete_ones = {str(step) for step, whole in steps_there(folder) if whole}
        for path in folder.iterdir():
            unfinished = path.name.split(".")[0].isdecimal() and ".damaged" not in path.name
            if unfinished and path.name not in complete_ones:
                shutil.rmtree(path, ignore_errors=True)
    else:
        for step, whole in steps_there(folder):
            if not whole:
                delete_below(folder / str(step))
