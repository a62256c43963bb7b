"""Whether a run directory holds the run that is asked for, and what another run may take over."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model_config import RUN_SETTINGS, ModelConfig
from mmfree_jax.outputs import MARKER
from mmfree_jax.places import is_taken
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.kinds import other_models
from mmfree_jax.saved.manifest import newest_manifest
from mmfree_jax.saved.run_directory import CHECKPOINTS, CONFIG, METRICS, SUMMARY, load_config
from mmfree_jax.storage import Url
from mmfree_jax.train.branch_source import same_source
from mmfree_jax.train.schedule import make_schedule, schedule_values, weight_decay

# What a resumed run may change: where and how it runs and reports, never what it computes.
# `steps` is checked apart (`_differing_past`); data.paths by the data's identity.
_MAY_CHANGE = (
    "run_dir",
    "steps",
    "grad_accum",
    "loss_chunk",
    "on_nonfinite",
    "max_skips",
    "max_minutes",
    "stop_at",
    "data.paths",
    "data.prefetch",
    "data.cache_gib",
    "model.remat",
    "model.scan_layers",
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


def other_model(old: ModelConfig, new: ModelConfig) -> list[str]:
    """The fields of two models that make them other functions of the same weights, in words."""
    differing = []
    for field in dataclasses.fields(ModelConfig):
        there, here = getattr(old, field.name), getattr(new, field.name)
        if field.name == "intermediate_size":
            there, here = old.glu_size, new.glu_size
        elif field.name == "num_heads" and "attention" in new.period:
            there, here = old.attention_heads, new.attention_heads
        elif field.name == "head_dim" and "attention" in new.period:
            there, here = old.head_channels, new.head_channels
        elif field.name == "state_expansion" and "hgrn2" in new.period:
            there, here = old.head_expansion, new.head_expansion
        if field.name not in RUN_SETTINGS and there != here:
            differing.append(f"model.{field.name} is {here!r}, there {there!r}")
    return differing


def cannot_branch(parent: TrainConfig, config: TrainConfig) -> list[str]:
    """The settings that a branch must have from its parent and has not, in words."""
    names = ("initializer_range", "mup", "mup_base_width")
    old, new = parent.optimizer, config.optimizer
    pairs = [
        ("seed", parent.seed, config.seed),
        ("optimizer.name", old.name, new.name),
        ("optimizer.factory", old.factory, new.factory),
    ] + [
        (f"model.{name}", getattr(parent.model, name), getattr(config.model, name))
        for name in names
    ]
    return other_model(parent.model, config.model) + [
        f"{name} is {here!r}, there {there!r} (nothing is initialised)"
        for name, there, here in pairs
        if there != here
    ]


def _differing_past(old: TrainConfig, new: TrainConfig, step: int) -> str | None:
    """What the steps already made would have had otherwise under `new`, in words."""
    counts = np.arange(step)

    def alike(planned: Callable[[TrainConfig], Any]) -> bool:
        return np.allclose(*(np.asarray(planned(c)) for c in (old, new)), rtol=1e-6, atol=0)

    def decay(config: TrainConfig) -> Any:
        values = schedule_values(config.optimizer, config.steps)
        return weight_decay(config.optimizer, values, counts)

    def strength(config: TrainConfig) -> Any:
        return [config.quantizer.strength(done, config.steps) for done in range(step)]

    if not alike(lambda c: make_schedule(c.optimizer, c.steps)(counts)):
        return f"the {new.optimizer.schedule!r} schedule would have had other rates"
    if not alike(decay):
        return "optimizer.weight_decay_until would have ended the decay elsewhere"
    if not alike(strength):
        return "quantizer would have set in elsewhere"
    return None


def check_same_run(
    run_dir: Path | Url, saved: dict[str, Any], config: TrainConfig, step: int
) -> None:
    """Refuses to go on with a run under settings that would make it another.

    Args:
      run_dir: for the message.
      saved: the resolved config in the checkpoint.
      config: the config asked for.
      step: how far the run has come.

    Raises:
      ConfigError: names the fields that differ, their old and new values.
    """
    old = None
    with contextlib.suppress(ConfigError):  # fields that are newer than the checkpoint
        old = from_dict(TrainConfig, saved)
        saved = to_dict(old)
    was, now = flatten(saved, separator="."), flatten(to_dict(config), separator=".")
    if same_source(was.get("branch_from"), config.branch_from):
        now["branch_from"] = was.get("branch_from")
    differing = [
        f"{name} {was.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name) != now.get(name) and not _may_change(name)
    ]
    if not differing and was.get("steps") != config.steps:
        if config.steps < step:
            raise ConfigError(
                f"steps is {config.steps}, but run_dir {run_dir} has already made {step}: "
                f"set --steps above {step}, give another --run-dir, or go on from an earlier "
                f"checkpoint there: --branch-from {run_dir}@STEP --run-dir NEW"
            )
        if otherwise := _differing_past(from_dict(TrainConfig, saved), config, step):
            differing = [
                f"steps {was.get('steps')} -> {config.steps} ({otherwise} in the {step} steps "
                "already made)"
            ]
    if differing:
        ways_out = [f"its settings, --config {run_dir / CONFIG}"]
        same = was.get("branch_from") == now["branch_from"]
        if step and same and old is not None and not cannot_branch(old, config):
            ways_out.append(
                "to go on from its checkpoint under other settings, "
                f"--branch-from {run_dir} --run-dir NEW"
            )
        raise ConfigError(
            f"run_dir {run_dir} holds another run (step {step}); differing: "
            f"{'; '.join(differing)}: give another --run-dir; or {'; or '.join(ways_out)}"
        )


def refuse_other_models(place: Path | Url) -> None:
    """Refuses a folder in which something else than a run was made.

    A run beside another model would leave two that nothing could tell apart.

    Raises:
      ConfigError: names the file that marks it.
    """
    if newest_manifest(place / CHECKPOINTS) is not None:
        return
    for file, what in {**other_models("run"), MARKER: "what a command made"}.items():
        if is_taken(place / file):
            raise ConfigError(f"run_dir {place} holds {file} ({what}): give another --run-dir")


def check_run_dir(run_dir: Path, config: TrainConfig, place: Path | Url | None = None) -> None:
    """Refuses a run directory that holds another run, or one to be started over.

    Args:
      run_dir: with the run's small files.
      config: the config asked for.
      place: the run directory as its user knows it, with the checkpoints; None: `run_dir`.

    Raises:
      ConfigError: names what differs, or says that `checkpoint.resume` is off, or that the
        checkpoints of a run are gone.
    """
    place = place or run_dir
    manifest = newest_manifest(place / CHECKPOINTS)
    if manifest is not None:
        if not config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume is off, but run_dir {place} holds a run of "
                f"{manifest.step} steps: give another --run-dir, or --checkpoint.resume to go on"
            )
        check_same_run(place, manifest.config, config, manifest.step)
        return
    # Not a checkpoint yet, but what a restart would replace.
    history = read_history(run_dir / METRICS)
    step = max((r["step"] for r in history if r.get("kind") == "train"), default=0)
    if step and (run_dir / CONFIG).exists():
        check_same_run(place, to_dict(load_config(run_dir)), config, 0)
    if step and (run_dir / SUMMARY).exists():  # no run gets one before it has saved
        raise ConfigError(
            f"run_dir {place} holds the records of a run of {step} steps, whose checkpoints are "
            "gone: give another --run-dir, or remove that folder"
        )
