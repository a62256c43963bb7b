"""Reading a run's metrics.jsonl; `train.metrics` says what is in a record and writes it."""

import json
from pathlib import Path
from typing import Any

from mmfree_jax.errors import TrainingError

Record = dict[str, Any]


def read_history(path: Path) -> list[Record]:
    """The records in a metrics.jsonl; a torn last line is left out.

    Raises:
      TrainingError: another line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as e:
            if number == len(lines):  # no newline after it: the writer was killed
                break
            raise TrainingError(
                f"{path}, line {number} is not JSON: restore the file or move it away"
            ) from e
        records.append(record)
    return records
