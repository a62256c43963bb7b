"""Where tuning runs pause under successive halving, and which go on.

What was measured at a pause is in `pauses/NAME.json`, one file a run. Who goes on follows from
these, the table and `failures/`, and from nothing else: a sweep that goes on decides the same.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.halving import HalvingConfig
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, config_hash
from mmfree_jax.files import write_text
from mmfree_jax.json_shape import fault
from mmfree_jax.text_files import read_json

PAUSES = "pauses"


@dataclass(frozen=True)
class Halved:
    """How far the halving of all sizes has come."""

    next_pause: Mapping[str, int] = field(default_factory=dict)
    """Run -> the step after which it pauses next; a run that is not here goes to its end."""
    paused: frozenset[str] = frozenset()
    """Runs that wait for others of their size to come as far."""
    dropped: frozenset[str] = frozenset()
    """Runs that others have beaten at a pause, for good."""


def halve(
    runs: Sequence[PlannedRun],
    halving: HalvingConfig,
    loss_at: Callable[[PlannedRun, int], float | None],
    end_of: Callable[[PlannedRun], float | None],
) -> Halved:
    """Decides about the tuning runs of all sizes, as far as they have come.

    Args:
      runs: of the tuning stage, as the config has them.
      halving: the rule.
      loss_at: held-out loss of a run at a pause (its step); None: it has not come so far.
      end_of: loss of a run that has ended, infinite where it diverged; None: it has not.
    """
    next_pause: dict[str, int] = {}
    paused: set[str] = set()
    dropped: set[str] = set()
    for members in _cells(runs):
        left = list(members)
        for share in halving.pauses:
            if len(left) < 2:
                break
            losses = {run.name: _at_pause(run, share, loss_at, end_of) for run in left}
            known = {name: loss for name, loss in losses.items() if loss is not None}
            if len(known) < len(left):
                open_runs = [run for run in left if run.name not in known]
                next_pause |= {run.name: pause_step(run, share) for run in open_runs}
                paused |= {run.name for run in left if run.name in known and end_of(run) is None}
                break
            left.sort(key=lambda run: (known[run.name], run.learning_rate, run.name))
            goes_on = left[: halving.survivors(len(left))]
            dropped |= {run.name for run in left[len(goes_on) :] if end_of(run) is None}
            left = [run for run in goes_on if known[run.name] < math.inf]
    return Halved(next_pause, frozenset(paused), frozenset(dropped))


def _cells(runs: Sequence[PlannedRun]) -> list[list[PlannedRun]]:
    """The runs that decide about each other."""
    cells: dict[tuple[object, ...], list[PlannedRun]] = {}
    for run in runs:
        cells.setdefault(run.cell, []).append(run)
    return list(cells.values())


def pause_step(run: PlannedRun, share: float) -> int:
    """The step at which a run pauses for a share of its steps."""
    return min(max(1, round(share * run.config.steps)), run.config.steps - 1)


def _at_pause(
    run: PlannedRun,
    share: float,
    loss_at: Callable[[PlannedRun, int], float | None],
    end_of: Callable[[PlannedRun], float | None],
) -> float | None:
    """The loss that a run is ranked by; a run that was made to its end before keeps its place."""
    end, loss = end_of(run), loss_at(run, pause_step(run, share))
    if loss is None and end is not None:
        return math.inf if end == math.inf else -math.inf
    return loss


def saved_flops(runs: Sequence[PlannedRun], halving: HalvingConfig) -> float:
    """FLOPs of the steps that dropped runs will not make, if none diverges."""
    saved = 0.0
    for members in _cells(runs):
        left = len(members)
        for share in halving.pauses:
            after = halving.survivors(left)
            saved += (left - after) * members[0].flops * (1 - share)
            left = after
    return saved


def record_pause(
    out: Path, run: PlannedRun, step: int, loss: float, *, data: str | None = None
) -> None:
    """Keeps the loss of a run at a pause, and the data that it is of. Its lock is to be held."""
    losses = read_pauses(out, run, data=data) | {step: loss}
    record = {
        "run": run.name,
        "config_hash": config_hash(run.config),
        "data_fingerprint": data,
        "losses": [[step, loss] for step, loss in sorted(losses.items())],
    }
    write_text(out / PAUSES / f"{run.name}.json", json.dumps(record) + "\n")


def read_pauses(out: Path, run: PlannedRun, *, data: str | None = None) -> dict[int, float]:
    """Step -> held-out loss at the pauses that a run has come to.

    Args:
      out: the sweep's folder.
      run: of the plan.
      data: fingerprint of its data; None: not known.

    Raises:
      SweepError: the file is damaged, or of a run of other settings or on other data.
    """
    path = out / PAUSES / f"{run.name}.json"
    try:
        record = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise SweepError(f"{path} cannot be read ({e}); delete it, and the run pauses anew") from e
    shape = {"config_hash": str, "losses": [[(int, float)]]}
    wrong = fault(record, shape)
    if wrong or any(len(pair) != 2 for pair in record["losses"]):
        raise SweepError(f"{path} is damaged ({wrong or 'losses are no pairs'}); delete it, and "
                         "the run pauses anew")  # fmt: skip
    if record["config_hash"] != config_hash(run.config):
        raise SweepError(f"{path}: {run.name} was run with other settings (hash "
                         f"{record['config_hash']}): give another --out")  # fmt: skip
    there = record.get("data_fingerprint")
    if None not in (there, data) and there != data:
        raise SweepError(f"{path}: {run.name} was run on other data ({there}, now {data}): give "
                         "another --out")  # fmt: skip
    return {int(step): float(loss) for step, loss in record["losses"]}
