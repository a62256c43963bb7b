"""`export.json`: what an exported folder holds, and the checks before it is used."""

import json
import os
import re
from pathlib import Path
from typing import Any

from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import sha256_file

FILE = "export.json"
FORMAT = "mmfree-onnx"
VERSION = 1
# The first release whose CPU kernels read two-bit weights. Older ones unpack each matrix to float32
# at every call: with 1.28.0 a token of 370M took 1,100 ms where 1.29.0 took 24.
ONNXRUNTIME = "1.29.0"


def file_entry(path: Path) -> dict[str, int | str]:
    """Size and checksum of a file, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read(folder: str | os.PathLike[str], *, file_format: str = FORMAT) -> dict[str, Any]:
    """The manifest of an exported folder.

    Args:
      folder: exported.
      file_format: that it must have.

    Raises:
      CheckpointError: there is none, or it is damaged, of another format or too new.
    """
    path = Path(folder) / FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, version = manifest["format"], int(manifest["version"])
        for field in ("files", "state_shape", "vocab_size"):
            if field not in manifest:
                raise KeyError(field)
    except OSError as e:
        raise CheckpointError(
            f"{path}: {e.strerror}; give a folder that `mmfree export` wrote"
        ) from e
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged ({e}): export again") from e
    if found != file_format:
        raise CheckpointError(
            f"{path} is of format {found!r}: give a folder of format {file_format!r}"
        )
    if version > VERSION:
        raise CheckpointError(
            f"{path} has version {version}: this program reads up to {VERSION}; install a newer "
            "mmfree-jax"
        )
    return manifest


def verify(folder: str | os.PathLike[str], manifest: dict[str, Any], *, checksums: bool) -> None:
    """Compares the folder's files with the manifest.

    Args:
      folder: exported.
      manifest: of the folder.
      checksums: read every file, not only its size.

    Raises:
      CheckpointError: names the first file that is missing, truncated or altered.
    """
    for name, entry in manifest["files"].items():
        path = Path(folder) / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: copy or export the folder again")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes, not {entry['bytes']}: it is truncated or altered; copy "
                "or export the folder again"
            )
        if checksums and file_entry(path)["sha256"] != entry["sha256"]:
            raise CheckpointError(
                f"{path} does not match its checksum: copy or export the folder again"
            )


def check_runtime(found: str, manifest: dict[str, Any]) -> None:
    """Refuses a runtime without the kernels that the graph needs.

    Args:
      found: version of the installed onnxruntime.
      manifest: of the folder.

    Raises:
      ConfigError: names both versions.
    """
    needed = manifest["onnxruntime"].removeprefix(">=")
    if _numbers(found) < _numbers(needed):
        raise ConfigError(
            f"onnxruntime is {found}: the export needs {needed} or newer, the first with kernels "
            f"for two-bit weights; run pip install 'onnxruntime>={needed}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
