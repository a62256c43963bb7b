"""Keeping a run's best checkpoints: what may decide, and which steps they are so far."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from mmfree_jax.config import TrainConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.saved.best import HELD_OUT, LOWEST_OF_HELD_OUT, BestMetric
from mmfree_jax.saved.history import Record


class BestSteps:
    """The steps with a run's best values; a sink of its records."""

    def __init__(self, metric: BestMetric, count: int, records: Iterable[Record]) -> None:
        self.metric, self._count = metric, count
        self._values = metric.values(records)

    def write(self, record: Record) -> None:
        """Notes the value of a record that has one."""
        self._values |= self.metric.values([record])

    def close(self) -> None:
        """A sink may have to let go of something."""

    def among(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps` to keep, the best first."""
        return self.metric.best(dict(self._values), steps)[: self._count]

    def value(self, step: int) -> float:
        """At a step that `among` gave."""
        return self._values[step]


def with_direction(
    config: TrainConfig, sources: Sequence[str], tasks: Mapping[str, bool | None]
) -> TrainConfig:
    """`config` with `checkpoint.best_is` as the metric has it, where it is not set.

    Args:
      config: of the run.
      sources: of its held-out text; empty: it is not evaluated.
      tasks: names of its tasks' numbers, "piqa/acc", and whether the lowest is best; None: the
        task does not say.

    Raises:
      ConfigError: the run logs no such number, which lists those it does; or its direction is not
        known.
    """
    options = config.checkpoint
    if not options.keep_best:
        return config
    known: dict[str, bool | None] = {}
    for name, lowest in LOWEST_OF_HELD_OUT.items():
        of_each = [f"{HELD_OUT}{name}/{source}" for source in sources] if len(sources) > 1 else []
        known |= dict.fromkeys([f"{HELD_OUT}{name}", *of_each] if sources else [], lowest)
    known |= tasks
    name = options.best_metric
    if not known:
        raise ConfigError(
            f"checkpoint.keep_best is {options.keep_best}, but nothing is evaluated: set "
            "--eval.batches above 0, or --checkpoint.keep-best 0"
        )
    if name not in known:
        raise ConfigError(
            f"checkpoint.best_metric is {name!r}, which this run does not log: choose one of "
            f"{', '.join(known)}"
        )
    if options.best_is is not None:
        return config
    if (lowest := known[name]) is None:
        raise ConfigError(
            f"checkpoint.best_metric is {name!r}, of which the task does not say whether the "
            "lowest or the highest is best: set --checkpoint.best-is"
        )
    is_best = "lowest" if lowest else "highest"
    return dataclasses.replace(config, checkpoint=dataclasses.replace(options, best_is=is_best))
