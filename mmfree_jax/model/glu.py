"""The gated linear unit that mixes channels (arXiv 2406.02528, section 3.4)."""

import math

import flax.linen as nn
import jax

from mmfree_jax.config import ModelConfig
from mmfree_jax.model.linear import Linear, project


class GLU(nn.Module):
    """Channel mixer: gate and up in one projection of width 2m, SwiGLU, projection down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, outer_norm_scale_D: jax.Array) -> jax.Array:
        """Returns the residual stream after the update for RMSNorm(x), [B, T, D]."""
        c = self.config
        width, inner = x_BTD.shape[-1], c.glu_size
        init = nn.initializers.normal(c.initializer_range)
        gate_up = Linear(2 * inner, c.glu_linear, c.param_dtype, init, name="gate_up_proj")
        gate_up_BTM, x_BTD = project(
            x_BTD,
            [gate_up(width)],
            options=c.glu_linear,
            config=c,
            outer_norm_scale=outer_norm_scale_D,
            skip=True,
            name="gate_up",
        )
        down_init = nn.initializers.normal(c.initializer_range / math.sqrt(2 * c.num_layers))
        down = Linear(width, c.glu_linear, c.param_dtype, down_init, name="down_proj")
        (out_BTD,) = project(
            gate_up_BTM, [down(inner)], options=c.glu_linear, config=c, gated=True, name="down"
        )
        return x_BTD + out_BTD.astype(x_BTD.dtype)
