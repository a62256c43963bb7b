"""The forms of a model's weights, and how one is made from another.

  Master     the float parameters that training updates and checkpoints hold
  Ternary    trits and one scale for each ternary matrix, beside the other parameters
  Packed     a MatMul-free model for decoding, its trits at 2 bits
  Unstacked  either of the first two with each layer by itself, for decoding (`unstacked.py`)
  Blended    in training alone: parameters that are rounded in part (`training_forms.py`)

Each is a pytree; `LanguageModel.apply` and everything in `infer/` takes any of them. They are made
downwards only, `Master` to `Ternary` to `Packed`: ternarising again would change the trits.

Shapes: L layers, N outputs and K inputs of a matrix, Q bytes of a packed row, D hidden channels,
E state channels, M GLU width, V vocabulary.
"""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp

from mmfree_jax.model import depth, quantize
from mmfree_jax.model.layer import GLUWeights
from mmfree_jax.model_config import GROUP, LinearConfig, ModelConfig, WeightScale
from mmfree_jax.pallas_kernels.packed_matmul import api as packed_matmul
from mmfree_jax.parallel.sharding import constrain_parameter

# A nested dict of arrays, whose keys are those of ARCHITECTURE.md.
Params = dict[str, Any]


@flax.struct.dataclass
class Master:
    """Float parameters as trained.

    Attributes:
      params: the tree of ARCHITECTURE.md.
    """

    params: Params


@flax.struct.dataclass
class Blended:
    """Float parameters on their way to trits; see `training_forms.py`.

    Attributes:
      params: w + strength (T(w) - w) for each weight w of a ternary layer; others as trained.
      strength: float32 scalar, from 0 to 1, of the activations' quantisers too.
    """

    params: Params
    strength: jax.Array


@flax.struct.dataclass
class Ternary:
    """Trits in place of the ternary layers' master weights.

    Attributes:
      params: the other parameters, in the tree of ARCHITECTURE.md. In training the master weights
        too, which get the gradient.
      ternary: a tree that mirrors it, with {"trits": [.., N, K] int8, "scale": [.., 1, 1] float32}
        for each ternary matrix and nothing else; the scale [.., N, K / 128] with groups.
    """

    params: Params
    ternary: Params


@flax.struct.dataclass
class PackedLinear:
    """BitLinears of one place in the model: a stack over layers, or one alone.

    Attributes:
      matrix: trits at 2 bits; layout "bytes": [.., N, Q] uint8 (`packed_matmul/reference.py`),
        "words": [.., N, Q / 4] int32, which GPU kernels read (`packed_matmul/words.py`).
      scale: float32 [.., 1, 1], of the matrix, or [.., N, K / 128], of groups of its inputs.
      norm_scale: [.., K], of the layer's own RMSNorm.
      layout: static.
    """

    matrix: jax.Array
    scale: jax.Array
    norm_scale: jax.Array
    layout: Literal["bytes", "words"] = flax.struct.field(pytree_node=False, default="bytes")

    @property
    def columns(self) -> int:
        """K."""
        return self.norm_scale.shape[-1]

    def rows(self) -> jax.Array:
        """The packed rows as bytes, [.., N, Q] uint8, from either layout."""
        return packed_matmul.from_words(self.matrix) if self.layout == "words" else self.matrix

    def trits(self) -> jax.Array:
        """[.., N, K] int8."""
        return packed_matmul.unpack(self.rows(), self.columns)

    def in_words(self) -> "PackedLinear":
        """The same in the layout that GPU kernels read."""
        if self.layout == "words":
            return self
        words = packed_matmul.to_words(self.matrix, self.columns)
        return PackedLinear(words, self.scale, self.norm_scale, layout="words")


@flax.struct.dataclass
class EmbeddingTable:
    """The embedding as a packed model stores it.

    Attributes:
      table_VD: float, or int8.
      row_scale_V1: float32, multiplies the rows of an int8 table; None for a float one.
    """

    table_VD: jax.Array
    row_scale_V1: jax.Array | None = None


@flax.struct.dataclass
class PackedBlocks:
    """The blocks of one place of the period (`depth.py`), stacked.

    Attributes:
      mixer: what its `PackedForm.mix` reads.
      glu: what `layer.glu` reads.
    """

    mixer: Any
    glu: GLUWeights[PackedLinear, jax.Array]


@flax.struct.dataclass
class Packed:
    """A model whose linear layers are BitLinears throughout, its trits at 2 bits.

    Attributes:
      embedding: the table.
      blocks: of each place of the period.
      final_norm_D: scale of the last RMSNorm.
      head: one BitLinear, not a stack.
      decode_op: static; the kernels of `pallas_kernels/decode` compute this model.
    """

    embedding: EmbeddingTable
    blocks: tuple[PackedBlocks, ...]
    final_norm_D: jax.Array
    head: PackedLinear
    decode_op: bool = flax.struct.field(pytree_node=False, default=True)

    @property
    def mixer(self) -> Any:
        """Of a model whose layers are all alike."""
        (blocks,) = self.blocks
        return blocks.mixer

    @property
    def glu(self) -> GLUWeights[PackedLinear, jax.Array]:
        """Of a model whose layers are all alike."""
        (blocks,) = self.blocks
        return blocks.glu

    def head_stack(self) -> PackedLinear:
        """The head as a stack of one layer, for kernels that take stacks."""
        scale = self.head.scale[None]
        norm_scale = self.head.norm_scale[None]
        return PackedLinear(self.head.matrix[None], scale, norm_scale, self.head.layout)


