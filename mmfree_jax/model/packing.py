"""`Packed` weights, made of `Ternary` ones or of the tensors of a packed file."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mmfree_jax.errors import ConfigError
from mmfree_jax.model import depth
from mmfree_jax.model.functional import forget_gate_lower_bounds
from mmfree_jax.model.layer import GLUWeights
from mmfree_jax.model.mixer import packed_weights
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.weights import (
    EmbeddingTable,
    Packed,
    PackedBlocks,
    PackedLinear,
    Params,
    Ternary,
    with_plain_scale,
)
from mmfree_jax.model_config import BITLINEAR, ModelConfig
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul


def can_pack(config: ModelConfig) -> bool:
    """Whether the model can run packed."""
    return not not_packed(config)


def not_packed(config: ModelConfig) -> list[str]:
    """The settings for which a model cannot run packed, as model.NAME; none where it can."""
    groups = ("mixer_linear", "glu_linear", "head_linear")
    wrong = [name for name in groups if getattr(config, name) != BITLINEAR]
    wrong += ["float_attention"] * config.float_attention
    wrong += ["short_conv"] * bool(config.short_conv)
    if "attention" in config.period and config.attention_bias != "none":
        wrong.append("attention_bias")
    if not all(mixer_of(name).packed for name in config.period):
        wrong.append("mixer")
    return [f"model.{name}" for name in wrong]


def refuse_unpackable(config: ModelConfig) -> None:
    """Refuses a model that cannot run packed.

    Raises:
      ConfigError: names the settings.
    """
    if wrong := not_packed(config):
        raise ConfigError(
            f"the model is a {config.family} that cannot run packed for its {', '.join(wrong)}: "
            "load it ternary"
        )


def pack(weights: Ternary, config: ModelConfig) -> Packed:
    """The trits at 2 bits, in the layout that this backend's kernels read.

    Raises:
      ConfigError: it cannot run packed.
    """
    refuse_unpackable(config)

    def linear(*path: str) -> PackedLinear:
        own, params = _at(weights.ternary, path), _at(weights.params, path)
        return PackedLinear(_pack_matrix(own["trits"]), own["scale"], params["norm_scale"])

    return for_this_device(_assemble(weights.params, linear, config))


_pack_matrix = jax.jit(lambda trits: packed_matmul.pack(trits))


def packed_from_tree(
    tree: Params, config: ModelConfig, layout: Literal["bytes", "words"] = "bytes"
) -> Packed:
    """From the tensors of a packed file, nested by their names (see `saved/packed.py`).

    Works out the lower bounds of the forget gates, which a file does not hold.

    Args:
      tree: as {"head": {"packed", "scale", "norm_scale"}, ...}.
      config: of the model.
      layout: of the matrices under "packed".
    """

    def linear(*path: str) -> PackedLinear:
        node = _at(tree, path)
        return PackedLinear(node["packed"], node["scale"], node["norm_scale"], layout)

    return _assemble(tree, linear, config)


def _at(tree: Params, path: tuple[str, ...]) -> Params:
    return functools.reduce(lambda node, name: node[name], path, tree)


def _assemble(tree: Params, linear: Callable[..., PackedLinear], config: ModelConfig) -> Packed:
    """A model of its linear layers, which `linear` makes by their paths, and its other leaves."""
    of_layers = depth.of_layers(config, lower_bounds(tree.get("lower_bounds"), config))

    def of_place(place: int) -> PackedBlocks:
        path = depth.place_path(place, config)
        mixer, glu = (functools.partial(linear, *path, name) for name in ("mixer", "glu"))
        blocks = _at(tree, path)
        return PackedBlocks(
            packed_weights(mixer_of(config.period[place]), config, blocks, mixer, of_layers[place]),
            GLUWeights(
                norm=blocks["glu_norm"]["scale"],
                gate_up_proj=glu("gate_up_proj"),
                down_proj=glu("down_proj"),
            ),
        )

    return Packed(
        EmbeddingTable(tree["embedding"]["weight"], tree["embedding"].get("scale")),
        tuple(map(of_place, range(len(config.period)))),
        tree["final_norm"]["scale"],
        linear("head"),
        decode_op=with_plain_scale(config).as_released,
    )


def lower_bounds(raw_MD: jax.Array | None, config: ModelConfig) -> jax.Array:
    """The lower bounds of all forget gates that have them, [M, E], of the logits; else zero.

    A program of its own, as in `ternarise_matrix`: fused with others its sums have other last
    bits, and a model packed in memory parts from its packed file after some greedy tokens.
    """
    if raw_MD is None:
        return jnp.zeros((config.bounded_layers, config.state_size), jnp.float32)
    return _lower_bounds(raw_MD.astype(jnp.float32))


_lower_bounds = jax.jit(forget_gate_lower_bounds)


def for_this_device(packed: Packed) -> Packed:
    """Packed weights in the layout that this backend's kernels read."""
    return in_words(packed) if packed_matmul.kernels_serve() else packed


@jax.jit
def in_words(packed: Packed) -> Packed:
    """Packed weights in the layout that GPU kernels read."""
    return jax.tree.map(
        lambda linear: linear.in_words() if isinstance(linear, PackedLinear) else linear,
        packed,
        is_leaf=lambda x: isinstance(x, PackedLinear),
    )
