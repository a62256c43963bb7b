"""Ternarising a model's weights, once for a whole step or for good."""

from typing import Any

import jax

from mmfree_jax.config import LinearConfig, ModelConfig
from mmfree_jax.pallas_kernels.ternary_matmul.reference import ternarize

_GROUPS = ("mixer", "glu", "head")


def linear_options(config: ModelConfig, path: tuple[str, ...]) -> LinearConfig | None:
    """The options of the linear layer whose parameter lies at `path`; None for other leaves."""
    groups = {
        "mixer": config.mixer_linear,
        "glu": config.glu_linear,
        "head": config.head_linear,
    }
    if path[-1] != "weight" or path[0] == "embedding":
        return None
    return groups[next(name for name in path if name in _GROUPS)]


def ternary_weights(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The variable collection `ternary`: trits and scale of every ternary weight.

    Made outside the layer loop, so that neither recomputation nor a second micro-batch
    ternarises again. The gradient goes to `params`; none goes through here.

    Args:
      params: the parameter tree.
      config: of the model.

    Returns:
      A tree that mirrors `params`, with {"trits": int8, "scale": float32} for each ternary
      weight and nothing else.
    """

    def visit(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        out = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                if inner := visit(value, (*path, name)):
                    out[name] = inner
            else:
                options = linear_options(config, (*path, name))
                if options is not None and options.ternary_weights:
                    trits, scale = ternarize(jax.lax.stop_gradient(value))
                    out |= {"trits": trits, "scale": scale}
        return out

    return visit(params, ())
