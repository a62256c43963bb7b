"""Branched sweeps: one WSD run at full rate, a trunk, whose decays are the runs of many budgets.

A WSD run keeps its peak rate until it decays over its last share of steps. Runs that differ in
nothing but their length are therefore the same until the shortest of them decays: the trunk makes
those steps once, and each run goes on from the trunk's checkpoint where its own decay begins. It
is the run that it would be alone, bit for bit.

A trunk is a run directory `trunks/NAME` with a checkpoint for each of its branches. It can be
made longer for larger budgets. A budget between them takes the checkpoint before it and makes the
rest itself, or the whole run where there is none: that changes its cost and nothing else.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmfree_jax.config import EvalConfig, TrainConfig, tokens_per_step
from mmfree_jax.experiments.sweep.plan import flops_per_token
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, config_hash, data_name

TRUNKS = "trunks"


def with_trunks(
    runs: Sequence[PlannedRun], alone: Iterable[str] = ()
) -> tuple[list[PlannedRun], list[PlannedRun]]:
    """The trunks of some main runs, and the runs with the trunk of each.

    Args:
      runs: of a branched sweep.
      alone: names of runs that are made by themselves, as tuning runs are.

    Returns:
      The trunks, each before its first run in the order of `runs`; the runs. A run that shares
      its trunk with no other has none.
    """
    alone = set(alone)
    groups: dict[str, list[PlannedRun]] = {}
    for run in runs:
        if run.name not in alone and run.full_rate_steps:
            groups.setdefault(run.trunk_name, []).append(run)
    shared = {name: members for name, members in groups.items() if len(members) > 1}
    branches = {member.name: name for name, members in shared.items() for member in members}
    planned = [
        dataclasses.replace(run, trunk=branches[run.name]) if run.name in branches else run
        for run in runs
    ]
    return [_trunk(members) for members in shared.values()], planned


def _trunk(branches: Sequence[PlannedRun]) -> PlannedRun:
    """The run that ends where the last of its branches begins to decay."""
    return up_to(branches[0], sorted({branch.full_rate_steps for branch in branches}))


def up_to(run: PlannedRun, steps: Sequence[int]) -> PlannedRun:
    """The trunk of `run` (or `run`, a trunk) with a checkpoint after each of `steps`, in order."""
    config = run.config
    config = dataclasses.replace(
        config,
        steps=steps[-1],
        optimizer=dataclasses.replace(config.optimizer, decay_fraction=0.0),
        checkpoint=dataclasses.replace(config.checkpoint, at_steps=tuple(steps)),
        eval=dataclasses.replace(config.eval, batches=0, sample_tokens=0),
    )
    flops = flops_per_token(config) * config.steps * tokens_per_step(config)
    return dataclasses.replace(
        run, stage="trunk", config=config, flops=flops, budget=None, trunk=None
    )


def trunk_hash(config: TrainConfig) -> str:
    """`config_hash` of a trunk, the same at every length and whatever it evaluates."""
    steps = config.optimizer.warmup_steps + 1
    return config_hash(dataclasses.replace(config, steps=steps, eval=EvalConfig()))


def trunk_data(folder: Path) -> str | None:
    """The data that a trunk was trained on, as `data_fingerprint` in the table; None: not known."""
    from mmfree_jax.saved.manifest import newest_manifest  # imports JAX
    from mmfree_jax.saved.run_directory import CHECKPOINTS

    manifest = newest_manifest(folder / CHECKPOINTS)
    if manifest is None:  # none yet, or the trainer says what is wrong with it
        return None
    return data_name(manifest.data["fingerprints"])


def trunks_first(trunks: Sequence[PlannedRun], runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """`runs` with each trunk before its first branch."""
    left = {trunk.name: trunk for trunk in trunks}
    ordered = []
    for run in runs:
        if run.trunk in left:
            ordered.append(left.pop(run.trunk))
        ordered.append(run)
    return ordered


def kept_steps(folder: Path) -> list[int]:
    """Steps of a run directory's whole checkpoints, in order."""
    from mmfree_jax.saved.manifest import checkpoint_steps  # imports JAX
    from mmfree_jax.saved.run_directory import CHECKPOINTS

    return checkpoint_steps(folder / CHECKPOINTS)


@dataclasses.dataclass(frozen=True)
class TrunkState:
    """How far the trunk of a run has come."""

    folder: Path
    steps: tuple[int, ...]
    """Of its checkpoints, in order."""

    def is_ready_for(self, run: PlannedRun) -> bool:
        """Whether the trunk has made the steps that the run takes from it."""
        return bool(self.steps) and self.steps[-1] >= run.full_rate_steps

    def source(self, run: PlannedRun) -> str | None:
        """The checkpoint to branch from, as `branch_from`; None: the run makes all its steps."""
        before = [step for step in self.steps if step <= run.full_rate_steps]
        return f"{self.folder}@{before[-1]}" if before else None


def trunk_state(out: Path, trunk: str) -> TrunkState:
    """Looks at a trunk's folder, which need not be there yet."""
    folder = out / TRUNKS / trunk
    return TrunkState(folder, tuple(kept_steps(folder)))


def apart(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """`runs` as they would be without trunks, each by itself."""
    return [dataclasses.replace(run, trunk=None) for run in runs if run.stage != "trunk"]


def savings_text(runs: Sequence[PlannedRun]) -> str | None:
    """What a plan's trunks save against separate runs, in a line; None without trunks."""
    trunks = [run for run in runs if run.stage == "trunk"]
    branches = [run for run in runs if run.trunk is not None]
    if not trunks or not branches:
        return None
    separate = sum(run.flops for run in branches)
    together = sum(run.own_flops for run in (*trunks, *branches))
    return (
        f"branched: {len(trunks)} trunks carry {len(branches)} decays, {together:.3g} FLOPs in "
        f"place of {separate:.3g} for separate runs ({1 - together / separate:.0%} less)"
    )
