"""One block: h += mixer(norm(h)); h += glu(norm(h))."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import ModelConfig
from mmfree_jax.model.attention import Attention
from mmfree_jax.model.glu import GLU
from mmfree_jax.model.linear import NormScale
from mmfree_jax.model.mlgru import MLGRU
from mmfree_jax.parallel.sharding import constrain_batch


class Rows(NamedTuple):
    """What every block is told about its rows.

    Attributes:
      positions_BT: int32, for rotary positions.
      segment_ids_BT: int32 documents, 0 for padding; None: one document a row.
      reset_BT: True where the recurrent state is dropped.
      padding_BT: True where the recurrent state is held.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    reset_BT: jax.Array | None
    padding_BT: jax.Array | None


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        lower_bound_D: jax.Array | None,
        state: dict[str, Any] | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Returns the residual stream after the block, and the layer's new state."""
        c = self.config
        width = x_BTD.shape[-1]
        mixer_scale_D = NormScale(c.param_dtype, name="mixer_norm")(width)
        if c.mixer == "mlgru":
            x_BTD, state = MLGRU(c, name="mixer")(
                x_BTD, mixer_scale_D, lower_bound_D, state, rows.reset_BT, rows.padding_BT
            )
        else:
            mixed_BTD, state = Attention(c, name="mixer")(
                x_BTD, mixer_scale_D, rows.positions_BT, state, rows.segment_ids_BT
            )
            x_BTD = x_BTD + mixed_BTD.astype(x_BTD.dtype)
        x_BTD = checkpoint_name(constrain_batch(x_BTD), "mixed")
        glu_scale_D = NormScale(c.param_dtype, name="glu_norm")(width)
        x_BTD = GLU(c, name="glu")(x_BTD, glu_scale_D)
        return constrain_batch(x_BTD), state
