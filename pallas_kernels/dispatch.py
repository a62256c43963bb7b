"""Which implementation was measured fastest, by device kind, op, dtype and shape.

`choices.json` is written by `mmfree bench kernels --choices`. A device kind that is not in it
has not been measured, and takes the XLA path; one with "same_as" takes that kind's winners for
ops of which it has none of its own. A winner that Pallas-Triton would have to compile is none where
there is no Pallas-Triton.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import triton

# The implementations that Pallas-Triton compiles.
_BY_TRITON = ("pallas_triton",)
TABLE = Path(__file__).with_name("choices.json")


def measured_best(
    op: str, shape: Sequence[int], *, device_kind: str, dtype: str = "bfloat16"
) -> str | None:
    """The implementation that won at the measured shape nearest to this one.

    Near is the least sum of |log2| of the sizes' ratios, so that a shape stands for its octave.

    Args:
      op: name of the op's folder.
      shape: the sizes that the op keys its choice by, in the table's order.
      device_kind: JAX's name of the device, in full.
      dtype: of the op's float arguments; one that was not measured stands with bfloat16.

    Returns:
      A name; None where the device or the op has not been measured, or the winner does not run.
    """
    measured = _rows(op, device_kind, dtype) or _rows(op, device_kind, "bfloat16")
    if not measured:
        return None

    def distance(entry: tuple[tuple[int, ...], str]) -> float:
        pairs = zip(entry[0], shape, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs)

    winner = min(measured, key=distance)[1]
    return None if winner in _BY_TRITON and not triton.serves() else winner


@functools.cache
def _rows(op: str, device_kind: str, dtype: str) -> tuple[tuple[tuple[int, ...], str], ...]:
    devices = json.loads(TABLE.read_text(encoding="utf-8"))
    device = devices.get(device_kind, {})
    alike = devices.get(device.get("same_as"), {})
    rows = device.get(op, alike.get(op, {})).get(dtype, {})
    return tuple(
        (tuple(map(int, shape.split(" x "))), row["implementation"]) for shape, row in rows.items()
    )


def choose(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """op -> dtype -> shape -> the fastest implementation, with the milliseconds of each.

    Args:
      rows: of the ops' benchmarks; those with a true "candidate" count, under their "key" and
        "dtype". Passes and forms at one shape are added up, and a candidate must have run in all,
        to results that are finite.
    """
    times: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.get("candidate") and "ms" in row and math.isfinite(row.get("differ", 0.0)):
            shape = " x ".join(map(str, row["key"]))
            key = (row["op"].split()[0], row["dtype"], shape)
            times.setdefault(key, {}).setdefault(row["variant"], []).append(row["ms"])
    table: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for (op, dtype, shape), of in times.items():
        complete = max(map(len, of.values()))
        ms = {name: round(sum(t), 5) for name, t in of.items() if len(t) == complete}
        entry = {"implementation": min(ms, key=lambda name: ms[name]), "ms": ms}
        table.setdefault(op, {}).setdefault(dtype, {})[shape] = entry
    return table
