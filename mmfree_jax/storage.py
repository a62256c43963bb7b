"""Objects in buckets, by URL (gs://, s3://), through fsspec: gcsfs and s3fs.

    url = parse_url("gs://bucket/runs/a")   # a `Url`; `url / "config.yaml"`, `url.name`, `str(url)`
    is_url("s3://b/x")                      # also of a pathlib.Path, which makes it s3:/b/x
    read_bytes(url), read_bytes(url, 10, 20), download(url, path)
    write_bytes(url, data), upload(path, url)
    create(url, data), replace(url, data, version)    # conditional; `ChangedError`
    find_object(url)                        # its size and version, or None
    list_below(url), list_names(url)        # objects at any depth; names just below, as a folder's
    delete(url), delete_below(url)
    check_bucket(url)                       # it is there and may be used

What a bucket cannot do is not offered: nothing is renamed, appended to or locked (`leases.py` has
what replaces a lock). A write is whole or not there; a version is GCS's generation or S3's ETag.

Endpoints and credentials come from the usual variables (docs/storage.md). What may pass (no
connection, a time-out, a short read, statuses 408, 429 and 5xx) is tried again as `Patience` says;
then, and for anything else, there is a `StorageError` that names the object and the try. Nothing
here imports JAX, and fsspec is imported when the first URL is used.
"""

import contextlib
import functools
import os
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mmfree_jax.errors import ConfigError, StorageError
from mmfree_jax.installed import import_optional, install_command

T = TypeVar("T")

_MODULES = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRAS = {"gs": "gcs", "s3": "s3"}
SCHEMES = tuple(_MODULES)
_VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE",
}
# pathlib makes gs:/bucket of gs://bucket.
_URL = re.compile(r"\s*(gs|s3):/{1,2}([^/]*)(?:/(.*))?", re.IGNORECASE | re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,220}[A-Za-z0-9]")
TIMEOUT = "MMFREE_STORAGE_SECONDS"
"""Environment variable: seconds that the answer to one try may take, 60 if it is not set."""
_LONGEST_KEY = 1024
"""Bytes, of either store."""


class MissingError(StorageError):
    """There is no such object."""


class ChangedError(StorageError):
    """An object is there, or is of another version, where a write was to depend on that."""


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
    def path(self) -> str:
        """Bucket and key, as fsspec takes them."""
        return f"{self.bucket}/{self.key}".rstrip("/")


@dataclass(frozen=True)
class Object:
    """An object that is there."""

    url: Url
    size: int
    """Bytes."""
    version: str
    """GCS: the generation. S3: the ETag."""


@dataclass(frozen=True)
class Patience:
    """How often what may pass is tried, and how long is waited in between.

    Before try n + 1 it waits between a half and all of `first * 2 ** (n - 1)` seconds, `longest`
    at most.
    """

    tries: int = 6
    first: float = 0.5
    longest: float = 30.0
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.random
    """A number in [0, 1)."""

    def wait(self, failed: int) -> None:
        """Waits after try number `failed`."""
        limit = min(self.longest, self.first * 2 ** (failed - 1))
        self.sleep(limit * (0.5 + 0.5 * self.draw()))


PATIENT = Patience()


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


def check_extra(url: Url) -> None:
    """Refuses a URL whose package is not installed.

    Raises:
      ConfigError: says which extra to install.
    """
    extra = _EXTRAS[url.scheme]
    import_optional(_MODULES[url.scheme], f"{url} (extra {extra})", install_command(extra))


def _seconds() -> float:
    """How long an answer may take before the try counts as failed."""
    text = os.environ.get(TIMEOUT, "60")
    with contextlib.suppress(ValueError):
        if 0.1 <= float(text) <= 3600:
            return float(text)
    raise ConfigError(f"{TIMEOUT} is {text!r}: set a number of seconds from 0.1 to 3600")


