"""The matrix products that a training step runs, and the dtype of their operands.

What a model's FLOPs leave out (`train/flops.py`) counts here: what the backward pass computes
again, and which products are of int8.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model_config import LinearConfig, ModelConfig
from mmfree_jax.train.flops import count_flops, mixing_flops

# Policies of `ModelConfig.remat` that keep the products which read the residual stream.
_KEEPS_PRODUCTS = ("none", "dots", "projections")
# And those that keep what a recurrence gives.
_KEEPS_STATES = ("states", "gated", "gates")


class Matrix(NamedTuple):
    """A weight of one layer.

    Attributes:
      mixer: of its layer.
      name: of its linear layer, as "o_proj".
      weights: outputs times inputs.
      options: what its layer computes.
    """

    mixer: str
    name: str
    weights: int
    options: LinearConfig


class Products(NamedTuple):
    """Operations a token, a multiply-add as two.

    Attributes:
      int8: of products with weights, of int8.
      wide: of products with weights, in the compute dtype.
      mixing: between tokens and element-wise, in the compute dtype or float32.
    """

    int8: float
    wide: float
    mixing: float


def block_matrices(config: ModelConfig) -> Iterator[Matrix]:
    """The matrices of all blocks."""
    width, glu = config.hidden_size, config.glu_size
    for mixer in config.layer_mixers:
        for name, (rows, columns) in mixer_of(mixer).matrices(config).items():
            yield Matrix(mixer, name, rows * columns, config.linear_of(mixer))
        yield Matrix(mixer, "gate_up_proj", 2 * glu * width, config.glu_linear)
        yield Matrix(mixer, "down_proj", width * glu, config.glu_linear)


def gathered_bytes(config: ModelConfig) -> tuple[int, int]:
    """What all weights are when they travel: those of the blocks, and the others.

    Trits are int8; float matrices are in the compute dtype, the
    embedding as it is trained. Vectors and scales are left out.
    """
    wide = jnp.dtype(config.compute_dtype).itemsize
    head = config.vocab_size * config.hidden_size

    def size(options: LinearConfig, weights: int) -> int:
        return weights if options.ternary_weights else wide * weights

    blocks = sum(size(m.options, m.weights) for m in block_matrices(config))
    embedding = jnp.dtype(config.param_dtype).itemsize * head
    return blocks, embedding + size(config.head_linear, head)


def count_products(config: ModelConfig, seq_len: int) -> Products:
    """Operations a token of a training step of the ternary form: forward, again and backward.

    What is made again of the mixing of tokens is taken whole, and attention as causal.
    """
    int8 = wide = between = 0.0

    def add(operations: float, quantised: bool) -> None:
        nonlocal int8, wide
        int8 += operations * quantised
        wide += operations * (not quantised)

    for matrix in block_matrices(config):
        work, quantised = 2.0 * matrix.weights, _in_int8(config, matrix.options)
        kernel = config.matmul_kernel not in ("xla_bf16", "xla_f32")
        add(work * (1 + _is_made_again(config.remat, matrix)), quantised and kernel)
        add(work, quantised and config.backward in ("int8_dx", "int8"))  # of the input
        add(work, quantised and config.backward == "int8")  # of the weight
    head = count_flops(config, seq_len).head
    add(head, _in_int8(config, config.head_linear))
    add(2 * head, False)
    for mixer, mixing in zip(config.layer_mixers, mixing_flops(config, seq_len), strict=True):
        kept = config.remat in ("none", "dots")
        kept |= mixer != "attention" and config.remat in _KEEPS_STATES
        between += mixing * (3 if kept else 4)
    return Products(int8, wide, between)


def _in_int8(config: ModelConfig, options: LinearConfig) -> bool:
    """Whether a layer has products of int8: the textbook program rounds, but multiplies floats."""
    both = options.ternary_weights and options.int8_activations
    return both and config.bitlinear == "fused"


def _is_made_again(remat: str, matrix: Matrix) -> bool:
    """Whether the backward pass needs what this product gave, and it was not kept (`remat.py`)."""
    if remat in _KEEPS_PRODUCTS or matrix.name == "down_proj":
        return False
    if matrix.name == "o_proj":
        return remat == "full"  # All others keep the stream behind it.
    if matrix.name == "gate_up_proj" or matrix.mixer == "attention":
        return True
    if remat == "gated":
        return not (matrix.mixer == "mlgru" and matrix.name == "g_proj")
    return remat != "gates"
