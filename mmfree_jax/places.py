"""Which files and folders a setting may name: those of this machine's file systems.

A setting that names one is a `Place`, or a `pathlib.Path`. Both are checked where numbers are
(`ranges.check_values`): on the command line, in config files and in job files. What writes
(`files.py`) asks again, so that no folder called `gs:` ever appears.
"""

import os
import re
import typing
from pathlib import PurePath
from typing import Annotated, Any

from mmfree_jax.errors import ConfigError

_LOCAL = "a place on this machine"
Place = Annotated[str, _LOCAL]
"""A file or a folder, as text."""

# pathlib makes gs:/bucket of gs://bucket. One letter before the colon is a drive of Windows.
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+):/|\s*(gs|gcs|s3|hf|file|https?):", re.IGNORECASE)
_WAYS_OUT = {
    "file": "give the path alone, without file://",
    "hf": "download it (hf download) and give the folder",
    "http": "download it and give the file",
    "https": "download it and give the file",
}


def check_local(path: str | os.PathLike[str], name: str) -> None:
    """Refuses a URL where a file or folder is wanted.

    Args:
      path: what was given.
      name: what a message calls it.

    Raises:
      ConfigError: it begins as a URL does.
    """
    found = _URL.match(os.fspath(path))
    if found is None:
        return
    scheme = (found[1] or found[2]).lower()
    way_out = _WAYS_OUT.get(scheme, "give a local folder, such as a mounted bucket, or a copy")
    raise ConfigError(
        f"{name} is {os.fspath(path)!r}: object storage and URLs are not supported yet; {way_out}"
    )


def is_place(hint: Any) -> bool:
    """Whether an annotation is a place or a path, also within a union, a tuple or a list."""
    if typing.get_origin(hint) is Annotated:
        return _LOCAL in hint.__metadata__ or is_place(hint.__origin__)
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return True
    return any(map(is_place, typing.get_args(hint)))


def places(value: Any) -> list[str | os.PathLike[str]]:
    """The places that a setting names: one, several or none."""
    if isinstance(value, (tuple, list)):
        return [place for part in value for place in places(part)]
    return [value] if isinstance(value, (str, os.PathLike)) else []
