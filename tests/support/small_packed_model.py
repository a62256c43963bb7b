"""A small MatMul-free model whose norms and bounds are as training leaves them."""

import functools

import jax
import jax.numpy as jnp

from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig

# Widths that neither 4 nor 5 divides.
BASE = ModelConfig(
    vocab_size=61,
    hidden_size=38,
    num_layers=2,
    intermediate_size=47,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)


@functools.cache
def build(config):
    model = LanguageModel(config)
    return model, _params(model)


@functools.partial(jax.jit, static_argnums=0)  # A hundred small programs take seconds.
def _params(model):
    params = model.init(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]
    keys = iter(jax.random.split(jax.random.key(9), 64))
    # Norms and bounds away from their initial values, as training leaves them.
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x + 0.3 * jax.random.normal(next(keys), x.shape)
            if "weight" not in jax.tree_util.keystr(path)
            else 3 * x
        ),
        params,
    )
