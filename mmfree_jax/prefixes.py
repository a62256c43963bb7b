"""Folders in buckets: all objects below a URL.

A folder that a command writes is uploaded object by object, so that it is not there at once. What
makes up for that: `UPLOADING` is made first and deleted last, the file that completes it goes last,
and a reader that finds the former, or not the latter, says so. Nothing here imports JAX.
"""

from typing import Any

from mmfree_jax.errors import StorageError
from mmfree_jax.storage import (
    MissingError,
    Url,
    check_bucket,
    find_object,
    list_names,
    read_bytes,
)
from mmfree_jax.text_files import LARGEST, parse_json

UPLOADING = ".mmfree-uploading.json"


def read_json(url: Url) -> Any:
    """The value in an object.

    Raises:
      MissingError: there is none.
      ValueError: it is no JSON.
      StorageError: it is far too large, or cannot be read.
    """
    found = find_object(url)
    if found is None:
        raise MissingError(f"{url} does not exist")
    if found.size > LARGEST:
        raise StorageError(f"{url} has {found.size} bytes, more than a text may: check its name")
    return parse_json(read_bytes(url))


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
