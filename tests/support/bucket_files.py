"""Folders in the buckets of the tests."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmfree_jax import storage


def put_folder(folder: Path, url: str) -> str:
    """Uploads the files below a folder; the URL."""
    for file in folder.rglob("*"):
        if file.is_file():
            storage.upload(file, storage.parse_url(f"{url}/{file.relative_to(folder)}"))
    return url


def do_not_wait(patch: pytest.MonkeyPatch) -> None:
    """Between tries nothing is waited, and there are three."""
    for name, value in (("first", 0.0), ("tries", 3)):
        patch.setitem(vars(storage.PATIENT), name, value)


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    """Waits until something has happened; fails if it does not."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
