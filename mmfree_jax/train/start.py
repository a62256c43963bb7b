"""The state that a run starts from: its own newest checkpoint, another run's, or a fresh one."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

from mmfree_jax.parallel import processes
from mmfree_jax.saved.checkpoint import Restored, restore_newest
from mmfree_jax.saved.goodput import NO_TIME, Goodput
from mmfree_jax.saved.local_copies import LocalCopies
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.run_directory import CHECKPOINTS
from mmfree_jax.train.branch import take_branch
from mmfree_jax.train.init_from import initial_params
from mmfree_jax.train.metrics import Stopwatch
from mmfree_jax.train.same_run import check_same_run
from mmfree_jax.train.setup import Run
from mmfree_jax.train.step import TrainState, abstract_state, init_sharded, traced_config


@dataclass(frozen=True)
class Start:
    """Where a session of a run begins.

    Attributes:
      run: with its origin, and with the step in `config.branch_from`.
      state: on the run's mesh.
      step: that it is of.
      meter: what the run had measured of itself since its last record.
      goodput: where its time had gone by then.
      is_resumed: whether it is from a checkpoint of the run's own.
      notes: what there is to say of the checkpoints.
    """

    run: Run
    state: TrainState
    step: int = 0
    meter: dict[str, Any] | None = None
    goodput: Goodput = NO_TIME
    is_resumed: bool = False
    notes: tuple[str, ...] = ()

    @property
    def is_new_branch(self) -> bool:
        """Whether the state is another run's, and not yet saved in this one."""
        return not self.is_resumed and self.run.origin.parent is not None


def start_state(run: Run, watch: Stopwatch, copies: LocalCopies | None) -> Start:
    """The newest good checkpoint's state on the run's mesh, else the parent's, else a fresh one.

    Args:
      run: what is to start.
      watch: gets the time of reading checkpoints.
      copies: of the run on the machines; None: there are none.

    Raises:
      ConfigError, DataError: as `take_branch`.
      CheckpointError: a checkpoint is of other shapes, or all are damaged.
    """
    abstract = abstract_state(run.config, run.optimizer, run.mesh)
    with warnings.catch_warnings(record=True) as caught, watch.section("restore"):
        warnings.simplefilter("always", UserWarning)
        restored, notes = _newest_copy(run, abstract, copies)
        if restored is None:
            restored = restore_newest(run.place / CHECKPOINTS, abstract)
        if copies is not None:
            copies.drop_after(0 if restored is None else restored.step)
    notes += [f"warning: {w.message}" for w in caught if "falling back" in str(w.message)]
    if restored is not None:
        manifest = restored.manifest
        config = dataclasses.replace(
            run.config, branch_from=manifest.config.get("branch_from", run.config.branch_from)
        )
        return Start(
            dataclasses.replace(run, config=config, origin=manifest.origin),
            restored.state,
            manifest.step,
            manifest.meter,
            manifest.goodput,
            is_resumed=True,
            notes=tuple(notes),
        )
    if run.config.branch_from is not None:
        with watch.section("restore"):
            branch = take_branch(run)
        origin = branch.origin
        config = dataclasses.replace(run.config, branch_from=f"{origin.parent}@{origin.step}")
        return Start(
            dataclasses.replace(run, config=config, origin=origin),
            branch.state,
            origin.step,
            branch.meter,
            notes=tuple(notes + branch.notes),
        )
    traced = traced_config(run.config)
    state = init_sharded(
        run.config,
        run.optimizer,
        run.mesh,
        lambda make: run.programs.later("initial state", make, traced),
    )
    if run.config.init_from is not None:
        params, account = initial_params(run.config.init_from, run.config, run.mesh, run.data)
        notes.append(account)
        state = dataclasses.replace(state, params=params)
    return Start(run, state, notes=tuple(notes))


def _newest_copy(
    run: Run, abstract: TrainState, copies: LocalCopies | None
) -> tuple[Restored | None, list[str]]:
    """The newest local copy's state if that is later than every checkpoint; and what to say."""
    if copies is None:
        return None, []
    folder = run.place / CHECKPOINTS
    saved = processes.first(lambda: max(checkpoint_steps(folder), default=0))
    restored, notes = copies.restore(abstract, newer_than=saved)
    if restored is None:
        return None, list(notes)
    check_same_run(run.place, restored.manifest.config, run.config, restored.step)
    note = f"taken from the local copies of step {restored.step}: the newest checkpoint is "
    return restored, [*notes, note + (f"step {saved}" if saved else "none")]
