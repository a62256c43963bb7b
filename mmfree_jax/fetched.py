"""Copies, on this machine, of tokenizers and models that lie in buckets.

A copy stays in the cache (`object_cache.py`) and, while this process lives, is not removed from it.
It is taken again when an object below the URL has changed. Nothing here imports JAX.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mmfree_jax.errors import StorageError
from mmfree_jax.object_cache import shared_cache
from mmfree_jax.places import locate
from mmfree_jax.prefixes import UPLOADING, describe_missing
from mmfree_jax.storage import Object, Url, download, find_object, list_below

Wanted = Callable[[PurePosixPath], bool]


def everything(_: PurePosixPath) -> bool:
    """Wants all objects."""
    return True


def local_copy(
    path: str | os.PathLike[str],
    name: str,
    wanted: Wanted = everything,
    beside: Wanted = everything,
) -> Path:
    """A place on this machine with what `path` holds: itself, or a copy of what its URL names.

    Args:
      path: a file or a folder, or the URL of an object or of a prefix.
      name: what a message calls it ("model", "tokenizer").
      wanted: which objects below a prefix are fetched, by their names from there on.
      beside: which objects beside one that is named by its URL are fetched with it.

    Returns:
      The path, as it was given or in the cache: there the copy ends in BUCKET/KEY.

    Raises:
      ConfigError: it is a URL of what is no bucket.
      StorageError: nothing is there, it is half written, or it cannot be read.
      OutputError: the cache is too small, or its disk full.
    """
    url = locate(path, name)
    if isinstance(url, Path):
        return url
    root, objects = url, [o for o in list_below(url) if wanted(_below(url, o))]
    if objects and any(o.url == url / UPLOADING for o in objects):
        raise StorageError(
            f"{name} {url} is half written: the command that writes it is still at it, or did not "
            "end; run that again"
        )
    if not objects and url.key and (single := find_object(url)) is not None:
        root = Url(url.scheme, url.bucket, url.key.rpartition("/")[0])
        near = [o for o in list_below(root) if o.url != url and beside(_below(root, o))]
        objects = [single, *near]
    if not objects:
        why = describe_missing(url) or f"{url} holds none of the files that it should"
        raise StorageError(f"{name} {why}")
    return _keep(root, objects) / (url.key.removeprefix(root.key).strip("/") if root != url else "")


def _below(url: Url, found: Object) -> PurePosixPath:
    return PurePosixPath(found.url.key.removeprefix(url.key).lstrip("/"))


def _keep(root: Url, objects: list[Object]) -> Path:
    """The folder of a copy of some objects below `root`."""
    folder = Path(root.bucket, root.key)
    for found in objects:
        if ".." in found.url.key.split("/") or found.url.key.endswith("/"):
            raise StorageError(f"{found.url} has a name that no file can have: rename it")

    def fill(entry: Path) -> None:
        for found in objects:
            file = entry / folder / _below(root, found)
            file.parent.mkdir(parents=True, exist_ok=True)
            download(found.url, file)

    said = "\n".join([str(root), *(f"{o.url.key} {o.size} {o.version}" for o in objects)])
    key = hashlib.sha256(said.encode()).hexdigest()
    size = sum(found.size for found in objects)
    return shared_cache().keep(key, size, str(root), fill) / folder