@functools.cache
def _filesystem(scheme: str, endpoint: str | None, process: int) -> Any:
    """fsspec's file system, which tries everything once; one for each process, as its threads."""
    if scheme == "gs":
        core = import_optional("gcsfs", "gs://", install_command("gcs")).core.GCSFileSystem
        # Zonal buckets, which `gcsfs.GCSFileSystem` adds, are asked for by gRPC each time.
        token = "anon" if endpoint else None
        found = core(
            token=token,
            use_listings_cache=False,
            skip_instance_cache=True,
            requests_timeout=_seconds(),
        )
        for name in ("_request", "_get_file_request", "_get_file_concurrent"):
            if once := getattr(getattr(core, name, None), "__wrapped__", None):
                setattr(found, name, functools.partial(once, found))
        return found
    s3fs = import_optional("s3fs", "s3://", install_command("s3"))
    found = s3fs.S3FileSystem(
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            "connect_timeout": _seconds(),
            "read_timeout": _seconds(),
        },
    )
    found.retries = 1
    return found


_RENEWING = threading.Lock()


def _open(url: Url) -> Any:
    check_extra(url)
    variable = "STORAGE_EMULATOR_HOST" if url.scheme == "gs" else "AWS_ENDPOINT_URL"
    with _RENEWING:
        return _filesystem(url.scheme, os.environ.get(variable), os.getpid())


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of gcsfs or s3fs is about, if it tells."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)  # of botocore
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(getattr(error, "code", ""))  # of gcsfs
    return int(code) if code.isdecimal() else None


# By name, for their packages need not be installed.
_PASSING = {
    "ChecksumError", "ClientConnectionError", "ClientPayloadError", "ConnectionError",
    "FlexibleChecksumError", "HTTPClientError", "IncompleteRead", "ProxyError",
    "ResponseStreamingError", "Timeout", "TimeoutError", "TransportError", "_ShortReadError",
}  # fmt: skip
_REFUSED = {"DefaultCredentialsError", "NoCredentialsError", "PermissionError", "RefreshError"}


class _ShortReadError(Exception):
    """Fewer bytes came than there are."""


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _passes(error: BaseException) -> bool:
    """Whether another try may succeed."""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 429) or status >= 500
    return not _names(error).isdisjoint(_PASSING)


def _is_refused(error: BaseException) -> bool:
    forbidden = _status(error) in (401, 403) or str(error).startswith("Forbidden:")
    return forbidden or not _names(error).isdisjoint(_REFUSED)


def _has_changed(error: BaseException) -> bool:
    return isinstance(error, FileExistsError) or _status(error) == 412


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200].rstrip(". ")
    return text or type(error).__name__


def _fail(url: Url, act: str, error: BaseException) -> NoReturn:
    """Raises what an error that does not pass comes to."""
    if isinstance(error, FileNotFoundError):
        raise MissingError(f"{url} does not exist") from error
    if _has_changed(error):
        raise ChangedError(f"{url} was written by another job") from error
    if _is_refused(error):
        raise StorageError(
            f"{url} cannot be {act}: permission denied or credentials expired "
            f"({_reason(error)}): renew {_VARIABLES[url.scheme]}, and see that they may use the "
            "bucket"
        ) from error
    raise StorageError(f"{url} cannot be {act} ({_reason(error)}): check its name") from error


def _ask(url: Url, act: str, call: Callable[[Any], T], patience: Patience) -> T:
    """What `call` makes of the file system, tried again while the failure may pass.

    Raises:
      MissingError, ChangedError, StorageError: as the last try failed.
    """
    renewed, error = False, Exception()
    for number in range(1, patience.tries + 1):
        try:
            return call(_open(url))
        except ConfigError:
            raise
        except Exception as e:  # of half a dozen packages
            error = e
        if _is_refused(error) and not renewed:  # a new one reads the credentials anew
            renewed = True
            with _RENEWING:
                _filesystem.cache_clear()
        elif not _passes(error):
            _fail(url, act, error)
        if number < patience.tries:
            patience.wait(number)
    if _is_refused(error):
        _fail(url, act, error)
    raise StorageError(
        f"{url} cannot be {act}: try {patience.tries} of {patience.tries} failed "
        f"({_reason(error)}): see that the store can be reached, then run the command again"
    ) from error


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
        return _ask(url, "read", look, patience)
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
            raise _ShortReadError(f"{len(data)} of {end - start} bytes")
        return data

    return _ask(url, "read", read, patience)


