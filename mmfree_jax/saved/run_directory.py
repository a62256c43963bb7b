"""A run directory: who may write to it, and whether it holds the same run.

The files in it are listed in ARCHITECTURE.md.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml, to_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.parallel import processes
from mmfree_jax.saved.checkpoint import newest_manifest, write_text_atomically
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.optimizer import make_schedule

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
LOSS_CURVE = "loss_curve.png"
SAMPLE = "sample.txt"
TENSORBOARD = "tensorboard"
TOKENIZER = "tokenizer"
LOCK = ".lock"

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


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Creates `run_dir` and holds it against other jobs; the system lets go at death.

    Raises:
      CheckpointError: it cannot be written to, or another job holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise CheckpointError(
            f"run_dir {run_dir} cannot be written to: {e.strerror}; choose a writable folder"
        ) from e
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise CheckpointError(
                f"run_dir {run_dir} is in use by another job ({holder}): wait for it to end, "
                "or choose another run_dir"
            ) from e
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _owner().encode(), 0)
        except OSError as e:
            raise CheckpointError(f"run_dir {run_dir} cannot be written to: {e.strerror}") from e
        yield
    finally:
        os.close(descriptor)  # also unlocks


def _owner() -> str:
    return f"process {os.getpid()} on {os.uname().nodename}"


def open_run_dir(run_dir: Path, held: contextlib.ExitStack, *, patience: float = 15.0) -> None:
    """Process 0 locks `run_dir` until `held` closes; the others check that they see the same.

    Raises:
      CheckpointError: another job holds it, or a process sees another folder of that name.
    """

    def lock() -> str:
        held.enter_context(lock_run_dir(run_dir))
        return _owner()

    owner = processes.first(lock)

    def look() -> None:
        deadline = time.monotonic() + patience  # network file systems may lag behind
        while True:
            with contextlib.suppress(OSError):
                if (run_dir / LOCK).read_text(encoding="utf-8") == owner:
                    return
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"run_dir {run_dir.absolute()} is not the folder that process 0 writes to: "
                    "put it on a file system that all hosts share"
                )
            time.sleep(0.2)

    processes.together(look)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    result = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result.update(_flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


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
    was, now = _flat(saved), _flat(to_dict(config))
    differing = [
        f"{name} {was.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and not _may_change(name)
    ]
    if not differing and was["steps"] != config.steps:
        if config.steps < step:
            raise ConfigError(
                f"steps is {config.steps}, but run_dir {run_dir} has already made {step}: "
                "set more steps, or choose another run_dir"
            )
        if _past_differs(from_dict(TrainConfig, saved), config, step):
            differing = [
                f"steps {was['steps']} -> {config.steps} (the {config.optimizer.schedule!r} "
                f"schedule would have had other rates in the {step} steps already made)"
            ]
    if differing:
        raise ConfigError(
            f"run_dir {run_dir} holds another run (step {step}); differing: "
            f"{'; '.join(differing)}: choose another run_dir, or the settings in {CONFIG} there"
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
                f"{manifest['step']} steps: choose another run_dir, or move this one away"
            )
        check_same_run(run_dir, manifest["config"], config, manifest["step"])
        return
    # Not a checkpoint yet, but a history that a restart would replace.
    history = read_history(run_dir / METRICS)
    step = max((r["step"] for r in history if r.get("kind") == "train"), default=0)
    if step and (run_dir / CONFIG).exists():
        check_same_run(run_dir, to_dict(load_config(run_dir)), config, 0)


def write_config(run_dir: Path, config: TrainConfig) -> None:
    """Writes the resolved config.

    Raises:
      CheckpointError: the folder cannot be written to.
    """
    try:
        write_text_atomically(run_dir / CONFIG, dump_yaml(config))
    except OSError as e:
        raise CheckpointError(
            f"run_dir {run_dir} cannot be written to: {e.strerror}; choose a writable folder"
        ) from e


def load_config(run_dir: Path) -> TrainConfig:
    """The resolved config of a run directory.

    Raises:
      ConfigError: it is missing or malformed.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{path} is missing: give the folder of a training run")
    return from_dict(TrainConfig, read_yaml(path))
