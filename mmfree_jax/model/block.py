"""One block: h += mixer(norm(h)); h += glu(norm(h)); and the blocks of a pattern's period.

The modules own parameters and names; what is computed is `layer.py`'s and the mixer's.
"""

from typing import Any

import flax.linen as nn
import jax

from mmfree_jax.model import depth, remat
from mmfree_jax.model.layer import GLU
from mmfree_jax.model.linear import NormScale
from mmfree_jax.model.mixer import OfLayer
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.operations import Rows, operations
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.parallel.sharding import constrain_batch


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the stream."""

    config: ModelConfig
    mixer: str

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        of_layer: OfLayer,
        state: dict[str, Any] | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Returns the residual stream after the block, and the layer's new state.

        Args:
          x_BTD: the residual stream.
          rows: its rows.
          of_layer: what the mixer is given beside its parameters.
          state: to go on from, one layer of `State.layers`; None: start afresh, return none.
        """
        c = self.config
        width = x_BTD.shape[-1]
        mixer_scale_D = NormScale(c.param_dtype, name="mixer_norm")(width)
        mixer = mixer_of(self.mixer).module(c, name="mixer")  # type: ignore[call-arg]
        x_BTD, update_BTD, state = mixer(x_BTD, mixer_scale_D, rows, of_layer, state)
        glu_scale_D = NormScale(c.param_dtype, name="glu_norm")(width)
        ops = operations(c, rows, holds=False)  # A GLU holds nothing.
        x_BTD, update_BTD = GLU(c, name="glu")(ops, x_BTD, update_BTD, glu_scale_D)
        return constrain_batch(x_BTD + update_BTD.astype(x_BTD.dtype)), state


class Period(nn.Module):
    """The blocks of a pattern, one after another, up to where it repeats."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        of_layers: tuple[OfLayer, ...],
        states: dict[str, Any] | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """As `Block`, with what each block is given, and its state by its place's name."""
        c, block = self.config, rematted(self.config)
        after: dict[str, Any] = {}
        places = zip(depth.place_names(c), c.period, of_layers, strict=True)
        for name, mixer, of_layer in places:
            state = None if states is None else states[name]
            x_BTD, after[name] = block(c, mixer, name=name)(x_BTD, rows, of_layer, state)
        return x_BTD, None if states is None else after


def rematted(config: ModelConfig) -> type[Block]:
    """A block of which the backward pass keeps what `ModelConfig.remat` says."""
    if config.remat == "none":
        return Block
    return nn.remat(Block, prevent_cse=not config.scan_layers, policy=remat.policy(config.remat))
