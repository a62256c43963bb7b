"""What a parameter's place in the model decides: whether it decays, and its factors of the rate."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.model.mup import rate_scale
from mmfree_jax.model_config import ModelConfig

Group = Literal["embedding", "head", "matrix", "vector"]
StepRule = Callable[[jax.Array, jax.Array], jax.Array]
"""Of a direction and a weight the step, all but the rate:

  group's factor * (muP's factor * direction + weight_decay * w)

The decay has no factor of muP: a weight loses the same share of itself at every width.
"""


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The names along a path of a pytree."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def group_of(path: tuple[Any, ...]) -> Group:
    """The group of the parameter at `path`: what is no weight of a product is a vector."""
    names = path_names(path)
    if names[-1] != "weight":
        return "vector"
    if "embedding" in names:
        return "embedding"
    return "head" if "head" in names else "matrix"


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay applies to: matrices but the embedding's.

    Norm scales, lower bounds and the embedding are left alone.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _decays(path), params)


def _decays(path: tuple[Any, ...]) -> bool:
    return group_of(path) in ("matrix", "head")


def step_rules(
    config: OptimizerConfig, model: ModelConfig | None, params: Any, weight_decay: Any
) -> list[StepRule]:
    """The rule of each leaf of `params`, in their order, with the weight decay of the step."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    return [_step_rule(config, model, path, weight_decay) for path, _ in paths]


def _step_rule(
    config: OptimizerConfig, model: ModelConfig | None, path: tuple[Any, ...], weight_decay: Any
) -> StepRule:
    rate: float = getattr(config, f"{group_of(path)}_rate")
    scale = 1.0 if model is None else rate_scale(model, path_names(path))
    decays = bool(config.weight_decay) and _decays(path)

    def rule(direction: jax.Array, w: jax.Array) -> jax.Array:
        step = direction if scale == 1 else direction * scale
        if decays:
            step = step + weight_decay * w
        return step if rate == 1 else step * rate

    return rule
