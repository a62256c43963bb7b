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

from mmfree_jax.storage.failures import ChangedError, MissingError
from mmfree_jax.storage.file_systems import check_extra
from mmfree_jax.storage.objects import (
    Object,
    check_bucket,
    create,
    delete,
    delete_below,
    download,
    find_object,
    list_below,
    list_names,
    read_bytes,
    replace,
    upload,
    write_bytes,
)
from mmfree_jax.storage.retries import PATIENT, Patience
from mmfree_jax.storage.urls import SCHEMES, Url, is_url, parse_url

__all__ = [
    "PATIENT",
    "SCHEMES",
    "ChangedError",
    "MissingError",
    "Object",
    "Patience",
    "Url",
    "check_bucket",
    "check_extra",
    "create",
    "delete",
    "delete_below",
    "download",
    "find_object",
    "is_url",
    "list_below",
    "list_names",
    "parse_url",
    "read_bytes",
    "replace",
    "upload",
    "write_bytes",
]
