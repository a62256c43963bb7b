"""Write results whole or not at all: JSON, CSV and PNG."""

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside the target, force to disk, rename.

    Raises:
        ScalingError: the folder is missing or cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ScalingError(f"{path}: cannot be written ({error.strerror}); choose another place "
                           "with --out") from None  # fmt: skip


def plain(value: Any) -> Any:
    """Numpy values to JSON's own types; numbers that JSON lacks become null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document, atomically."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode())


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows as CSV, atomically; columns in order of first appearance."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    import platform
    from importlib import metadata

    def of(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "checkout"

    return {"mmfree-jax": of("mmfree-jax"), "numpy": of("numpy"), "scipy": of("scipy"),
            "python": platform.python_version()}  # fmt: skip
