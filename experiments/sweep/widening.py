"""Rates beyond an end of a list, tried one after another while the best one is at that end.

What is added follows from the config and from the runs that have ended, and from nothing else: a
sweep that goes on, here or elsewhere, plans the same. The rates tried are in the results table,
those that diverged in `failures/`.
"""

import math
from collections.abc import Callable, Sequence

from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.rates import round_rate


def widened_rates(
    given: Sequence[float], loss_at: Callable[[float], float | None], most: int
) -> tuple[float, ...]:
    """The rates of one list and those that are added to it, as far as the losses tell.

    While the best of all rates tried is the lowest or the highest, the next one on that side is
    added, by the ratio of the two given rates at that end; where all diverged, a lower one.

    Args:
      given: the config's. A single one is left as it is: it has no ratio, and nothing beside it.
      loss_at: held-out loss at a rate; infinite: diverged, None: not known yet.
      most: rates that may be added at each end.

    Returns:
      In ascending order. Of those added at most one has no loss yet: the one to try next.
    """
    ends = sorted(given)
    rates = list(ends)
    losses = {rate: loss_at(rate) for rate in rates}
    added = {-1: 0, 1: 0}
    while len(ends) > 1:
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(known) < len(losses):
            break
        best = min(rates, key=lambda r: (known[r], r))
        side = {rates[0]: -1, rates[-1]: 1}.get(best, 0) if math.isfinite(known[best]) else -1
        if side == 0 or added[side] == most:
            break
        added[side] += 1
        end, inner = (ends[0], ends[1]) if side < 0 else (ends[-1], ends[-2])
        rate = round_rate(end * (end / inner) ** added[side])
        losses[rate] = loss_at(rate)
        rates = sorted(losses)
    return tuple(rates)


def widened(
    runs: Sequence[PlannedRun],
    loss_of: Callable[[PlannedRun], float | None],
    *,
    most: int,
    first_seed: int,
) -> list[PlannedRun]:
    """`runs` and those that their lists of rates are widened by.

    Args:
      runs: of a stage, every rate of each cell.
      loss_of: how each ended, as in `widened_rates`.
      most: rates that may be added at each end of a list; 0: none.
      first_seed: whose losses decide, for all seeds of a cell.
    """
    if not most:
        return list(runs)
    lists: dict[tuple[object, ...], list[PlannedRun]] = {}
    for run in runs:
        lists.setdefault((*run.cell, run.setting, run.seed), []).append(run)
    wide = list(runs)
    for members in lists.values():
        given = tuple(run.learning_rate for run in members)
        first = lists[(*members[0].cell, members[0].setting, first_seed)][0]
        rates = widened_rates(given, lambda rate, run=first: loss_of(run.with_rate(rate)), most)
        wide += [members[0].with_rate(rate) for rate in rates if rate not in given]
    return wide
