"""Steps along a direction that optax gives, and schedule_free, which averages the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.parameter_rules import step_rules
from mmfree_jax.train.schedule import ScheduleValues, learning_rate, weight_decay

Step = Callable[[Any, Any, Any, jax.Array, Any], tuple[Any, Any]]
"""Of gradients, optax's state, weights, rate and weight decay: the new weights and state."""


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
    step: Step,
    grads: Any,
    state: OptaxState,
    params: Any,
    values: ScheduleValues,
    *,
    scale: jax.Array,
    apply: jax.Array,
) -> tuple[Any, OptaxState]:
    """One update: `step` on the scaled gradients, at the schedule's rate, where it applies.

    Args and results are those of `Optimizer.update`, the clipping being part of `scale`.
    """
    rate = learning_rate(config.schedule, values, state.count)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
    new, own = step(grads, state.own, params, rate, weight_decay(config, values, state.count))
    after = OptaxState(optax.safe_increment(state.count), own)
    return jax.tree.map(
        lambda a, b: jnp.where(apply, a.astype(b.dtype), b), (new, after), (params, state)
    )


def along(
    config: OptimizerConfig,
    model: ModelConfig | None,
    direction: Any,
    grads: Any,
    own: Any,
    params: Any,
    rate: jax.Array,
    decay: Any,
) -> tuple[Any, Any]:
    """Subtracts `rate * rule(direction, w)`."""
    directions, own = direction.update(grads, own, params)
    return optax.apply_updates(params, _steps(config, model, directions, params, -rate, decay)), own


def averaging(
    config: OptimizerConfig, model: ModelConfig | None, direction: Any, rate: Any, decay: Any
) -> optax.GradientTransformationExtraArgs:
    """schedule_free (Defazio et al., arXiv 2405.15682) at a rate and decay that are known."""

    def steps(directions: Any, params: Any) -> Any:
        return _steps(config, model, directions, params, -rate, decay)

    base = optax.chain(direction, optax.stateless(steps))
    return contrib.schedule_free(base, rate, config.b1)


def point(config: OptimizerConfig, params: Any, state: OptaxState) -> Any:
    """The weights that schedule_free takes gradients at (`Optimizer.point`)."""
    return _between(config, params, state.own)


def _between(config: OptimizerConfig, params: Any, own: contrib.ScheduleFreeState) -> Any:
    """`b1` of the average, the rest of what is averaged."""
    return jax.tree.map(lambda x, z: config.b1 * x + (1.0 - config.b1) * z, params, own.z)


def average(
    config: OptimizerConfig,
    model: ModelConfig | None,
    direction: Any,
    grads: Any,
    own: Any,
    params: Any,
    rate: jax.Array,
    decay: Any,
) -> tuple[Any, Any]:
    """A step of schedule_free; the parameters are the average, which is what is evaluated.

    Optax keeps the weights between instead, from which the average follows.
    """
    at = _between(config, params, own)
    updates, own = averaging(config, model, direction, rate, decay).update(grads, own, at)
    return contrib.schedule_free_eval_params(own, optax.apply_updates(at, updates)), own


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


def _steps(
    config: OptimizerConfig,
    model: ModelConfig | None,
    directions: Any,
    params: Any,
    rate: Any,
    decay: Any,
) -> Any:
    """`rate` times the steps of all weights."""
    leaves, tree = jax.tree.flatten(params)
    columns = zip(
        tree.flatten_up_to(directions),
        leaves,
        step_rules(config, model, params, decay),
        strict=True,
    )
    return tree.unflatten([rate * rule(direction, w) for direction, w, rule in columns])
