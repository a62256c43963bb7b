"""What changes over a run's steps by plan, by numbers that are arguments of the compiled step."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.quantizer_config import AT_ONCE, QuantizerConfig

Schedule = Callable[[Any], jax.Array]


class ScheduleValues(NamedTuple):
    """The numbers of a schedule, float32 scalars; the rate's shape is `OptimizerConfig.schedule`.

    They are arguments of the compiled step, so that runs that differ in nothing else share it.

    Attributes:
      peak: learning rate after the warm-up.
      floor: final rate as a share of the peak.
      warmup: steps of linear warm-up.
      steps: of the whole run.
      decay_start: step at which "wsd" begins to fall.
      second_stage: step from which the rate is `second_rate` of what the shape says.
      second_rate: that factor.
      weight_decay_end: step from which there is no weight decay.
      float_steps: steps of the float form, which come first.
      ternary_from: step from which all are of the ternary form.
    """

    peak: Any
    floor: Any
    warmup: Any
    steps: Any
    decay_start: Any
    second_stage: Any
    second_rate: Any
    weight_decay_end: Any
    float_steps: Any
    ternary_from: Any


def schedule_values(
    config: OptimizerConfig, steps: int, quantizer: QuantizerConfig = AT_ONCE
) -> ScheduleValues:
    """The numbers of the schedule of a run of `steps` updates, on the host."""
    # A run is never shorter than its warm-up, but a decay can begin within it.
    decay_start = max(config.warmup_steps, steps * (1.0 - config.decay_fraction))
    values = ScheduleValues(
        peak=config.learning_rate,
        floor=config.min_lr_ratio,
        warmup=config.warmup_steps,
        steps=steps,
        decay_start=decay_start,
        second_stage=math.inf if config.second_stage_at == 1 else config.second_stage_at * steps,
        second_rate=config.second_stage_rate,
        weight_decay_end=config.weight_decay_until * steps,
        float_steps=quantizer.float_steps(steps),
        ternary_from=quantizer.ternary_from(steps),
    )
    return ScheduleValues(*map(np.float32, values))


def learning_rate(shape: str, values: ScheduleValues, count: Any, xp: Any = jnp) -> Any:
    """The learning rate after `count` updates.

      All shapes span the whole run and rise linearly from zero over the warm-up. With p the share
      of the steps after it that is done:

        paper     peak (1 + cos(pi p)) / 2, times one half from step `steps / 2` on, so that the
                  rate drops at the midpoint and ends at zero (arXiv 2406.02528, section 4.1)
        cosine    from the peak to `floor` of it along half a cosine
        linear    the same along a straight line
        wsd       the peak until `decay_start`, then linear
        constant  the peak

    From the second stage on it is `second_rate` of that.

      Args:
        shape: one of these names.
        values: the schedule's numbers.
        count: updates already made, an int (array).
        xp: computes it, `jax.numpy` or `numpy`.

      Returns:
        float32 of count's shape.
    """
    peak, floor, warmup, steps, decay_start = values[:5]
    step = xp.asarray(count, xp.float32)
    p = xp.clip((step - warmup) / xp.maximum(1.0, steps - warmup), 0.0, 1.0)
    cosine = 0.5 * (1.0 + xp.cos(xp.pi * p))
    if shape == "paper":
        share = xp.where(step >= steps / 2, 0.5, 1.0) * cosine
    elif shape == "cosine":
        share = floor + (1.0 - floor) * cosine
    elif shape == "linear":
        share = floor + (1.0 - floor) * (1.0 - p)
    elif shape == "wsd":
        done = xp.clip((step - decay_start) / xp.maximum(1e-9, steps - decay_start), 0.0, 1.0)
        share = 1.0 - (1.0 - floor) * done
    else:
        share = xp.ones_like(p)
    ramp = xp.where(warmup > 0, xp.minimum(1.0, step / xp.maximum(warmup, 1.0)), 1.0)
    stage = xp.where(step >= values.second_stage, values.second_rate, 1.0)
    return xp.asarray(peak * ramp * share * stage, xp.float32)


def recorded_rate(config: OptimizerConfig, steps: int, count: int) -> float:
    """`learning_rate` on the host: nothing is compiled for it, nor waits behind the next step."""
    values = schedule_values(config, steps)
    return float(learning_rate(config.schedule, values, count, np))


def weight_decay(config: OptimizerConfig, values: ScheduleValues, count: Any) -> Any:
    """The weight decay after `count` updates: a number where it is the same in all steps."""
    if config.weight_decay_until == 1:
        return config.weight_decay
    return jnp.where(count < values.weight_decay_end, jnp.float32(config.weight_decay), 0.0)


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """`learning_rate` as a function of the number of updates already made.

    Example:
      >>> from mmfree_jax import OptimizerConfig
      >>> from mmfree_jax.train import make_schedule
      >>> schedule = make_schedule(OptimizerConfig(learning_rate=1e-3, warmup_steps=10), steps=100)
      >>> [round(float(schedule(step)), 6) for step in (0, 5, 10, 100)]
      [0.0, 0.0005, 0.001, 0.0]
    """
    return functools.partial(learning_rate, config.schedule, schedule_values(config, steps))
