"""The parameter tree by path: names joined by slashes, as files and messages have them."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.model.language_model import LanguageModel
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model_config import ModelConfig


def param_shapes(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of a model, by path, in the order of the tree."""
    return dict(_shapes(config, tuple(mixer_of(name).module for name in config.period)))


@functools.lru_cache(maxsize=32)  # a run asks several times, and tracing a model takes a second
def _shapes(config: ModelConfig, mixers: tuple[Any, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    del mixers  # a user's module that was loaded anew has others under the same names
    return flatten(jax.eval_shape(functools.partial(init_params, config), jax.random.key(0)))


def init_params(config: ModelConfig, rng: jax.Array) -> dict[str, Any]:
    """The parameters that a model begins with. Pure: jit or eval_shape it.

    Neither shapes nor values (but for how a compiler rounds the last place) depend on how the model
    is computed, of which this takes what starts soonest: layers in a loop, as they take many times
    as long to compile one by one; and products of floats, since each size of an int8 product that
    is new to a GPU is tried out there (those of a fused BitLinear, as `matmul_kernel` has them, are
    refused where sums may not be exact).
    """
    how = dataclasses.replace(
        config, scan_layers=True, bitlinear="plain", backward="bf16", matmul_kernel=None
    )
    return dict(LanguageModel(how).init(rng, jnp.zeros((1, 1), jnp.int32))["params"])


def param_count(config: ModelConfig) -> int:
    """Number of a model's parameters."""
    return sum(math.prod(x.shape) for x in param_shapes(config).values())


def flatten(tree: Mapping[str, Any], prefix: str = "", separator: str = "/") -> dict[str, Any]:
    """Paths joined by slashes, and leaves, of a nested dict."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flatten(value, f"{prefix}{name}{separator}", separator)
        else:
            leaves[prefix + name] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict from paths joined by slashes."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree
