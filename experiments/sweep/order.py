"""In which order the runs of a sweep are started."""

from collections.abc import Sequence

from mmfree_jax.experiments.sweep.cost import relative_seconds
from mmfree_jax.experiments.sweep.plan import PlannedRun

ORDERS = ("cheapest", "longest")


def in_order(runs: Sequence[PlannedRun], order: str) -> list[PlannedRun]:
    """Tuning runs before main ones, as main runs wait for them, and within a stage:

    * cheapest: as the plan has them, so that an early end leaves the most finished runs;
    * longest: so that the last ones to end are short. The longest of each shape of model goes
      first of all, whatever its stage, since it compiles the programs of those that follow.
    """
    if order == "cheapest":
        return sorted(runs, key=lambda r: r.stage != "tuning")
    shapes: set[tuple[str, str]] = set()
    ranked = []
    for run in sorted(runs, key=lambda r: -relative_seconds(r)):
        repeats = (run.family, run.size) in shapes
        shapes.add((run.family, run.size))
        ranked.append((repeats, run))
    ranked.sort(key=lambda pair: (pair[0], pair[1].stage != "tuning"))
    return [run for _, run in ranked]
