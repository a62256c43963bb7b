"""Learning-rate schedules, whose numbers are arguments of the compiled step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import OptimizerConfig

Schedule = Callable[[Any], jax.Array]


class ScheduleValues(NamedTuple):
    """The numbers of a schedule, float32 scalars; its shape is `OptimizerConfig.schedule`.

    They are arguments of the compiled step, so that runs that differ in nothing else share it.

    Attributes:
      peak: learning rate after the warm-up.
      floor: final rate as a share of the peak.
      warmup: steps of linear warm-up.
      steps: of the whole run.
      decay_start: step at which "wsd" begins to fall.
    """

    peak: Any
    floor: Any
    warmup: Any
    steps: Any
    decay_start: Any


def schedule_values(config: OptimizerConfig, steps: int) -> ScheduleValues:
    """The numbers of the schedule of a run of `steps` updates, on the host."""
    # A run is never shorter than its warm-up, but a decay can begin within it.
    decay_start = max(config.warmup_steps, steps * (1.0 - config.decay_fraction))
    values = (config.learning_rate, config.min_lr_ratio, config.warmup_steps, steps, decay_start)
    return ScheduleValues(*map(np.float32, values))


def learning_rate(shape: str, values: ScheduleValues, count: Any) -> jax.Array:
    """The learning rate after `count` updates.

    All shapes span the whole run and rise linearly from zero over the warm-up. With p the share
    of the steps after it that is done:

      paper     peak (1 + cos(pi p)) / 2, times one half from step `steps / 2` on, so that the
                rate drops at the midpoint and ends at zero (arXiv 2406.02528, section 4.1)
      cosine    from the peak to `floor` of it along half a cosine
      linear    the same along a straight line
      wsd       the peak until `decay_start`, then linear
      constant  the peak

    Args:
      shape: one of these names.
      values: the schedule's numbers.
      count: updates already made, an int (array).

    Returns:
      float32 of count's shape.
    """
    peak, floor, warmup, steps, decay_start = values
    step = jnp.asarray(count, jnp.float32)
    p = jnp.clip((step - warmup) / jnp.maximum(1.0, steps - warmup), 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * p))
    if shape == "paper":
        share = jnp.where(step >= steps / 2, 0.5, 1.0) * cosine
    elif shape == "cosine":
        share = floor + (1.0 - floor) * cosine
    elif shape == "linear":
        share = floor + (1.0 - floor) * (1.0 - p)
    elif shape == "wsd":
        done = jnp.clip((step - decay_start) / jnp.maximum(1e-9, steps - decay_start), 0.0, 1.0)
        share = 1.0 - (1.0 - floor) * done
    else:
        share = jnp.ones_like(p)
    ramp = jnp.where(warmup > 0, jnp.minimum(1.0, step / jnp.maximum(warmup, 1.0)), 1.0)
    return jnp.asarray(peak * ramp * share, jnp.float32)


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """`learning_rate` as a function of the number of updates already made."""
    return functools.partial(learning_rate, config.schedule, schedule_values(config, steps))
