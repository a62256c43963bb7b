"""fsspec's file systems for buckets."""

import functools
import os
import threading
from typing import Any

from mmfree_jax.environment import seconds_of
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.storage.urls import Url

_MODULES = {"gs": "gcsfs", "s3": "s3fs"}
_EXTRAS = {"gs": "gcs", "s3": "s3"}
TIMEOUT = "MMFREE_STORAGE_SECONDS"
"""Environment variable: seconds that the answer to one try may take, 60 if it is not set."""
_LOCK = threading.Lock()


def check_extra(url: Url) -> None:
    """Refuses a URL whose package is not installed.

    Raises:
      ConfigError: says which extra to install.
    """
    extra = _EXTRAS[url.scheme]
    import_optional(_MODULES[url.scheme], f"{url} (extra {extra})", install_command(extra))


@functools.cache
def _file_system(scheme: str, endpoint: str | None, seconds: float, process: int) -> Any:
    """fsspec's file system, which tries everything once; one for each process, as its threads."""
    if scheme == "gs":
        core = import_optional("gcsfs", "gs://", install_command("gcs")).core.GCSFileSystem
        # Zonal buckets, which `gcsfs.GCSFileSystem` adds, are asked for by gRPC each time.
        token = "anon" if endpoint else None
        found = core(
            token=token,
            use_listings_cache=False,
            skip_instance_cache=True,
            requests_timeout=seconds,
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
            "connect_timeout": seconds,
            "read_timeout": seconds,
        },
    )
    found.retries = 1
    return found


def open_file_system(url: Url) -> Any:
    """The file system of fsspec that a URL lies in."""
    check_extra(url)
    variable = "STORAGE_EMULATOR_HOST" if url.scheme == "gs" else "AWS_ENDPOINT_URL"
    with _LOCK:
        return _file_system(url.scheme, os.environ.get(variable), seconds_of(TIMEOUT), os.getpid())


def forget_file_systems() -> None:
    """Makes new ones when they are next asked for, which read credentials anew."""
    with _LOCK:
        _file_system.cache_clear()
