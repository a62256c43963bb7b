"""Write results whole or not at all: JSON, CSV and PNG."""

import csv
import io
import json
import math
from typing import Any

import numpy as np

from mmfree_jax.files import StrPath, write_bytes, write_text
from mmfree_jax.storage import Url


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


def write_json(path: StrPath | Url, value: Any) -> None:
    """Write a JSON document, atomically."""
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")


def write_csv(path: StrPath | Url, rows: list[dict]) -> None:
    """Write rows as CSV, atomically; columns in order of first appearance."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, header, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, stream.getvalue().encode())
