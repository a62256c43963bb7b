"""`export.json`: what an exported folder holds, and the checks before it is used."""

import json
import os
import re
from pathlib import Path
from typing import Any

from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import sha256_file, write_text
from mmfree_jax.json_shape import digest, fault
from mmfree_jax.text_files import read_json

FILE = "export.json"
FORMAT = "mmfree-onnx"
STABLEHLO = "mmfree-stablehlo"
VERSION = 1
_SELF = "sha256"
# The types of what programs read.
_FIELDS: dict[str, Any] = {"files": dict, "state_shape": [int], "vocab_size": int}
_TOKEN_ID = (int, type(None))
_OF_FORMAT: dict[str, dict[str, Any]] = {
    FORMAT: {
        "onnxruntime": str,
        "graph": str,
        "tokenizer": (str, type(None)),
        "bos_token_id": _TOKEN_ID,
        "eos_token_id": _TOKEN_ID,
        "start_ids": [int],
    },
    STABLEHLO: {"chunk": int, "jax": str},
}
# The first release whose CPU kernels read two-bit weights. Older ones unpack each matrix to float32
# at every call: with 1.28.0 a token of 370M took 1,100 ms where 1.29.0 took 24.
ONNXRUNTIME = "1.29.0"


def file_entry(path: Path) -> dict[str, int | str]:
    """Size and checksum of a file, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write(folder: Path, file_format: str, values: dict[str, Any]) -> int:
    """Writes the manifest, with a digest of itself; returns its size (bytes)."""
    values = json.loads(json.dumps({"format": file_format, "version": VERSION, **values}))
    text = json.dumps(values | {_SELF: digest(values)}, indent=2) + "\n"
    write_text(folder / FILE, text)
    return len(text.encode())


def read(folder: str | os.PathLike[str], *, file_format: str = FORMAT) -> dict[str, Any]:
    """The manifest of an exported folder.

    Args:
      folder: exported.
      file_format: that it must have.

    Raises:
      CheckpointError: there is none, or it is damaged, of another format or too new. Earlier
        exports have no digest; the types of what is read are checked in any.
    """
    path = Path(folder) / FILE
    try:
        manifest = read_json(path)
    except OSError as e:
        raise CheckpointError(
            f"{path}: {e.strerror}; give a folder that `mmfree export` wrote"
        ) from e
    except ValueError as e:
        raise CheckpointError(f"{path} is damaged (not valid JSON): export again") from e
    wrong = fault(manifest, {"format": str, "version": int})
    if not wrong and manifest["format"] != file_format:
        raise CheckpointError(
            f"{path} is of format {manifest['format']!r}: give a folder of format {file_format!r}"
        )
    if not wrong and manifest["version"] > VERSION:
        raise CheckpointError(
            f"{path} has version {manifest['version']}: this program reads up to {VERSION}; "
            "install a newer mmfree-jax"
        )
    wrong = wrong or fault(manifest, _FIELDS | _OF_FORMAT[file_format])
    for name, entry in {} if wrong else manifest["files"].items():
        wrong = wrong or fault(entry, {"bytes": int, "sha256": str}, name)
    found = None if wrong else manifest.pop(_SELF, None)
    if not wrong and found not in (None, digest(manifest)):
        wrong = "it does not match its own checksum"
    if wrong:
        raise CheckpointError(f"{path} is damaged ({wrong}): export again")
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
