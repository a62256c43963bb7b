"""URLs of buckets and of what lies in them."""

import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from mmfree_jax.errors import ConfigError

SCHEMES = ("gs", "s3")
# pathlib makes gs:/bucket of gs://bucket.
_URL = re.compile(r"\s*(gs|s3):/{1,2}([^/]*)(?:/(.*))?", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
_LONGEST_KEY = 1024
"""Bytes, of either store."""


@dataclass(frozen=True, order=True)
class Url:
    """The place of an object, or of all objects below it."""

    scheme: str
    bucket: str
    key: str
    """As it is: nothing is percent-encoded; without a slash at its ends."""

    def __str__(self) -> str:
        """As it is given on the command line."""
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "Url":
        """The URL of what is called `name` below this."""
        return Url(self.scheme, self.bucket, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The name's last dot and what is behind it; "" where there is none, as of a path."""
        return PurePosixPath(self.name).suffix

    def with_suffix(self, suffix: str) -> "Url":
        """The URL beside this of the same name, but for its suffix."""
        before = self.key.removesuffix(self.suffix)
        return Url(self.scheme, self.bucket, f"{before}{suffix}")

    @property
    def path(self) -> str:
        """Bucket and key, as fsspec takes them."""
        return f"{self.bucket}/{self.key}".rstrip("/")


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL of a bucket, well formed or not."""
    return _URL.match(os.fspath(path)) is not None


def parse_url(text: str | os.PathLike[str], name: str = "URL") -> Url:
    """The place that a URL names.

    Args:
      text: the URL; a slash at its end does not count. No percent sign stands for another one.
      name: what a message calls it.

    Raises:
      ConfigError: it is no URL of a bucket, or malformed.
    """
    text = os.fspath(text)
    found = _URL.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name} is {text!r}: give gs://BUCKET/NAME or s3://BUCKET/NAME")
    scheme, bucket, key = found[1].lower(), found[2], (found[3] or "").removesuffix("/")
    if _BUCKET.fullmatch(bucket) is None:
        raise ConfigError(f"{name} is {text!r}: {bucket!r} is no name of a bucket")
    parts = key.split("/") if key else []
    if any(part in ("", ".", "..") for part in parts):
        raise ConfigError(
            f"{name} is {text!r}: leave out empty parts and `.` and `..`, which mean nothing in a "
            "bucket"
        )
    if not key.isprintable() or len(key.encode(errors="replace")) > _LONGEST_KEY:
        raise ConfigError(
            f"{name} is {text[:200]!r}: give a name of printable characters and {_LONGEST_KEY} "
            "bytes at most"
        )
    return Url(scheme, bucket, key)
