"""The parameters of a model that nobody has trained."""

from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig


def initial_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """By one program: without jit, each of its hundred operations is compiled alone."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(LanguageModel(config).init)(jax.random.key(seed), tokens)["params"]
