"""The optimiser that a config names: clipping, and the update of the weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train import adamw, optax_steps
from mmfree_jax.train.directions import make_direction
from mmfree_jax.train.schedule import ScheduleValues


def _as_it_is(what: Any, _: Any) -> Any:
    return what


class Optimizer(NamedTuple):
    """What the training step needs of an optimiser.

    Attributes:
      init: params -> state.
      update: (gradients, state, params, values, *, scale, norm, apply) -> (params, state).
        `values` are the schedule's; the gradients are to be multiplied by `scale`, after which
        their global norm is `norm`; both results are the old ones where `apply` is false.
      point: (params, state) -> the weights to take gradients at; `params` are what is evaluated.
      rearranged: (state, params) -> the state of the same optimiser under other settings, as
        this one has it.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    point: Callable[[Any, Any], Any] = _as_it_is
    rearranged: Callable[[Any, Any], Any] = _as_it_is


@functools.cache
def make_optimizer(config: OptimizerConfig, model: ModelConfig | None = None) -> Optimizer:
    """Global-norm clipping, then the update of the optimiser that `config` names.

    Each subtracts `rate * group's factor * (direction + weight_decay * w)`: the rate is that of
    the schedule at the number of updates made before, factor and decay are those of the
    parameter (`parameter_rules.py`), and the direction is the optimiser's own.

    Raises:
      ConfigError: `config.factory` names none.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax import OptimizerConfig
      >>> from mmfree_jax.train import init_state, make_optimizer
      >>> optimizer = make_optimizer(OptimizerConfig(name="lion", learning_rate=1e-4))
      >>> opt_state = optimizer.init({"head": {"weight": jnp.ones((2, 2))}})
    """
    if config.name == "adamw" and config.factory is None:
        return Optimizer(
            functools.partial(adamw.init, config),
            _clipping(config, functools.partial(adamw.update, config, model)),
            rearranged=lambda state, _: adamw.rearranged(config, state),
        )
    direction = make_direction(config, model)
    if config.name == "schedule_free":
        free = optax_steps.averaging(config, model, direction, 0.0, 0.0)
        init = functools.partial(optax_steps.init, free)
        step = functools.partial(optax_steps.average, config, model, direction)
        point: Callable[[Any, Any], Any] = functools.partial(optax_steps.point, config)
    else:
        init = functools.partial(optax_steps.init, direction)
        step = functools.partial(optax_steps.along, config, model, direction)
        point = _as_it_is
    update = functools.partial(optax_steps.update, config, step)

    def rearranged(state: Any, params: Any) -> Any:
        return optax_steps.rearranged(config, state, jax.eval_shape(init, params))

    return Optimizer(init, _clipping(config, update), point, rearranged)


def _clipping(
    config: OptimizerConfig, update: Callable[..., tuple[Any, Any]]
) -> Callable[..., tuple[Any, Any]]:
    """`update`, with the clipping of gradients whose norm is known as part of their scale."""

    def clipped(
        grads: Any,
        state: Any,
        params: Any,
        values: ScheduleValues,
        *,
        scale: jax.Array,
        norm: jax.Array,
        apply: jax.Array,
    ) -> tuple[Any, Any]:
        if config.clip_norm is not None:
            scale = scale * jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm)
        return update(grads, state, params, values, scale=scale, apply=apply)

    return clipped
