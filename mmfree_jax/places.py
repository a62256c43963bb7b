"""Which files and folders a setting may name: those of this machine, and for some also buckets.

A setting that names one is a `Place` or a `pathlib.Path`, which are of this machine, or a
`PlaceOrUrl`, which may lie in a bucket too (`storage`). All are checked where numbers are
(`ranges.check_values`): on the command line, in config files and in job files. What writes
(`files.py`) asks again, so that no folder called `gs:` ever appears.
"""

import os
import re
import typing
from pathlib import Path, PurePath
from typing import Annotated, Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.storage import SCHEMES, Url, find_object, is_url, parse_url

_LOCAL = "a place on this machine"
Place = Annotated[str, _LOCAL]
"""A file or a folder of this machine, as text."""
_OR_URL = "or in a bucket"
PlaceOrUrl = Annotated[str, _LOCAL, _OR_URL]
"""A file or a folder of this machine, or a place in a bucket by its URL, as text."""

# pathlib makes gs:/bucket of gs://bucket. One letter before the colon is a drive of Windows.
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/|\s*(gs|gcs|s3|hf|file|https?):", re.IGNORECASE)
_WAYS_OUT = {
    "file": "give the path alone, without file://",
    "hf": "download it (hf download) and give the folder",
    "http": "download it and give the file",
    "https": "download it and give the file",
}
_A_COPY = "give a local folder, such as a mounted bucket, or a copy"


def _scheme(path: str | os.PathLike[str]) -> str | None:
    found = _URL.match(os.fspath(path))
    return None if found is None else (found[1] or found[2]).lower()


def check_place(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL of what is no bucket, and one that is malformed.

    Args:
      path: what was given.
      name: what a message calls it.

    Raises:
      ConfigError: it is such a URL.
    """
    scheme = _scheme(path)
    if scheme in SCHEMES:
        parse_url(path, name)
    elif scheme is not None:
        way_out = _WAYS_OUT.get(scheme, f"{_A_COPY}, or gs:// or s3://")
        raise ConfigError(
            f"{name} is {os.fspath(path)!r}: URLs of {scheme}: are not supported; {way_out}"
        )


def check_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL where a file or folder of this machine is wanted.

    Args:
      path: what was given.
      name: what a message calls it.

    Raises:
      ConfigError: it begins as a URL does.
    """
    scheme = _scheme(path)
    if scheme is not None:
        way_out = _WAYS_OUT.get(scheme, _A_COPY)
        raise ConfigError(
            f"{name} is {os.fspath(path)!r}: it must be on this machine, and takes no URL; "
            f"{way_out}"
        )


def locate(path: str | os.PathLike[str] | Url, name: str) -> Path | Url:
    """What a place that may lie in a bucket names.

    Args:
      path: what was given; a `Url` is that place itself.
      name: what a message calls it.

    Raises:
      ConfigError: it is a URL of what is no bucket, or malformed.
    """
    if isinstance(path, Url):
        return path
    check_place(path, name)
    return parse_url(path, name) if is_url(path) else Path(path)


def is_file(place: Path | Url) -> bool:
    """Whether a file, or an object, is there to be read; a folder is none.

    Raises:
      StorageError: the bucket refuses, or cannot be reached.
    """
    return find_object(place) is not None if isinstance(place, Url) else place.is_file()


def is_taken(place: Path | Url) -> bool:
    """Whether anything has this name: a file, a folder, a link that leads nowhere, an object.

    Raises:
      StorageError: the bucket refuses, or cannot be reached.
    """
    return find_object(place) is not None if isinstance(place, Url) else os.path.lexists(place)


def is_place(hint: Any) -> bool:
    """Whether an annotation is a place or a path, also within a union, a tuple or a list."""
    if typing.get_origin(hint) is Annotated:
        return _LOCAL in hint.__metadata__ or is_place(hint.__origin__)
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return True
    return any(map(is_place, typing.get_args(hint)))


def takes_url(hint: Any) -> bool:
    """Whether an annotation is a `PlaceOrUrl`, also within a union, a tuple or a list."""
    if typing.get_origin(hint) is Annotated:
        return _OR_URL in hint.__metadata__ or takes_url(hint.__origin__)
    return any(map(takes_url, typing.get_args(hint)))


def places(value: Any) -> list[str | os.PathLike[str]]:
    """The places that a setting names: one, several or none."""
    if isinstance(value, (tuple, list)):
        return [place for part in value for place in places(part)]
    return [value] if isinstance(value, (str, os.PathLike)) else []