def download(url: Url, path: Path, *, patience: Patience = PATIENT) -> None:
    """Copies an object into the file `path`, whose folder is there.

    Raises:
      MissingError, StorageError: as `read_bytes`.
    """

    def get(fs: Any) -> None:
        size = fs.info(url.path)["size"]
        fs.get_file(url.path, str(path))
        if path.stat().st_size != size:
            raise _ShortReadError(f"{path.stat().st_size} of {size} bytes")

    _ask(url, "read", get, patience)


def write_bytes(url: Url, data: bytes, *, patience: Patience = PATIENT) -> None:
    """Makes or replaces an object.

    Raises:
      StorageError: the store refuses, or cannot be reached; what was there is as it was.
    """
    _write(url, lambda fs: fs.pipe_file(url.path, data), patience)


def upload(path: Path, url: Url, *, patience: Patience = PATIENT) -> None:
    """Copies a file into an object; see `write_bytes`."""
    _write(url, lambda fs: fs.put_file(str(path), url.path), patience)


def _write(url: Url, call: Callable[[Any], T], patience: Patience) -> T:
    try:
        return _ask(url, "written", call, patience)
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
            answer = fs.call(
                "POST",
                f"{fs.base.removesuffix('storage/v1/')}upload/storage/v1/b/"
                f"{urllib.parse.quote(url.bucket)}/o",
                uploadType="media",
                name=url.key,
                ifGenerationMatch=version or "0",
                data=data,
                json_out=True,
            )
            return str(answer["generation"])
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        answer = fs.call_s3("put_object", Bucket=url.bucket, Key=url.key, Body=data, **condition)
        return answer["ETag"]

    try:
        return _ask(url, "written", put, patience)
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

    return _write(url, find, patience)


def list_names(url: Url, *, patience: Patience = PATIENT) -> list[str]:
    """The names just below, as a folder has them: of objects, and parts of longer names; sorted.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """

    def ls(fs: Any) -> list[str]:
        found = [path.rstrip("/") for path in fs.ls(f"{url.path}/", detail=False)]
        return sorted({path.rpartition("/")[2] for path in found if path != url.path})

    try:
        return _ask(url, "read", ls, patience)
    except MissingError:
        return []


def delete(url: Url, *, patience: Patience = PATIENT) -> None:
    """Deletes an object, if there is one.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """
    try:
        _ask(url, "deleted", lambda fs: fs.rm_file(url.path), patience)
    except MissingError:
        return


def delete_below(url: Url, *, patience: Patience = PATIENT) -> None:
    """Deletes the objects that `list_below` lists.

    Raises:
      StorageError: it refuses, or cannot be reached.
    """
    if paths := [found.url.path for found in list_below(url, patience=patience)]:
        _ask(url, "deleted", lambda fs: fs.rm(paths), patience)


def check_bucket(url: Url, *, patience: Patience = PATIENT) -> None:
    """Sees that the bucket of a URL is there and may be read.

    Raises:
      ConfigError: the package for its scheme is not installed.
      StorageError: there is none, it refuses (as that of another project does), or cannot be
        reached.
    """
    if url.scheme == "gs":
        _write(url, lambda fs: fs.call("GET", f"b/{url.bucket}/o", maxResults=1), patience)
    else:
        _write(
            url, lambda fs: fs.call_s3("list_objects_v2", Bucket=url.bucket, MaxKeys=1), patience
        )
