"""Packed BitLinears as the kernels read them: words, scales and norms, stacked over layers."""

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linears:
    """BitLinears of one shape that read one input, each stacked over the model's layers.

    Attributes:
      words: [L, N, W] int32 of each: 2-bit weights as `words.to_words` lays them out.
      scales: [L, 1, 1] float32 of each.
      norms: [L, K] of each, the weights of its own RMSNorm.
    """

    words: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]
    norms: tuple[jax.Array, ...]
