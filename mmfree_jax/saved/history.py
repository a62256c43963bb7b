"""Reading a run's metrics.jsonl; `train.metrics` says what is in a record and writes it."""

from pathlib import Path
from typing import Any

from mmfree_jax.errors import TrainingError
from mmfree_jax.readable import brief
from mmfree_jax.text_files import parse_json, read_bytes

Record = dict[str, Any]
_LARGEST = 2**32
_NUMBERS = ("step", "tokens", "time_s", "loss")
"""Fields that are numbers in every record that has them; a number that is missing is null."""


def read_history(path: Path) -> list[Record]:
    """The records in a metrics.jsonl; a torn last line is left out.

    Raises:
      TrainingError: the file cannot be read, or another line is not a JSON object, or has something
        else than a number as its step, tokens, time or loss.
    """
    try:
        lines = read_bytes(path, _LARGEST).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as e:
        raise TrainingError(f"{path}: {e.strerror}; restore the file or move it away") from e
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as e:
            if number == len(lines):  # no newline after it: the writer was killed
                break
            raise TrainingError(
                f"{path}, line {number} is not JSON: restore the file or move it away"
            ) from e
        for name in _NUMBERS:
            value = record.get(name)
            if value is not None and type(value) not in (int, float):
                raise TrainingError(
                    f"{path}, line {number}: {name} is {brief(value)}, not a number: restore the "
                    "file or move it away"
                )
        records.append(record)
    return records