@flax.struct.dataclass
class Unstacked:
    """Weights in which no array holds more than one layer's.

    Attributes:
      rest: all but the blocks.
      blocks: one a layer, in the tree of `blocks` without the leading axis.
    """

    rest: Master | Ternary
    blocks: tuple[Master | Ternary, ...]


Weights = Master | Ternary | Packed
DecodingWeights = Weights | Unstacked


def collections(weights: Master | Blended | Ternary) -> dict[str, Any]:
    """The weights as Flax's collections of variables."""
    if isinstance(weights, Master):
        return {"params": weights.params}
    if isinstance(weights, Blended):
        return {"params": weights.params, "quantizers": {"strength": weights.strength}}
    return {"params": weights.params, "ternary": weights.ternary}


def linear_options(config: ModelConfig, path: tuple[str, ...]) -> LinearConfig | None:
    """The options of the linear layer whose parameter lies at `path`; None for other leaves."""
    if path[-1] != "weight" or path[0] == "embedding":
        return None
    if "mixer" in path:
        return config.linear_of(depth.mixer_at(path, config))
    return config.glu_linear if "glu" in path else config.head_linear


def is_ternary(config: ModelConfig, path: tuple[str, ...]) -> bool:
    """Whether the parameter at `path` is the weight of a ternary layer."""
    options = linear_options(config, path)
    return options is not None and options.ternary_weights


def ternarise_matrix(
    master: jax.Array, weight_scale: WeightScale = "matrix", log_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`quantize.ternarise`, as a program of its own wherever decoding or a file gets weights.

    A scale is a float32 sum, whose order a compiler chooses for each program. One program for each
    shape gives one scale on one kind of device; inside a larger program (training) it is part of
    that.
    """
    return _ternarise_matrix(master.astype(jnp.float32), weight_scale, log_scale)


_ternarise_matrix = jax.jit(quantize.ternarise, static_argnums=1, inline=True)


def scale_shape(shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Of the scales of a ternary weight [.., N, K]."""
    if config.weight_scale == "groups":
        return (*shape[:-1], shape[-1] // GROUP)
    return (*shape[:-2], 1, 1)


def with_plain_scale(config: ModelConfig) -> ModelConfig:
    """The config of a model's trits and scales: a learnt scale is one a matrix like any other."""
    if config.weight_scale != "learned":
        return config
    return dataclasses.replace(config, weight_scale="matrix")


def ternary_weights(params: Params, config: ModelConfig) -> Params:
    """Trits and scale of every ternary weight: the tree `Ternary.ternary`.

    Made outside the layer loop, so that neither recomputation nor a second micro-batch
    ternarises again. The gradient goes to `params`; none goes through here.
    """

    def visit(tree: Params, path: tuple[str, ...]) -> Params:
        out: Params = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                if inner := visit(value, (*path, name)):
                    out[name] = inner
            elif is_ternary(config, (*path, name)):
                trits, scale = ternarise_matrix(
                    jax.lax.stop_gradient(value), config.weight_scale, tree.get("log_scale")
                )
                # Trits are to travel, not the weights that they are made of.
                trits = constrain_parameter("/".join((*path, name)), trits)
                if config.weight_scale == "groups":
                    scale = constrain_parameter("/".join((*path, name)), scale)
                out |= {"trits": trits, "scale": scale}
        return out

    return visit(params, ())


def training_weights(params: Params, config: ModelConfig) -> Master | Ternary:
    """The weights that a training step reads: the masters, and beside them their trits.

    Stays `Master` where the program ternarises its weights itself (`bitlinear: plain`).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax.model import training_weights
      >>> weights = training_weights(params, config)
      >>> weights.ternary["head"]["trits"].dtype
      dtype('int8')
    """
    if config.bitlinear == "plain":
        return Master(params)
    return Ternary(params, ternary_weights(params, config))


def ternarise(params: Params, config: ModelConfig) -> Master | Ternary:
    """The weights that decoding reads: `training_weights` without the masters of trits."""

    def visit(tree: Params, path: tuple[str, ...]) -> Params:
        return {
            name: visit(value, (*path, name)) if isinstance(value, dict) else value
            for name, value in tree.items()
            if not (is_ternary(config, (*path, name)) or name == "log_scale")
        }

    weights = training_weights(params, config)
    if isinstance(weights, Master):
        return weights
    return Ternary(visit(params, ()), weights.ternary)


def as_weights(weights: Params | Weights, config: ModelConfig) -> Weights:
    """Weights ready for decoding: a parameter tree or `Master` is ternarised, once."""
    if isinstance(weights, Ternary | Packed):
        return weights
    return ternarise(weights.params if isinstance(weights, Master) else weights, config)


def matrix_scales(weights: Weights) -> list[jax.Array]:
    """The scales of all ternary matrices, in the order of the parameters' names."""
    if isinstance(weights, Packed):
        parts = [part for blocks in weights.blocks for part in (blocks.glu, blocks.mixer)]
        linears = [getattr(part, name) for part in parts for name in sorted(part._fields)]
        stacks = [x for x in (*linears, weights.head) if isinstance(x, PackedLinear)]
        return [stack.scale for stack in stacks]
    leaves = jax.tree.leaves(weights.ternary) if isinstance(weights, Ternary) else []
    return [leaf for leaf in leaves if leaf.dtype == jnp.float32]
