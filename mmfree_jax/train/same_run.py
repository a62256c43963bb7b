"""Whether a run directory holds the run that is asked for."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model.parameters import flatten
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import newest_manifest
from mmfree_jax.saved.run_directory import CHECKPOINTS, CONFIG, METRICS, load_config
from mmfree_jax.train.optimizer import make_schedule

# What a resumed run may change: where and how it runs and reports, never what it computes.
# `steps` is checked apart (`_past_differs`); data.paths by the data's identity.
_MAY_CHANGE = (
    "run_dir",
    "steps",
    "grad_accum",
    "loss_chunk",
    "on_nonfinite",
    "max_skips",
    "max_minutes",
    "data.paths",
    "data.prefetch",
    "model.remat",
    "model.matmul_kernel",
    "model.recurrence_kernel",
    "model.attention_kernel",
    "mesh.",
    "checkpoint.",
    "eval.",
    "log.",
)


def _may_change(name: str) -> bool:
    return any(
        name == field or (field[-1] == "." and name.startswith(field)) for field in _MAY_CHANGE
    )


def _past_differs(old: TrainConfig, new: TrainConfig, step: int) -> bool:
    """Whether the steps already made would have had another learning rate under `new`."""
    counts = np.arange(step)
    rates = [np.asarray(make_schedule(c.optimizer, c.steps)(counts)) for c in (old, new)]
    return not np.allclose(*rates, rtol=1e-6, atol=0)


def check_same_run(run_dir: Path, saved: dict[str, Any], config: TrainConfig, step: int) -> None:
    """Refuses to go on with a run under settings that would make it another.

    Args:
      run_dir: for the message.
      saved: the resolved config in the checkpoint.
      config: the config asked for.
      step: how far the run has come.

    Raises:
      ConfigError: names the fields that differ, their old and new values.
    """
    with contextlib.suppress(ConfigError):  # fields that are newer than the checkpoint
        saved = to_dict(from_dict(TrainConfig, saved))
    was, now = flatten(saved, separator="."), flatten(to_dict(config), separator=".")
    differing = [
        f"{name} {was.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and not _may_change(name)
    ]
    if not differing and was.get("steps") != config.steps:
        if config.steps < step:
            raise ConfigError(
                f"steps is {config.steps}, but run_dir {run_dir} has already made {step}: "
                f"set --steps above {step}, or give another --run-dir"
            )
        if _past_differs(from_dict(TrainConfig, saved), config, step):
            differing = [
                f"steps {was.get('steps')} -> {config.steps} (the {config.optimizer.schedule!r} "
                f"schedule would have had other rates in the {step} steps already made)"
            ]
    if differing:
        raise ConfigError(
            f"run_dir {run_dir} holds another run (step {step}); differing: "
            f"{'; '.join(differing)}: give another --run-dir, or its settings, "
            f"--config {run_dir / CONFIG}"
        )


def check_run_dir(run_dir: Path, config: TrainConfig) -> None:
    """Refuses a run directory that holds another run, or one to be started over.

    Raises:
      ConfigError: names what differs, or that `checkpoint.resume` is off.
    """
    manifest = newest_manifest(run_dir / CHECKPOINTS)
    if manifest is not None:
        if not config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume is off, but run_dir {run_dir} holds a run of "
                f"{manifest.step} steps: give another --run-dir, or --checkpoint.resume to go on"
            )
        check_same_run(run_dir, manifest.config, config, manifest.step)
        return
    # Not a checkpoint yet, but a history that a restart would replace.
    history = read_history(run_dir / METRICS)
    step = max((r["step"] for r in history if r.get("kind") == "train"), default=0)
    if step and (run_dir / CONFIG).exists():
        check_same_run(run_dir, to_dict(load_config(run_dir)), config, 0)
