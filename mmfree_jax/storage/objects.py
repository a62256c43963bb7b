"""Objects: found, read, written, listed and deleted."""

import base64
import errno
import hashlib
import mimetypes
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmfree_jax.errors import StorageError
from mmfree_jax.storage.failures import ChangedError, ChecksumError, MissingError, ShortReadError
from mmfree_jax.storage.retries import PATIENT, Patience, ask
from mmfree_jax.storage.urls import Url

T = TypeVar("T")
_ONE_REQUEST = 5 * 2**20
"""What is shorter goes to GCS in one request, as gcsfs has it."""


@dataclass(frozen=True)
class Object:
    """An object that is there."""

    url: Url
    size: int
    """Bytes."""
    version: str
    """GCS: the generation. S3: the ETag."""


def _object(url: Url, info: dict[str, Any]) -> Object:
    version = info.get("generation") if url.scheme == "gs" else info.get("ETag")
    return Object(url, int(info["size"]), str(version))


def find_object(url: Url, *, patience: Patience = PATIENT) -> Object | None:
    """An object's size and version; None: there is none of that name.

    Raises:
      StorageError: the store refuses, or cannot be reached.
    """

    def look(fs: Any) -> Object | None:
        info = fs.info(url.path)
        return None if info["type"] == "directory" else _object(url, info)

    try:
        return ask(url, "read", look, patience)
    except MissingError:
        return None


def read_bytes(
    url: Url, start: int = 0, end: int | None = None, *, patience: Patience = PATIENT
) -> bytes:
    """The bytes of an object, or those from `start` up to `end`.

    Raises:
      MissingError: there is none.
      StorageError: the store refuses, cannot be reached, or has fewer bytes.
    """

    def read(fs: Any) -> bytes:
        if end is None and not start:
            return fs.cat_file(url.path)
        if end is not None and end <= start:
            return b""
        data = fs.cat_file(url.path, start=start, end=end)
        if end is not None and len(data) != end - start:
            raise ShortReadError(f"{len(data)} of {end - start} bytes")
        return data

    return ask(url, "read", read, patience)


def download(url: Url, path: Path, *, patience: Patience = PATIENT) -> None:
    """Copies an object into the file `path`, whose folder is there.

    Raises:
      MissingError, StorageError: as `read_bytes`.
      OSError: the file cannot be written.
    """

    def get(fs: Any) -> OSError | None:
        size = fs.info(url.path)["size"]
        try:
            fs.get_file(url.path, str(path))
        except OSError as e:
            if _is_of_disk(e, path):
                return e
            raise
        if path.stat().st_size != size:
            raise ShortReadError(f"{path.stat().st_size} of {size} bytes")
        return None

    if (failed := ask(url, "read", get, patience)) is not None:
        raise failed


def _is_of_disk(error: OSError, path: Path) -> bool:
    """Whether an error is of the file `path`, and not of the bucket."""
    full = error.errno in (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS)
    return full or error.filename == str(path)


def write_bytes(url: Url, data: bytes, *, patience: Patience = PATIENT) -> None:
    """Makes or replaces an object.

    Raises:
      StorageError: the store refuses, or cannot be reached; what was there is as it was.
    """
    _in_bucket(url, "written", lambda fs: _put(fs, url, data), patience)


def _checked(url: Url) -> dict[str, str]:
    """Makes gcsfs compare the MD5 that it is told with its own; s3fs sends a checksum."""
    return {"consistency": "md5"} if url.scheme == "gs" else {}


def _put(fs: Any, url: Url, data: bytes) -> None:
    # Not what is empty: emulators take no request without a body.
    if url.scheme == "gs" and 0 < len(data) < _ONE_REQUEST:
        _put_in_one_request(fs, url, data)
    else:
        fs.pipe_file(url.path, data, **_checked(url))


def _type_of(url: Url) -> str:
    """What browsers take the object for; never JSON, which emulators parse and do not keep."""
    guessed = mimetypes.guess_type(url.key)[0]
    return guessed if guessed and "json" not in guessed else "application/octet-stream"


def _put_in_one_request(fs: Any, url: Url, data: bytes, **conditions: str) -> str:
    """Writes an object of GCS; its version.

    gcsfs sends what is small between the boundaries of a multipart body, which begin with a line
    feed alone: of data that end with a carriage return a server may take that for part of them.
    """
    answer = fs.call(
        "POST",
        f"{fs.base.removesuffix('storage/v1/')}upload/storage/v1/b/{urllib.parse.quote(url.bucket)}/o",
        uploadType="media",
        name=url.key,
        data=data,
        headers={"Content-Type": _type_of(url)},
        json_out=True,
        **conditions,
    )
    md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
    if answer.get("md5Hash", md5) != md5:
        raise ChecksumError("other bytes have come than were sent")
    return str(answer["generation"])


