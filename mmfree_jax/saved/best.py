"""Which of a run's checkpoints is the best, by a number that the run logged at their steps.

A metric's name is `eval_` and a field of the records of held-out loss (`eval_loss`, or of one
source `eval_loss/SOURCE`), or one of a task's (`piqa/acc`). metrics.jsonl holds the values, and no
checkpoint is there without the records up to its step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.config import CheckpointConfig
from mmfree_jax.errors import CheckpointError
from mmfree_jax.saved.checkpoint_files import Place
from mmfree_jax.saved.history import Record, read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.run_directory import CHECKPOINTS, METRICS, load_config

HELD_OUT = "eval_"
LOWEST_OF_HELD_OUT = {"loss": True, "bits_per_byte": True, "accuracy": False}
"""Numbers of an evaluation, and whether the lowest is the best."""


@dataclass(frozen=True)
class BestMetric:
    """A number by which checkpoints are compared."""

    name: str
    is_lowest_best: bool

    def value(self, record: Record) -> float | None:
        """What a record says of it; None where it says nothing, or no finite number."""
        is_held_out = self.name.startswith(HELD_OUT)
        if record.get("kind") != ("eval" if is_held_out else "tasks"):
            return None
        value = record.get(self.name.removeprefix(HELD_OUT))
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if math.isfinite(value) else None

    def values(self, records: Iterable[Record]) -> dict[int, float]:
        """Its value by step."""
        found = ((r.get("step"), self.value(r)) for r in records)
        return {step: value for step, value in found if value is not None and step is not None}

    def best(self, values: Mapping[int, float], steps: Sequence[int]) -> list[int]:
        """Those of `steps` that have a value, the best first; of equals the earliest."""
        sign = 1 if self.is_lowest_best else -1
        return sorted((s for s in set(steps) if s in values), key=lambda s: (sign * values[s], s))


def best_metric(config: CheckpointConfig) -> BestMetric:
    """The metric of a run. Of a task's number the highest is best where nothing else is said."""
    name = config.best_metric
    is_held_out = name.startswith(HELD_OUT)
    field = name.removeprefix(HELD_OUT).partition("/")[0]
    known = is_held_out and LOWEST_OF_HELD_OUT.get(field, True)
    return BestMetric(name, known if config.best_is is None else config.best_is == "lowest")


def best_checkpoint(run: Path, checkpoints: Place | None = None) -> int:
    """The step of a run's best checkpoint, by its `checkpoint.best_metric`.

    Args:
      run: the run directory, or a copy of its small files.
      checkpoints: where the run's checkpoints are; None: in it.

    Raises:
      CheckpointError: no complete checkpoint is of a step with a finite value.
      ConfigError, TrainingError: config.yaml or metrics.jsonl is damaged.
    """
    metric = best_metric(load_config(run).checkpoint)
    values = metric.values(read_history(run / METRICS))
    checkpoints = run / CHECKPOINTS if checkpoints is None else checkpoints
    steps = checkpoint_steps(checkpoints)
    best = metric.best(values, steps)
    if not best:
        raise CheckpointError(
            f"{checkpoints} has no checkpoint of a step with a finite {metric.name} (it has "
            f"{_listed(steps)}; measured at {_listed(sorted(values))}): give a step, or train with "
            "--checkpoint.keep-best 1"
        )
    return best[0]


def _listed(steps: Sequence[int]) -> str:
    """Steps in words, the last of many."""
    shown = ", ".join(map(str, steps[-10:])) or "none"
    return f"..., {shown}" if len(steps) > 10 else shown
