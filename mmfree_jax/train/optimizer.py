"""AdamW in one pass over the weights, gradient clipping and learning-rate schedules."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model.mup import rate_scale
from mmfree_jax.model_config import ModelConfig

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


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices but the embedding's.

    Norm scales, lower bounds and the embedding are left alone.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [_name(key) for key in path]
        return names[-1] == "weight" and "embedding" not in names

    return jax.tree_util.tree_map_with_path(decays, params)


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", key)))


class Optimizer(NamedTuple):
    """What the training step needs of an optimiser.

    Attributes:
      init: params -> state.
      update: (gradients, state, params, values, *, scale, norm, apply) -> (params, state).
        `values` are the schedule's; the gradients are to be multiplied by `scale`, after which
        their global norm is `norm`; both results are the old ones where `apply` is false.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


@functools.cache
def make_optimizer(config: OptimizerConfig, model: ModelConfig | None = None) -> Optimizer:
    """Global-norm clipping, then AdamW with decoupled weight decay on `decay_mask`.

    Each update subtracts `rate * (m / (sqrt(v) + eps) + weight_decay * w)` with
    bias-corrected moments; `rate` is `learning_rate` at the number of updates made before. The
    numbers and the state are those of optax's chain of clip_by_global_norm, scale_by_adam,
    add_decayed_weights and scale_by_learning_rate. Here everything that happens to one weight
    is one expression, which reads and writes weights and moments once: scaling, clipping, and
    keeping the old values where the update is not to be made.

    Where `model` has muP the first term has a factor for each parameter (`mup.rate_scale`), and
    the decay has none: a weight loses the same share of itself at every width.
    """
    return Optimizer(
        init=functools.partial(_init, config), update=functools.partial(_update, config, model)
    )


def _init(config: OptimizerConfig, params: Any) -> tuple[Any, ...]:
    def zeros(dtype: str) -> Any:
        return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

    count = jnp.zeros((), jnp.int32)
    return _arranged(config, count, zeros(config.moment_dtype), zeros(config.second_moment_dtype))


def rearranged(config: OptimizerConfig, state: Any) -> tuple[Any, ...]:
    """The state of an optimiser of other settings, as one of `config` has it.

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


def _rate_scales(config: ModelConfig | None, params: Any) -> Any:
    """The factor of each parameter's rate."""

    def scale(path: tuple[Any, ...], _: Any) -> float:
        return 1.0 if config is None else rate_scale(config, tuple(map(_name, path)))

    return jax.tree_util.tree_map_with_path(scale, params)


def _update(
    config: OptimizerConfig,
    model: ModelConfig | None,
    grads: Any,
    state: tuple[Any, ...],
    params: Any,
    values: ScheduleValues,
    *,
    scale: jax.Array,
    norm: jax.Array,
    apply: jax.Array,
) -> tuple[Any, tuple[Any, ...]]:
    adam = next(s for s in state if isinstance(s, optax.ScaleByAdamState))
    rate = learning_rate(config.schedule, values, adam.count)
    if config.clip_norm is not None:
        scale = scale * jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm)
    count = optax.safe_increment(adam.count)
    m_correction, v_correction = (1.0 / (1.0 - b**count) for b in (config.b1, config.b2))

    def update(
        w: jax.Array, m: jax.Array, v: jax.Array, g: jax.Array, decays: bool, factor: float
    ) -> tuple[jax.Array, ...]:
        g = g.astype(jnp.float32) * scale
        m_new = config.b1 * m.astype(jnp.float32) + (1.0 - config.b1) * g
        v_new = config.b2 * v.astype(jnp.float32) + (1.0 - config.b2) * g * g
        step = m_new * m_correction / (jnp.sqrt(v_new * v_correction) + config.eps)
        if factor != 1:
            step *= factor
        if decays and config.weight_decay:
            step += config.weight_decay * w
        new = w - rate * step, m_new, v_new
        return tuple(
            jnp.where(apply, a.astype(b.dtype), b) for a, b in zip(new, (w, m, v), strict=True)
        )

    leaves, tree = jax.tree.flatten(params)
    trees = (adam.mu, adam.nu, grads, decay_mask(params), _rate_scales(model, params))
    rest = (tree.flatten_up_to(t) for t in trees)
    results = [update(*each) for each in zip(leaves, *rest, strict=True)]
    params, mu, nu = (tree.unflatten(column) for column in zip(*results, strict=True))
    count = jnp.where(apply, count, adam.count)
    after = {
        optax.ScaleByAdamState: optax.ScaleByAdamState(count, mu, nu),
        optax.ScaleByScheduleState: optax.ScaleByScheduleState(count),
    }
    return params, tuple(after.get(type(s), s) for s in state)
