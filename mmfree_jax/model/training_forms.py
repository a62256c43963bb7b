"""What a step trains before the model is ternary: layers that are float, or in between.

A blended layer's weights are w + strength (T(w) - w), and so are its inputs with Q8, as in Hugging
Face's fine-tuning to 1.58 bits; gradients go straight through. The norms are those of the ternary
layer throughout, so that the parameters, and what an optimiser keeps of them, are the same.
Products of float and blended layers are in the compute dtype, forward and backward: there are no
trits for `ModelConfig.backward` and `matmul_kernel` to act on.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax

from mmfree_jax.model.quantize import fake_ternarize
from mmfree_jax.model.weights import Blended, Master, Params, Ternary, is_ternary, training_weights
from mmfree_jax.model_config import LinearConfig, ModelConfig
from mmfree_jax.quantizer_config import Form


def config_of_form(form: Form, config: ModelConfig) -> ModelConfig:
    """The model as a step of that form computes it, on the weights of `weights_of_form`."""
    if form == "ternary":
        return config

    def changed(group: LinearConfig) -> LinearConfig:
        rounds = group.int8_activations and form == "blended"
        return dataclasses.replace(group, ternary_weights=False, int8_activations=rounds)

    return dataclasses.replace(
        config,
        mixer_linear=changed(config.mixer_linear),
        glu_linear=changed(config.glu_linear),
        head_linear=changed(config.head_linear),
        weight_scale="matrix",
        ternary_qk=config.ternary_qk and form == "blended",
    )


def weights_of_form(
    form: Form, params: Params, config: ModelConfig, strength: jax.Array
) -> Master | Blended | Ternary:
    """The weights that a training step of that form reads.

    Made outside the layer loop, once a step. The gradient at `params` of what is returned is the
    straight-through one of the masters.

    Args:
      form: of the step.
      params: master weights.
      config: of the model, not of the form.
      strength: float32 scalar, read by blended layers.
    """
    if form == "ternary":
        return training_weights(params, config)
    if form == "float":
        return Master(params)

    def blended(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = tuple(str(key.key) for key in path)
        if not is_ternary(config, names):
            return leaf
        layer = functools.reduce(operator.getitem, names[:-1], params)
        return fake_ternarize(leaf, config.weight_scale, layer.get("log_scale"), strength)

    return Blended(jax.tree_util.tree_map_with_path(blended, params), strength)
