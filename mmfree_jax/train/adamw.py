"""AdamW in one pass over the weights.

The numbers and the state are those of optax's chain of clip_by_global_norm, scale_by_adam,
add_decayed_weights and scale_by_learning_rate. Here everything that happens to one weight is one
expression, which reads and writes weights and moments once: scaling, and keeping the old values
where the update is not to be made.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.train.parameter_rules import StepRule, step_rules
from mmfree_jax.train.schedule import ScheduleValues, learning_rate, weight_decay


def init(config: OptimizerConfig, params: Any) -> tuple[Any, ...]:
    """The state before the first update."""

    def zeros(dtype: str) -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

    count = jnp.zeros((), jnp.int32)
    return _arranged(config, count, zeros(config.moment_dtype), zeros(config.second_moment_dtype))


def rearranged(config: OptimizerConfig, state: Any) -> tuple[Any, ...]:
    """The state of AdamW under other settings, as one of `config` has it.

    Updates made and both moments are kept, the moments in `config`'s dtypes.
    """
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))

    def cast(tree: Any, dtype: str) -> Any:
        return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), tree)

    mu, nu = cast(adam.mu, config.moment_dtype), cast(adam.nu, config.second_moment_dtype)
    return _arranged(config, adam.count, mu, nu)


def _arranged(config: OptimizerConfig, count: Any, mu: Any, nu: Any) -> tuple[Any, ...]:
    adam = optax.ScaleByAdamState(count, mu, nu)
    schedule = optax.ScaleByScheduleState(count)
    clip = (optax.EmptyState(),) * (config.clip_norm is not None)
    decay = (optax.MaskedState(optax.EmptyState()),) * bool(config.weight_decay)
    return (*clip, adam, *decay, schedule)


def update(
    config: OptimizerConfig,
    model: ModelConfig | None,
    grads: Any,
    state: tuple[Any, ...],
    params: Any,
    values: ScheduleValues,
    *,
    scale: jax.Array,
    apply: jax.Array,
) -> tuple[Any, tuple[Any, ...]]:
    """Subtracts `rate * rule(m / (sqrt(v) + eps), w)`, with bias-corrected moments.

    Args and results are those of `Optimizer.update`, the clipping being part of `scale`.
    """
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    rate = learning_rate(config.schedule, values, adam.count)
    count = optax.safe_increment(adam.count)
    m_correction, v_correction = (1.0 / (1.0 - b**count) for b in (config.b1, config.b2))

    def one(
        w: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, rule: StepRule
    ) -> tuple[jax.Array, ...]:
        g = g.astype(jnp.float32) * scale
        m_new = config.b1 * m.astype(jnp.float32) + (1.0 - config.b1) * g
        v_new = config.b2 * v.astype(jnp.float32) + (1.0 - config.b2) * g * g
        direction = m_new * m_correction / (jnp.sqrt(v_new * v_correction) + config.eps)
        new = w - rate * rule(direction, w), m_new, v_new
        return tuple(
            jnp.where(apply, a.astype(b.dtype), b) for a, b in zip(new, (w, m, v), strict=True)
        )

    leaves, tree = jax.tree.flatten(params)
    rest = (tree.flatten_up_to(t) for t in (adam.mu, adam.nu, grads))
    rules = step_rules(config, model, params, weight_decay(config, values, adam.count))
    results = [one(*each) for each in zip(leaves, *rest, rules, strict=True)]
    params, mu, nu = (tree.unflatten(column) for column in zip(*results, strict=True))
    count = jnp.where(apply, count, adam.count)
    after = {
        optax.ScaleByAdamState: optax.ScaleByAdamState(count, mu, nu),
        optax.ScaleByScheduleState: optax.ScaleByScheduleState(count),
    }
    return params, tuple(after.get(type(s), s) for s in state)
