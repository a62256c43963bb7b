"""What the rest of the program knows of a token mixer, whichever it is.

A mixer's module has one form for all its uses: with many tokens it is the parallel form, with one
token and a state the one-token form. Whoever writes one of their own finds here what it is made of;
docs/adding-a-mixer.md goes through an example.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model.layer import Operations, Steps
from mmfree_jax.model.linear import projections
from mmfree_jax.model.operations import Rows, linear_over, run_mixer, token_shift
from mmfree_jax.model_config import ModelConfig

__all__ = [
    "Kept",
    "Mixer",
    "OfLayer",
    "Operations",
    "PackedForm",
    "Rows",
    "Steps",
    "linear_over",
    "one_vector",
    "projections",
    "run_mixer",
    "token_shift",
]


class OfLayer(NamedTuple):
    """What a mixer is given beside its parameters, of one layer or stacked over all.

    Attributes:
      lower_bound_E: of a forget gate, float32; None where the mixer has none.
      index: of the layer, int32, which initialisations may depend on.
    """

    lower_bound_E: jax.Array | None = None
    index: jax.Array | None = None


class Kept(NamedTuple):
    """Channels of a token that the backward pass keeps of one mixer, by `ModelConfig.remat`.

    Attributes:
      states, gated, gates: beyond what "stream" keeps.
      inputs: read by its linear layers, under "none".
      float32: under "none", in float32.
      compute: under "none", in the compute dtype.
      working: in float32, of one layer alone and only while its backward pass runs.
    """

    states: int
    gated: int
    gates: int
    inputs: int
    float32: int
    compute: int
    working: int = 0


class PackedForm(NamedTuple):
    """How a mixer runs on packed weights.

    Attributes:
      weights: what `mix` reads, a NamedTuple whose linear layers have the names of the parameter
        tree; "lower_bound" is what the layer is given.
      mix: (operations, weights, x, update, state, config) -> x + update, the mixer's update of
        it, and the new state.
      vectors: the paths in a block's parameters of the others, by their names; what a config
        leaves out is None.
    """

    weights: type[Any]
    mix: Callable[..., tuple[Any, Any, dict[str, Any]]]
    vectors: dict[str, str]


class Mixer(NamedTuple):
    """A token mixer.

    Attributes:
      module: its Linen module. `module(config)(x_BTD, norm_scale_D, rows, of_layer, state)` gives
        x as the block goes on with it, the update of the residual stream [B, T, D], and the
        new state (None without one).
      state: (config, (layers, rows), places of a cache) -> the state before the first token, its
        arrays [layers, rows, ...]. Attention alone has a cache.
      matrices: each matrix of a layer by its name, (outputs, inputs). On a mesh the outputs of
        `NAME_proj` are split over tensor and the inputs over fsdp, those of `o_proj` the other way
        round; without a tensor axis, outputs over fsdp; what else the module has is whole on each
        device.
      norms: parameters of a layer in norms that are not the linear layers' own.
      vectors: other parameters of a layer that are no matrices.
      mixing_flops: (config, length of a row, layers with lower bounds before this one) ->
        operations a token of the layer, between tokens and element-wise.
      kept: what the backward pass keeps.
      packed: None: it has no packed form.
    """

    module: type[nn.Module]
    state: Callable[[ModelConfig, tuple[int, int], int | None], dict[str, jax.Array]]
    matrices: Callable[[ModelConfig], dict[str, tuple[int, int]]]
    norms: Callable[[ModelConfig], int]
    vectors: Callable[[ModelConfig], int]
    mixing_flops: Callable[[ModelConfig, int, int], float]
    kept: Callable[[ModelConfig], Kept]
    packed: PackedForm | None = None


def one_vector(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """The state of mixers that keep no more, as `Mixer.state`: {"h": [L, B, E] float32}."""
    del max_length
    return {"h": jnp.zeros((*rows, config.state_size), jnp.float32)}


def packed_weights(
    mixer: Mixer,
    config: ModelConfig,
    blocks: dict[str, Any],
    linear: Callable[[str], Any],
    of_layer: OfLayer,
) -> Any:
    """What the packed form of a mixer reads.

    Args:
      mixer: one that has a packed form.
      config: of the model.
      blocks: stacked parameters of the blocks.
      linear: a linear layer, stacked, by its name.
      of_layer: stacked.
    """
    form, matrices = mixer.packed, mixer.matrices(config)
    assert form is not None

    def vector(path: str) -> Any:
        node: Any = blocks
        for key in path.split("/"):
            node = None if node is None else node.get(key)
        return node

    def value(name: str) -> Any:
        if name in matrices:
            return linear(name)
        if name in form.vectors:
            return vector(form.vectors[name])
        return of_layer.lower_bound_E if name == "lower_bound" else None

    return form.weights(**{name: value(name) for name in form.weights._fields})
