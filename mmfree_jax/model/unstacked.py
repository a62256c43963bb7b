"""Weights with each layer's arrays by themselves, for decoding with dense or int8 products.

Of a stack of all layers XLA copies the slice that a larger product reads, once a layer and token:
three times the traffic of the weights (the GLU's from 1.3B on, the compiled program for an H100).
Unrolled, it makes all these copies before the loop over tokens: twice the memory. Arrays of their
own are read in place, and so are the caches of keys and values, which a scan writes whole.
"""

import jax
import jax.numpy as jnp

from mmfree_jax.model import depth
from mmfree_jax.model.state import State
from mmfree_jax.model.weights import (
    DecodingWeights,
    Master,
    Params,
    Ternary,
    Unstacked,
    linear_options,
)
from mmfree_jax.model_config import ModelConfig


def for_decoding(weights: DecodingWeights, config: ModelConfig) -> DecodingWeights:
    """The weights as a loop over tokens reads them quickest on this device.

    Off the CPU, where programs of unrolled layers take long to compile, those that are not packed
    are unstacked.
    """
    if isinstance(weights, Master | Ternary) and jax.default_backend() != "cpu":
        return unstack(weights, config)
    return weights


def unstack(weights: Master | Ternary, config: ModelConfig) -> Unstacked:
    """The layers' arrays out of their stacks, which the caller may drop then.

    Dense matrices are rounded to the compute dtype, as each product would round them.

    Args:
      weights: of the model, stacked.
      config: that they are used with.
    """
    dtype = jnp.dtype(config.compute_dtype)

    def narrow(tree: Params, path: tuple[str, ...]) -> Params:
        out: Params = {}
        for name, value in tree.items():
            here = (*path, name)
            if isinstance(value, dict):
                out[name] = narrow(value, here)
            elif (options := linear_options(config, here)) and not options.ternary_weights:
                out[name] = value.astype(dtype)
            else:
                out[name] = value
        return out

    def without(tree: Params) -> Params:
        return {name: value for name, value in tree.items() if name != "blocks"}

    params = narrow(weights.params, ())
    layers = depth.unstack(params["blocks"], config)
    if isinstance(weights, Master):
        return Unstacked(Master(without(params)), tuple(map(Master, layers)))
    trits = depth.unstack(weights.ternary.get("blocks", {}), config)
    return Unstacked(
        Ternary(without(params), without(weights.ternary)),
        tuple(Ternary(*of_one) for of_one in zip(layers, trits, strict=True)),
    )


def unstack_state(state: State, config: ModelConfig) -> State:
    """The carried state with a tree a layer: a loop then writes each in place."""
    return State(state.position_B, depth.unstack(state.layers, config))


def stack_state(state: State, config: ModelConfig) -> State:
    """The carried state as `State` holds it between calls."""
    return State(state.position_B, depth.stack(state.layers, config))
