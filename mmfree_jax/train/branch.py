"""Starting a run from a checkpoint of another, optimiser and all (`--branch-from`)."""

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.data.dataset import check_compatible
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.files import is_locked, sha256
from mmfree_jax.model.parameters import flatten
from mmfree_jax.parallel import processes
from mmfree_jax.places import locate
from mmfree_jax.saved.checkpoint import restore
from mmfree_jax.saved.checkpoint_files import Place, read_manifest_bytes
from mmfree_jax.saved.manifest import Manifest, read_manifest
from mmfree_jax.saved.origin import Origin
from mmfree_jax.saved.run_directory import CHECKPOINTS, LOCK
from mmfree_jax.saved.run_model import check_still_there, find_checkpoint
from mmfree_jax.train.branch_source import Source, find_manifest, lies_in, parse_source
from mmfree_jax.train.flops import count_flops
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.same_run import cannot_branch
from mmfree_jax.train.setup import Run
from mmfree_jax.train.step import TrainState, abstract_state

_NOT_TOLD = ("run_dir", "branch_from", "init_from")


@dataclass(frozen=True)
class Branch:
    """A checkpoint of another run as the start of this one.

    Attributes:
      state: on this run's mesh and in its dtypes.
      origin: what was taken over.
      meter: what the parent had measured of itself since its last record.
      notes: what there is to say of the parent.
    """

    state: TrainState
    origin: Origin
    meter: dict[str, Any] | None
    notes: list[str]


def check_apart(config: TrainConfig) -> None:
    """Refuses a branch into its parent.

    Raises:
      ConfigError: run_dir is the parent's folder or URL, or lies in it.
    """
    if config.branch_from is None:
        return
    if lies_in(locate(config.run_dir, "run_dir"), parse_source(config.branch_from).run):
        raise ConfigError(
            f"run_dir {config.run_dir} is or lies in the run to branch from: give another --run-dir"
        )


def take_branch(run: Run) -> Branch:
    """Reads the checkpoint that `run.config.branch_from` names.

    Raises:
      ConfigError: a setting differs that a branch must keep, or there is nothing left to do.
      DataError: the data was made with another tokenizer.
      CheckpointError: there is no such checkpoint, it is damaged, or it went away meanwhile.
    """
    assert run.config.branch_from is not None
    source = parse_source(run.config.branch_from)
    step, checksum, notes = processes.first(lambda: _choose(source))
    folder = source.run / CHECKPOINTS / str(step)
    manifest = read_manifest(folder)
    parent = from_dict(TrainConfig, manifest.config)
    _check(run, source.run, parent, manifest)
    abstract = abstract_state(parent, make_optimizer(parent.optimizer, parent.model), run.mesh)
    try:
        restored = processes.together(lambda: restore(folder, abstract, check_files=False))
    except CheckpointError:
        processes.first(lambda: check_still_there(folder, checksum))
        raise
    processes.first(lambda: check_still_there(folder, checksum))
    return Branch(
        _converted(restored.state, run),
        _origin(run, source.run, parent, manifest, checksum),
        manifest.meter,
        notes,
    )


def _choose(source: Source) -> tuple[int, str, list[str]]:
    """The step, the checksum of its manifest, and what there is to say of the parent."""
    find_manifest(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        folder = find_checkpoint(source.run, source.step)
    notes = [f"warning: {w.message}" for w in caught if "falling back" in str(w.message)]
    # Of a lease in a bucket only time tells whether its holder lives.
    if isinstance(source.run, Path) and is_locked(source.run / LOCK):
        notes.append(f"{source.run} is in use by another job, which goes on undisturbed")
    return int(folder.name), sha256(read_manifest_bytes(folder)), notes


def _check(run: Run, folder: Place, parent: TrainConfig, manifest: Manifest) -> None:
    config = run.config
    if differing := cannot_branch(parent, config):
        raise ConfigError(
            f"branch_from {config.branch_from} holds another model ({'; '.join(differing)}): set "
            "these fields as they are there, or train a new run without --branch-from"
        )
    if config.steps <= manifest.step:
        raise ConfigError(
            f"steps is {config.steps}, but branch_from {folder} has made {manifest.step} at this "
            f"checkpoint: set --steps above {manifest.step} (they count from the parent's first), "
            f"or give an earlier checkpoint, --branch-from {folder}@STEP"
        )
    for dataset in run.data:
        check_compatible(
            dataset, identity=manifest.data["tokenizer"], owner=f"branch_from {folder}"
        )


def _converted(state: TrainState, run: Run) -> TrainState:
    """The state in the dtypes of the run, and with its optimiser's parts in their places."""
    dtype = jnp.dtype(run.config.model.param_dtype)
    params = jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), state.params)
    opt_state = run.optimizer.rearranged(state.opt_state, params)
    return dataclasses.replace(state, params=params, opt_state=opt_state)


def _origin(
    run: Run, folder: Place, parent: TrainConfig, manifest: Manifest, checksum: str
) -> Origin:
    before, step = manifest.origin, manifest.step
    tokens = before.tokens_at(step, tokens_per_step(parent))
    own = count_flops(parent.model, parent.data.seq_len).training * (tokens - before.tokens)
    row, rows = _position(run, parent, manifest)
    was = flatten(to_dict(parent), separator=".")
    now = flatten(to_dict(run.config), separator=".")
    changed = [
        f"{name} {was[name]} -> {now[name]}"
        for name in now
        if was[name] != now[name] and name not in _NOT_TOLD
    ]
    return Origin(
        step=step,
        tokens=tokens,
        flops=before.flops + own,
        row=row,
        parent=str(folder.resolve() if isinstance(folder, Path) else folder),
        checkpoint=checksum,
        config=to_dict(parent),
        account=f"branched from {folder} at step {step} ({tokens:,} tokens): weights, optimiser, "
        f"step and tokens go on; {rows}; changed: {', '.join(changed) or 'nothing'}",
    )


def _position(run: Run, parent: TrainConfig, manifest: Manifest) -> tuple[int, str]:
    """The row that comes next, and why, in words."""
    old, new = parent.data, run.config.data
    names = ("seq_len", "seed", "weights")[: 3 if len(run.data) > 1 else 2]
    differing = [
        f"data.{name} {getattr(old, name)} -> {getattr(new, name)}"
        for name in names
        if getattr(old, name) != getattr(new, name)
    ]
    if manifest.data["fingerprints"] != run.data_identity["fingerprints"]:
        differing.insert(0, "other data")
    if differing:
        return 0, (
            f"rows begin anew at row 0 of another order ({', '.join(differing)}), in which text "
            "read before may come again"
        )
    row = manifest.origin.row_at(manifest.step, parent.batch_size)
    return row, f"rows go on at row {row:,} of the same order"
