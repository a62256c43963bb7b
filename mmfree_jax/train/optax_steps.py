"""Steps along a direction that optax gives, and schedule_free, which averages the weights.

Args and results of both updates are those of `Optimizer.update`, the clipping being part of
`scale`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.parameter_rules import step_rules
from mmfree_jax.train.schedule import ScheduleValues, learning_rate


class OptaxState(NamedTuple):
    """State of an optimiser by optax.

    Attributes:
      count: int32, updates made.
      own: what optax keeps.
    """

    count: Any
    own: Any


def init(transformation: Any, params: Any) -> OptaxState:
    """The state before the first update."""
    return OptaxState(jnp.zeros((), jnp.int32), transformation.init(params))


def update(
    config: OptimizerConfig,
    model: ModelConfig | None,
    direction: Any,
    grads: Any,
    state: OptaxState,
    params: Any,
    values: ScheduleValues,
    *,
    scale: jax.Array,
    apply: jax.Array,
) -> tuple[Any, OptaxState]:
    """Subtracts `rate * rule(direction, w)`."""
    rate = learning_rate(config.schedule, values, state.count)
    directions, own = direction.update(_scaled(grads, scale), state.own, params)
    steps = _steps(config, model, directions, params, -rate)
    after = OptaxState(optax.safe_increment(state.count), own)
    return _where(apply, optax.apply_updates(params, steps), params), _where(apply, after, state)


def averaging(
    config: OptimizerConfig, model: ModelConfig | None, direction: Any, rate: Any
) -> optax.GradientTransformationExtraArgs:
    """schedule_free (Defazio et al., arXiv 2405.15682) at a rate that is known."""

    def steps(directions: Any, params: Any) -> Any:
        return _steps(config, model, directions, params, -rate)

    base = optax.chain(direction, optax.stateless(steps))
    return contrib.schedule_free(base, rate, config.b1)


def between(config: OptimizerConfig, params: Any, state: OptaxState) -> Any:
    """Where schedule_free takes gradients: `b1` of the average, the rest of what is averaged."""
    return jax.tree.map(lambda x, z: config.b1 * x + (1.0 - config.b1) * z, params, state.own.z)


def update_average(
    config: OptimizerConfig,
    model: ModelConfig | None,
    direction: Any,
    grads: Any,
    state: OptaxState,
    params: Any,
    values: ScheduleValues,
    *,
    scale: jax.Array,
    apply: jax.Array,
) -> tuple[Any, OptaxState]:
    """One update of schedule_free; the parameters are the average, which is what is evaluated.

    Optax keeps the weights between instead, from which the average follows.
    """
    rate = learning_rate(config.schedule, values, state.count)
    free = averaging(config, model, direction, rate)
    at = between(config, params, state)
    updates, own = free.update(_scaled(grads, scale), state.own, at)
    new = contrib.schedule_free_eval_params(own, optax.apply_updates(at, updates))
    after = OptaxState(optax.safe_increment(state.count), own)
    return _where(apply, new, params), _where(apply, after, state)


def rearranged(config: OptimizerConfig, state: OptaxState, wanted: OptaxState) -> OptaxState:
    """The state of the same optimiser under other settings, as one of `config` has it.

    Args:
      config: the settings.
      state: of the optimiser before.
      wanted: shapes and dtypes of its state under `config`.
    """
    if isinstance(state.own, contrib.ScheduleFreeState):  # optax's average follows from this one
        b1 = jnp.full_like(state.own.b1, config.b1)
        state = state._replace(own=state.own._replace(b1=b1))
    return jax.tree.map(lambda x, w: x.astype(w.dtype), state, wanted)


def _scaled(grads: Any, scale: jax.Array) -> Any:
    return jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)


def _steps(
    config: OptimizerConfig, model: ModelConfig | None, directions: Any, params: Any, rate: Any
) -> Any:
    """`rate` times the steps of all weights."""
    leaves, tree = jax.tree.flatten(params)
    columns = zip(
        tree.flatten_up_to(directions), leaves, step_rules(config, model, params), strict=True
    )
    return tree.unflatten([rate * rule(direction, w) for direction, w, rule in columns])


def _where(apply: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(apply, a.astype(b.dtype), b), new, old)
