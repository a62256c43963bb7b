"""What runs logged, as series of numbers over their course."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mmfree_jax.errors import ConfigError, TrainingError
from mmfree_jax.saved.history import Record, read_history
from mmfree_jax.saved.run_directory import METRICS, load_config
from mmfree_jax.train.flops import count_flops

XAxis = Literal["steps", "tokens", "flops", "time"]
Kind = Literal["train", "eval", "tasks"]

_POSITIONS = {"steps": "step", "tokens": "tokens", "flops": "tokens", "time": "time_s"}


@dataclass(frozen=True)
class Series:
    """One metric of a run; float64 [N] each, in order of steps."""

    x: np.ndarray
    y: np.ndarray
    """NaN where it was not finite or not measured."""


@dataclass(frozen=True)
class RunMetrics:
    """The records of one run directory."""

    folder: Path
    records: dict[Kind, list[Record]]

    @property
    def logged(self) -> list[str]:
        """Names of its metrics, in alphabetical order."""
        names = {name for records in self.records.values() for r in records for name in r}
        return sorted(names - {"kind", *_POSITIONS.values()})

    def series(self, kind: Kind, metric: str, x: XAxis) -> Series:
        """A metric of the records of training, held-out loss ("eval") or tasks; maybe empty.

        Args:
          kind: of the records.
          metric: one of `logged`.
          x: in steps, tokens, FLOPs, or seconds of training.

        Raises:
          TrainingError: a value is no number, or a record lacks its position.
          ConfigError: the run's config.yaml, which FLOPs need, is missing or malformed.
        """
        path = self.folder / METRICS
        records = [r for r in self.records[kind] if metric in r]
        name = _POSITIONS[x]
        if any(r.get(name) is None for r in records):
            raise TrainingError(f"{path} has {kind} records without {name}: choose another --x")
        xs = np.array([_number(r, name, path) for r in records])
        if x == "flops" and records:
            config = load_config(self.folder)
            xs = xs * count_flops(config.model, config.data.seq_len).training
        return Series(xs, np.array([_number(r, metric, path) for r in records]))


def read_metrics(folder: Path) -> RunMetrics:
    """Reads a run directory's metrics.jsonl.

    Where the steps go back, what was logged beyond is dropped, as a resumed run does.

    Raises:
      ConfigError: there is none, or it holds no metrics.
      TrainingError: it is damaged.
    """
    path = folder / METRICS
    if not path.is_file():
        raise ConfigError(f"{path} is missing: give the folder of a training run")
    records: dict[Kind, list[Record]] = {"train": [], "eval": [], "tasks": []}
    for record in read_history(path):
        of_kind = next((records[kind] for kind in records if record.get("kind") == kind), None)
        if of_kind is None:
            continue
        step = _number(record, "step", path)
        while of_kind and _number(of_kind[-1], "step", path) >= step:
            of_kind.pop()
        of_kind.append(record)
    if not any(records.values()):
        raise ConfigError(f"{path} has no metrics: give the folder of a training run")
    return RunMetrics(folder, records)


def check_logged(metrics: Sequence[str], runs: Sequence[RunMetrics]) -> None:
    """Checks that each metric is in one of the runs at least.

    Raises:
      ConfigError: names those that are.
    """
    known = sorted({name for run in runs for name in run.logged})
    for metric in metrics:
        if metric not in known:
            close = difflib.get_close_matches(metric, known, n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise ConfigError(f"no run logged {metric!r}: {hint}There are {', '.join(known)}")


def _number(record: Record, name: str, path: Path) -> float:
    """A field of a record; NaN for null."""
    value = record.get(name)
    try:
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return float("nan" if value is None else value)
    except OverflowError:
        pass
    shown = f"{value!r}"[:40]
    raise TrainingError(f"{path}: {name} is {shown} in a record, not a number: restore the file")
