"""A sweep's runs in Weights & Biases: one group, named after the sweep's folder."""

import dataclasses
from pathlib import Path

from mmfree_jax.config import TrainConfig
from mmfree_jax.experiments.sweep.config import SweepConfig


def grouped(config: TrainConfig, sweep: SweepConfig) -> TrainConfig:
    """A run's config with the sweep as its group, if it logs to a project and names no group."""
    log = config.log
    if log.wandb_project is None or log.wandb_group is not None:
        return config
    group = Path(sweep.out).resolve().name
    return dataclasses.replace(config, log=dataclasses.replace(log, wandb_group=group))
