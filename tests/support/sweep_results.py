"""A sweep's results table, as if its runs had been made."""

from collections.abc import Callable, Iterable
from pathlib import Path

from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import parameters
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, config_hash
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import COLUMNS, append_result


def finish(
    sweep: SweepConfig, runs: Iterable[PlannedRun], loss_of: Callable[[PlannedRun], float]
) -> None:
    """Puts the pending ones of these runs into the table."""
    found = snapshot(sweep)
    for run in runs:
        if found.status(run) == "pending":
            values = {
                "run": run.name, "family": run.family, "size": run.size, "tokens": run.tokens,
                "params_non_embedding": parameters(run.config, "non-embedding"),
                "learning_rate": run.learning_rate, "seed": run.seed, "loss": loss_of(run),
                "config_hash": config_hash(run.config), "flops": run.flops,
            }  # fmt: skip
            append_result(Path(sweep.out), {c: str(values.get(c, "")) for c in COLUMNS})
