"""What a model carries from token to token."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model_config import ModelConfig


@flax.struct.dataclass
class State:
    """The carried state of a batch of rows.

    Attributes:
      position_B: int32, tokens consumed so far in each row.
      layers: pytree with a leading layer axis. MLGRU: {"h": [L, B, E] float32}, of constant
        size, and with short convolutions the last inputs of each, {"conv"} or {"i_conv",
        "f_conv": [L, B, W - 1, channels] float32}. Attention: {"k", "v": [L, B, S, G, K] in the
        compute dtype}, S places. Within a loop on `Unstacked` weights a tuple of such trees, one a
        layer, without that axis.
    """

    position_B: jax.Array
    layers: Any


@flax.struct.dataclass
class Session:
    """All that is needed to go on generating; of constant size for MLGRU.

    Attributes:
      state: of the model, after every token of the prompt and of the answer so far.
      logits_BV: float32, of the token that comes next.
      seen_BV: bool, tokens that have occurred, for the repetition penalty.
    """

    state: State
    logits_BV: jax.Array
    seen_BV: jax.Array


def init_state(config: ModelConfig, batch_size: int, max_length: int | None = None) -> State:
    """The state before the first token.

    Args:
      config: of the model.
      batch_size: rows.
      max_length: attention only: most tokens, prompt included, that a row can hold.

    Raises:
      ValueError: attention without a max_length.
    """
    rows = (config.num_layers, batch_size)
    layers = mixer_of(config).state(config, rows, max_length)
    return State(jnp.zeros((batch_size,), jnp.int32), layers)
