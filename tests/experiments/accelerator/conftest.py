"""A tiny model with uneven norms and scales, as trained ones have, in integers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.experiments.accelerator.numerics import parse_numerics
from mmfree_jax.experiments.accelerator.quantized import Quantized, quantize
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.weights import as_weights
from mmfree_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=18,
    num_layers=2,
    intermediate_size=30,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters whose norms, bounds and embedding are far from their initial values."""
    shapes = jax.eval_shape(
        LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "norm_scale"):
            return jnp.asarray(np.exp(rng.normal(0, 0.4, leaf.shape)), jnp.float32)
        size = {"lower_bounds": 0.5}.get(name, 0.3 if "embedding" in str(path) else 0.1)
        return jnp.asarray(rng.normal(0, size, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def quantized_model(numerics: str = "fixed:w8a16", seed: int = 0, **shape: int) -> Quantized:
    """A random model of `CONFIG`, its shape changed, in integers."""
    config = dataclasses.replace(CONFIG, **shape)
    variables = as_weights(random_params(config, seed), config)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    return quantize(variables, config, parse_numerics(numerics), tokens)


@pytest.fixture(scope="session")
def quantized():
    """Makes random models in integers: (numerics, seed, **shape)."""
    return quantized_model