def upload(path: Path, url: Url, *, patience: Patience = PATIENT) -> None:
    """Copies a file into an object; see `write_bytes`.

    Raises:
      StorageError: as `write_bytes`.
      OSError: the file cannot be read.
    """

    def put(fs: Any) -> OSError | None:
        try:
            if url.scheme == "gs" and path.stat().st_size < _ONE_REQUEST:
                _put(fs, url, path.read_bytes())
            else:
                fs.put_file(str(path), url.path, **_checked(url))
        except OSError as e:
            if _is_of_disk(e, path):
                return e
            raise
        return None

    if (failed := _in_bucket(url, "written", put, patience)) is not None:
        raise failed


def _in_bucket(url: Url, act: str, call: Callable[[Any], T], patience: Patience) -> T:
    """As `ask`; what is missing is the bucket."""
    try:
        return ask(url, act, call, patience)
    except MissingError as e:
        raise _no_bucket(url) from e


def _no_bucket(url: Url) -> StorageError:
    return StorageError(
        f"{url} cannot be used: there is no bucket {url.bucket!r} (or these credentials may not "
        "see it): make it, or give another"
    )


def create(url: Url, data: bytes, *, patience: Patience = PATIENT) -> str:
    """Makes an object that is not there yet; its version.

    What is there with the same contents counts as made by this call, whose answer may have been
    lost: two writers that must not take each other for themselves write different contents.

    Raises:
      ChangedError: it is there.
      StorageError: as `write_bytes`.
    """
    return _put_if(url, data, None, patience)


def replace(url: Url, data: bytes, version: str, *, patience: Patience = PATIENT) -> str:
    """Replaces an object if it is still of a version; its new one.

    Raises:
      ChangedError: it is of another, or gone.
      StorageError: as `write_bytes`.
    """
    return _put_if(url, data, version, patience)


def _put_if(url: Url, data: bytes, version: str | None, patience: Patience) -> str:
    def put(fs: Any) -> str:
        if url.scheme == "gs":
            return _put_in_one_request(fs, url, data, ifGenerationMatch=version or "0")
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        answer = fs.call_s3("put_object", Bucket=url.bucket, Key=url.key, Body=data, **condition)
        return answer["ETag"]

    try:
        return ask(url, "written", put, patience)
    except MissingError as e:
        if version is None:
            raise _no_bucket(url) from e
        raise ChangedError(f"{url} was deleted by another job") from e
    except ChangedError:
        # An earlier try (aiohttp has its own, too) may have succeeded, and its answer been lost.
        found = find_object(url, patience=patience)
        if found is None or read_bytes(url, patience=patience) != data:
            raise
        return found.version


def list_below(url: Url, *, patience: Patience = PATIENT) -> list[Object]:
    """The objects whose names begin with this one's and a slash, sorted by name.

    Raises:
      StorageError: there is no such bucket, it refuses, or cannot be reached.
    """

    def find(fs: Any) -> list[Object]:
        found = fs.find(f"{url.path}/", detail=True)
        objects = [
            _object(Url(url.scheme, url.bucket, path.partition("/")[2]), info)
            for path, info in found.items()
        ]
        below = f"{url.key}/" if url.key else ""
        return sorted((o for o in objects if o.url.key.startswith(below)), key=lambda o: o.url)

    return _in_bucket(url, "listed", find, patience)


def list_names(url: Url, *, patience: Patience = PATIENT) -> list[str]:
    """The names just below, as a folder has them: of objects, and parts of longer names; sorted.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """

    def ls(fs: Any) -> list[str]:
        found = [path.rstrip("/") for path in fs.ls(f"{url.path}/", detail=False)]
        return sorted({path.rpartition("/")[2] for path in found if path != url.path})

    try:
        return ask(url, "read", ls, patience)
    except MissingError:
        return []


def delete(url: Url, *, patience: Patience = PATIENT) -> None:
    """Deletes an object, if there is one.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """
    try:
        ask(url, "deleted", lambda fs: fs.rm_file(url.path), patience)
    except MissingError:
        return


def delete_below(url: Url, *, patience: Patience = PATIENT) -> None:
    """Deletes the objects that `list_below` lists.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """
    if paths := [found.url.path for found in list_below(url, patience=patience)]:
        ask(url, "deleted", lambda fs: fs.rm(paths), patience)


def check_bucket(url: Url, *, patience: Patience = PATIENT) -> None:
    """Sees that the bucket of a URL is there and may be read.

    Raises:
      ConfigError: the package for its scheme is not installed.
      StorageError: there is none, it refuses (as that of another project does), or cannot be
        reached.
    """

    def look(fs: Any) -> object:
        if url.scheme == "gs":
            return fs.call("GET", f"b/{url.bucket}/o", maxResults=1)
        return fs.call_s3("list_objects_v2", Bucket=url.bucket, MaxKeys=1)

    _in_bucket(url, "used", look, patience)
