"""Orbax on URLs: GCS as it is, S3 by the same way.

Orbax 0.12 writes arrays to GCS by TensorStore, and the few files beside them by epath and gcsfs.
TensorStore and epath know S3 too, but Orbax takes `s3://` for a folder of this machine: three of
its private functions, each of a few lines, decide that, and are replaced here.
`tests/mmfree_jax/train/test_bucket_runs.py` trains on both.
"""

import functools
import os
import posixpath
from importlib import import_module
from typing import Any

from etils.epath.backend import fsspec_backend
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from mmfree_jax.storage import Url, check_extra, is_url, parse_url


def prepare(url: Url) -> None:
    """Lets Orbax read and write below `url`; called before each time that it does.

    Raises:
      ConfigError: the package for its scheme is not installed.
    """
    check_extra(url)
    if url.scheme == "gs":
        if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):  # which TensorStore does not ask
            address = emulator if "://" in emulator else f"http://{emulator}"
            os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", address)
    else:
        _teach_s3()
        _forget_clients()


def _forget_clients() -> None:
    """Makes epath read credentials anew, which keeps its client of S3 as long as the process."""
    fsspec_backend._get_filesystem.cache_clear()
    import_module("s3fs").S3FileSystem.clear_instance_cache()


@functools.cache
def _teach_s3() -> None:
    of_gcs = gcs_utils.get_kvstore_for_gcs

    def normalise(path: str) -> str:
        return str(parse_url(path)) if is_url(path) else posixpath.normpath(path)

    def kvstore(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return of_gcs(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
        spec |= {"aws_region": region} if region else {}
        if os.environ.get(
            "AWS_ACCESS_KEY_ID"
        ):  # others are looked for with an error each on stderr
            spec |= {"aws_credentials": {"type": "environment"}}
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return spec | ({"endpoint": endpoint} if endpoint else {})

    gcs_utils._GCS_PATH_PREFIX = ("gs://", "s3://")
    gcs_utils.get_kvstore_for_gcs = kvstore
    tensorstore_utils._use_gcs_driver = is_url
    tensorstore_utils._normalize_path = normalise
