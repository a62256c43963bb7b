"""Copies, on this machine, of tokenizers and models that lie in buckets.

A copy stays in the cache (`object_cache.py`) and, while this process lives, is not removed from it.
It is taken again when an object below the URL has changed. Nothing here imports JAX.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from mmfree_jax.errors import StorageError, naming
from mmfree_jax.leases import LEASE
from mmfree_jax.object_cache import shared_cache
from mmfree_jax.places import locate
from mmfree_jax.prefixes import UPLOADING, describe_missing
from mmfree_jax.storage import (
    ChangedError,
    MissingError,
    Object,
    Url,
    download,
    find_object,
    is_url,
    list_below,
    parse_url,
)

Wanted = Callable[[PurePosixPath], bool]
_TRIES = 3
"""To copy what is written anew meanwhile."""


def everything(_: PurePosixPath) -> bool:
    """Wants all objects."""
    return True


def nothing(_: PurePosixPath) -> bool:
    """Wants no other object."""
    return False


@contextlib.contextmanager
def copied(
    path: str | os.PathLike[str],
    name: str,
    wanted: Wanted = everything,
    beside: Wanted = everything,
) -> Iterator[Path]:
    """`local_copy`, while errors that the block raises name the URL in place of the copy."""
    copy = local_copy(path, name, wanted, beside)
    if not is_url(path):
        yield copy
        return
    with naming(str(parse_url(path)), str(copy)):
        yield copy


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
    for _ in range(_TRIES):
        root, objects = _find(url, name, wanted, beside)
        with contextlib.suppress(ChangedError):
            folder = _keep(root, objects)
            return folder / (url.key.removeprefix(root.key).strip("/") if root != url else "")
    raise StorageError(
        f"{name} {url} changes while it is read: wait until what writes it has ended, and run the "
        "command again"
    )


def _find(url: Url, name: str, wanted: Wanted, beside: Wanted) -> tuple[Url, list[Object]]:
    """The prefix that a URL names, or that of its object, and the objects to fetch below it."""
    there = [found for found in list_below(url) if found.url.name != LEASE]
    refuse_half_written(url, there, name)
    root, objects = url, [found for found in there if wanted(_below(url, found))]
    if not objects and url.key and (single := find_object(url)) is not None:
        root = Url(url.scheme, url.bucket, url.key.rpartition("/")[0])
        near = [o for o in list_below(root) if o.url != url and beside(_below(root, o))]
        objects = [single, *near]
    if not objects:
        why = describe_missing(url) or f"{url} holds none of the files that it should"
        raise StorageError(f"{name} {why}")
    return root, objects


def refuse_half_written(url: Url, there: Iterable[Object], name: str) -> None:
    """Refuses a folder that is marked as not whole; `name` is what the message calls it.

    Raises:
      StorageError: the mark is among the objects that are there.
    """
    if any(found.url == url / UPLOADING for found in there):
        raise StorageError(
            f"{name} {url} is half written: the command that writes it is still at it, or did not "
            "end; run that again"
        )


def check_file_names(objects: Iterable[Object]) -> None:
    """Refuses objects that have names which no file can have.

    Raises:
      StorageError: names the first.
    """
    for found in objects:
        if ".." in found.url.key.split("/") or found.url.key.endswith("/"):
            raise StorageError(f"{found.url} has a name that no file can have: rename it")


def _below(url: Url, found: Object) -> PurePosixPath:
    return PurePosixPath(found.url.key.removeprefix(url.key).lstrip("/"))


def _keep(root: Url, objects: list[Object]) -> Path:
    """The folder of a copy of some objects below `root`.

    Raises:
      ChangedError: one was written or deleted meanwhile.
    """
    folder = Path(root.bucket, root.key)
    check_file_names(objects)

    def fill(entry: Path) -> None:
        for found in objects:
            file = entry / folder / _below(root, found)
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                download(found.url, file)
            except MissingError as e:
                raise ChangedError(f"{found.url} was deleted by another job") from e
        now = {found.url: found for found in list_below(root)}
        for found in objects:
            if now.get(found.url) != found:
                raise ChangedError(f"{found.url} was written by another job")

    said = "\n".join([str(root), *(f"{o.url.key} {o.size} {o.version}" for o in objects)])
    key = hashlib.sha256(said.encode()).hexdigest()
    size = sum(found.size for found in objects)
    return shared_cache().keep(key, size, str(root), fill) / folder
