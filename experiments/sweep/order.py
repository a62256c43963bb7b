"""In which order the runs of a sweep are started."""

from collections.abc import Sequence

from mmfree_jax.experiments.sweep.axes import Setting
from mmfree_jax.experiments.sweep.cost import relative_seconds
from mmfree_jax.experiments.sweep.planned_run import PlannedRun

ORDERS = ("cheapest", "longest")


def in_order(runs: Sequence[PlannedRun], order: str) -> list[PlannedRun]:
    """Tuning runs before others, as these wait for them, and within a stage:

    * cheapest: as the plan has them, so that an early end leaves the most finished runs;
    * longest: so that the last ones to end are short. The longest of those that share a program
      goes first of all, whatever its stage, since it compiles it for those that follow.
    """
    if order == "cheapest":
        return sorted(runs, key=lambda r: r.stage != "tuning")
    programs: set[tuple[str, str, Setting]] = set()
    ranked = []
    for run in sorted(runs, key=lambda r: -relative_seconds(r)):
        repeats = run.program in programs
        programs.add(run.program)
        ranked.append((repeats, run))
    ranked.sort(key=lambda pair: (pair[0], pair[1].stage != "tuning"))
    return [run for _, run in ranked]
