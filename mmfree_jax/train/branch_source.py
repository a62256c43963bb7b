"""What `--branch-from` names, and the settings that a branch starts with."""

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import CheckpointError, ConfigError, StorageError
from mmfree_jax.places import is_file, locate
from mmfree_jax.saved.checkpoint_files import Place
from mmfree_jax.saved.manifest import Manifest, newest_manifest, read_manifest
from mmfree_jax.saved.run_directory import CHECKPOINTS, CONFIG
from mmfree_jax.saved.run_model import kept_checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run: that of `step`, or the newest."""

    run: Place
    step: int | None = None


def parse_source(text: str) -> Source:
    """Reads RUN or RUN@STEP. A folder whose own name ends in @STEP is meant before a step is.

    Raises:
      ConfigError: what stands behind the @ is no step, or it is the URL of what is no bucket.
    """
    whole, (run, at, step) = locate(text, "branch_from"), text.rpartition("@")
    if not at or not run or _is_known_run(whole):
        return Source(whole)
    if re.fullmatch("[0-9]{1,18}", step):
        return Source(locate(run, "branch_from"), int(step))
    if _is_known_run(locate(run, "branch_from")):
        raise ConfigError(f"branch_from is {text!r}: give a step behind the @, or the run alone")
    return Source(whole)


def _is_known_run(place: Place) -> bool:
    """Whether a run is there; one in a bucket that cannot be read is not: a branch needs none."""
    with contextlib.suppress(StorageError):
        return is_file(place / CONFIG)
    return False


def lies_in(place: Place, run: Place) -> bool:
    """Whether `place` is the folder or URL of `run`, or below it."""
    if isinstance(place, Path) and isinstance(run, Path):
        return place.resolve().is_relative_to(run.resolve())
    return type(place) is type(run) and f"{place}/".startswith(f"{run}/")


def same_source(was: str | None, asked: str | None) -> bool:
    """Whether a run that branched from `was`, a step, is one that is to branch from `asked`."""
    if was is None or asked is None:
        return was == asked
    old, new = parse_source(was), parse_source(asked)
    same_run = lies_in(old.run, new.run) and lies_in(new.run, old.run)
    return same_run and new.step in (None, old.step)


def branch_config(source: str, run_dir: str = TrainConfig.run_dir) -> TrainConfig:
    """The config of a branch: the parent's, to be changed with `dataclasses.replace`.

    `mmfree_jax.train.training.train` of it starts the branch, or goes on with it.

    Args:
      source: RUN or RUN@STEP.
      run_dir: of the branch. If it holds the branch already, the settings are those that the
        parent had when it began, and the parent itself need not be there any more.

    Raises:
      ConfigError: `source` is malformed.
      CheckpointError: there is no such run or checkpoint; says which steps are kept.
    """
    own = newest_manifest(locate(run_dir, "run_dir") / CHECKPOINTS)
    if own is not None and same_source(own.config.get("branch_from"), source):
        settings = own.origin.config
    else:
        settings = find_manifest(parse_source(source)).config
    return dataclasses.replace(
        from_dict(TrainConfig, settings),
        run_dir=run_dir,
        init_from=None,
        branch_from=source,
        stop_at=None,  # the parent's own end is none of its branch's
    )


def find_manifest(source: Source) -> Manifest:
    """The manifest of a checkpoint to branch from; its arrays are not looked at.

    Raises:
      CheckpointError: there is no such run or checkpoint; says which steps are kept.
      StorageError: its bucket refuses, or cannot be reached.
    """
    if not is_file(source.run / CONFIG):
        raise CheckpointError(
            f"branch_from: {source.run} is not a training run (it has no {CONFIG}): "
            "give RUN or RUN@STEP; of other models --init-from takes the weights"
        )
    if source.step is not None:
        return read_manifest(kept_checkpoint(source.run, source.step))
    manifest = newest_manifest(source.run / CHECKPOINTS)
    if manifest is None:
        raise CheckpointError(
            f"branch_from: {source.run / CHECKPOINTS} holds no checkpoint that can be read: train "
            "longer, or give another run"
        )
    return manifest
