"""Folders in buckets: all objects below a URL.

A folder that a command writes is uploaded object by object, so that it is not there at once. What
makes up for that: `UPLOADING` is made first and deleted last, the file that completes it goes last,
and a reader that finds the former, or not the latter, says so. Nothing here imports JAX.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.errors import StorageError
from mmfree_jax.storage import (
    MissingError,
    Url,
    check_bucket,
    delete,
    find_object,
    list_below,
    list_names,
    read_bytes,
    upload,
    write_bytes,
)
from mmfree_jax.text_files import LARGEST, decode_text, parse_json

UPLOADING = ".mmfree-uploading.json"


def read_json(url: Url) -> Any:
    """The value in an object.

    Raises:
      MissingError: there is none.
      ValueError: it is no JSON.
      StorageError: it is far too large, or cannot be read.
    """
    return parse_json(_read(url, LARGEST))


def read_text(url: Url, largest: int = LARGEST) -> str:
    """The text in an object, without a byte-order mark.

    Raises:
      MissingError: there is none.
      UnicodeDecodeError: it is not of its encoding.
      StorageError: it has more than `largest` bytes, or cannot be read.
    """
    return decode_text(_read(url, largest))


def _read(url: Url, largest: int) -> bytes:
    found = find_object(url)
    if found is None:
        raise MissingError(f"{url} does not exist")
    if found.size > largest:
        raise StorageError(f"{url} has {found.size} bytes, more than a text may: check its name")
    return read_bytes(url)


def describe_missing(url: Url) -> str | None:
    """Why nothing can be read below a URL; None: something is there.

    Raises:
      StorageError: the bucket is not there, or cannot be read.
    """
    check_bucket(url)
    if list_names(url):
        return None
    if url.key and find_object(url) is not None:
        return f"{url} is an object, not a folder: give what comes before its last slash"
    return f"{url} does not exist: nothing in the bucket begins so; check its name"


def names_below(url: Url) -> set[str]:
    """The names, from the URL on, of all objects below it.

    Raises:
      StorageError: the bucket is not there, or cannot be read.
    """
    # Some programs make an object of the prefix itself, as a folder.
    return {found.url.key.removeprefix(url.key).strip("/") for found in list_below(url)} - {""}


def mark_uploading(url: Url, command: str, files: set[str]) -> None:
    """Marks what is below a URL as half written.

    Args:
      url: of the folder.
      command: that writes it, the words after `mmfree`.
      files: that it may hold until it is whole, by their names from the URL on.

    Raises:
      StorageError: the bucket refuses, or cannot be reached.
    """
    mark = {"command": command, "files": sorted(files)}
    write_bytes(url / UPLOADING, json.dumps(mark, indent=1).encode())


def upload_folder(
    folder: Path,
    url: Url,
    *,
    command: str,
    earlier: set[str],
    last: Sequence[str],
    check: Callable[[], None],
) -> None:
    """Puts the files of a folder in the place of what is below a URL.

    Args:
      folder: on this machine.
      url: where they go.
      command: that writes them, the words after `mmfree`.
      earlier: names of the objects there; those that are not written anew are deleted.
      last: names of files that go after the others, in this order; deleted first.
      check: raises if this process may write there no more.

    Raises:
      StorageError: the bucket refuses, or cannot be reached; what is there is marked.
    """
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    check()
    mark_uploading(url, command, files | (earlier - {UPLOADING}))
    for name in last:
        if name in earlier:
            check()
            delete(url / name)
    for name in [*sorted(files.difference(last)), *last]:
        check()
        upload(folder / name, url / name)
    for name in sorted(earlier - files - {UPLOADING}):
        check()
        delete(url / name)
    check()
    delete(url / UPLOADING)
