"""What `--branch-from` names, and the settings that a branch starts with."""

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.places import locate
from mmfree_jax.saved.manifest import Manifest, newest_manifest, read_manifest
from mmfree_jax.saved.run_directory import CHECKPOINTS, CONFIG
from mmfree_jax.saved.run_model import kept_checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint of a run: that of `step`, or the newest."""

    run: Path
    step: int | None = None


def parse_source(text: str) -> Source:
    """Reads RUN or RUN@STEP. A folder whose own name ends in @STEP is meant before a step is.

    Raises:
      ConfigError: what stands behind the @ is no step.
    """
    run, at, step = text.rpartition("@")
    if not at or not run or (Path(text) / CONFIG).is_file():
        return Source(Path(text))
    if re.fullmatch("[0-9]{1,18}", step):
        return Source(Path(run), int(step))
    if (Path(run) / CONFIG).is_file():
        raise ConfigError(f"branch_from is {text!r}: give a step behind the @, or the run alone")
    return Source(Path(text))


def same_source(was: str | None, asked: str | None) -> bool:
    """Whether a run that branched from `was`, a step, is one that is to branch from `asked`."""
    if was is None or asked is None:
        return was == asked
    old, new = parse_source(was), parse_source(asked)
    same_run = os.path.realpath(old.run) == os.path.realpath(new.run)
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
    """
    if not (source.run / CONFIG).is_file():
        raise CheckpointError(
            f"branch_from: {source.run} is not the folder of a training run (it has no {CONFIG}): "
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
