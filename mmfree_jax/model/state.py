"""What a model carries from token to token."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from mmfree_jax.model import depth
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
        compute dtype}, S places, and {"start": [L, B] int32}, the place where the row's document
        begins. A pattern has such a tree for each place of its period
        (`depth.py`). Within a loop on `Unstacked` weights a tuple of such trees, one a layer,
        without that axis.
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
      max_length: with attention only: most tokens, prompt included, that a row can hold.

    Raises:
      ValueError: attention without a max_length.

    Example:
      >>> from mmfree_jax import ModelConfig
      >>> from mmfree_jax.model import init_state
      >>> init_state(ModelConfig(hidden_size=64, num_layers=2), batch_size=3).layers["h"].shape
      (2, 3, 64)
    """
    rows = (config.num_layers // len(config.period), batch_size)
    places = [mixer_of(mixer).state(config, rows, max_length) for mixer in config.period]
    return State(jnp.zeros((batch_size,), jnp.int32), depth.join(places, config))


def state_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes carried for a row: those of a constant size, and what each token adds to caches."""

    def size(places: int) -> int:
        layers = jax.eval_shape(lambda: init_state(config, 1, places)).layers
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))

    a_token = size(2) - size(1)
    return size(1) - a_token, a_token


def cache_places(layers: dict[str, Any], config: ModelConfig) -> int | None:
    """S, the places of the caches in `State.layers`; None where no layer attends."""
    for mixer, place in zip(config.period, depth.split(layers, config), strict=True):
        if mixer == "attention":
            return place["k"].shape[2]
    return None


def with_places(layers: dict[str, Any], config: ModelConfig, places: int) -> dict[str, Any]:
    """`State.layers` with caches of `places` places: what is beyond is cut off, what lacks is 0."""

    def resize(cache: Any) -> Any:
        pad = jnp.pad if isinstance(cache, jax.Array) else np.pad
        extra = max(0, places - cache.shape[2])
        return pad(cache[:, :, :places], ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0)))

    resized = []
    for mixer, place in zip(config.period, depth.split(layers, config), strict=True):
        caches = ("k", "v") if mixer == "attention" else ()
        resized.append(place | {name: resize(place[name]) for name in caches})
    return depth.join(resized, config)
