"""What went wrong in a bucket, read from the errors of half a dozen packages."""

from typing import NoReturn

from mmfree_jax.errors import StorageError
from mmfree_jax.storage.urls import Url

_VARIABLES = {
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`",
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE",
}


class MissingError(StorageError):
    """There is no such object."""


class ChangedError(StorageError):
    """An object is there, or is of another version, where a write was to depend on that."""


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
    "ResponseStreamingError", "Timeout", "TimeoutError", "TransportError", "ShortReadError",
}  # fmt: skip
_REFUSED = {"DefaultCredentialsError", "NoCredentialsError", "PermissionError", "RefreshError"}


class ShortReadError(Exception):
    """Fewer bytes came than there are."""


class ChecksumError(Exception):
    """Other bytes are there than were sent; gcsfs's own has the same name."""


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def passes(error: BaseException) -> bool:
    """Whether another try may succeed."""
    status = _status(error)
    if status is not None:
        return status in (408, 409, 429) or status >= 500
    return not _names(error).isdisjoint(_PASSING)


def is_refused(error: BaseException) -> bool:
    """Whether it is about who asks: credentials, or what they may do."""
    forbidden = _status(error) in (401, 403) or str(error).startswith("Forbidden:")
    return forbidden or not _names(error).isdisjoint(_REFUSED)


def _has_changed(error: BaseException) -> bool:
    return isinstance(error, FileExistsError) or _status(error) == 412


def reason(error: BaseException) -> str:
    """What an error says, for a message."""
    text = " ".join(str(error).split())[:200].rstrip(". ")
    return text or type(error).__name__


def fail(url: Url, act: str, error: BaseException) -> NoReturn:
    """Raises what an error that does not pass comes to.

    Args:
      url: of the object.
      act: what was to be done with it: "read", "written", "deleted".
      error: of fsspec's file system.
    """
    if isinstance(error, FileNotFoundError):
        raise MissingError(f"{url} does not exist") from error
    if _has_changed(error):
        raise ChangedError(f"{url} was written by another job") from error
    if is_refused(error):
        raise StorageError(
            f"{url} cannot be {act}: permission denied or credentials expired "
            f"({reason(error)}): renew {_VARIABLES[url.scheme]}, and see that they may use the "
            "bucket"
        ) from error
    raise StorageError(f"{url} cannot be {act} ({reason(error)}): check its name") from error
