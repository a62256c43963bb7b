"""The MatMul-free gated linear recurrent unit (arXiv 2406.02528, section 3.3)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import ModelConfig
from mmfree_jax.model import functional
from mmfree_jax.model.linear import Linear, NormScale, project
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.pallas_kernels.recurrence.api import mlgru_recurrence
from mmfree_jax.parallel.sharding import channel_partition

# Xavier uniform with gain 2^-2.5, as the authors initialise these projections: the variance
# is gain^2 * 2 / (fan_in + fan_out).
_INIT = nn.initializers.variance_scaling(
    math.pow(2.0, -5.0), "fan_avg", "uniform", in_axis=-1, out_axis=-2
)


class ConvKernel(nn.Module):
    """Owns the kernel of one short convolution."""

    config: ModelConfig

    @nn.compact
    def __call__(self, channels: int) -> jax.Array:
        """Returns the kernel, [channels, W]."""
        length = self.config.short_conv
        # Uniform within 1 / sqrt(length), PyTorch's default for such a convolution.
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
        return self.param("kernel", init, (channels, length), jnp.dtype(self.config.param_dtype))


class MLGRU(nn.Module):
    """Token mixer: projections i, f, g in, the recurrence, a gated norm, projection o out.

    With `short_conv`, a causal convolution acts on the input, or on i and f.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        outer_norm_scale_D: jax.Array,
        lower_bound_D: jax.Array | None,
        state: dict[str, Any] | None,
        reset_BT: jax.Array | None,
        padding_BT: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Mixes RMSNorm(x).

        Args:
          x_BTD: the residual stream.
          outer_norm_scale_D: the block's norm.
          lower_bound_D: of the forget gate; None: zero.
          state: {"h": [B, E] float32} to go on from, and with convolutions {"conv"} or
            {"i_conv", "f_conv": [B, W - 1, channels]}; None: start at zero, return no state.
          reset_BT: True where the state is dropped.
          padding_BT: True where the state is held.

        Returns:
          The residual stream after the update, [B, T, D], and the new state.
        """
        c = self.config
        width, inner = x_BTD.shape[-1], c.state_size
        new_state: dict[str, Any] = {}

        def linear(name: str, features: int) -> Linear:
            return Linear(features, c.mixer_linear, c.param_dtype, _INIT, name=name)

        def convolve(name: str, x: jax.Array) -> jax.Array:
            y, new_state[name] = functional.short_convolution(
                x,
                ConvKernel(c, name=name)(x.shape[-1]),
                history_BWD=None if state is None else state[name],
                reset_BT=reset_BT,
                padding_BT=padding_BT,
            )
            return y

        input_BTD = x_BTD
        if c.short_conv and c.share_short_conv:
            input_BTD = rms_norm(x_BTD, outer_norm_scale_D, eps=c.norm_eps)
            input_BTD = convolve("conv", input_BTD.astype(jnp.dtype(c.compute_dtype)))
        i_BTD, f_BTD, g_BTD, *skipped = project(
            input_BTD,
            [linear(name, inner)(width) for name in ("i_proj", "f_proj", "g_proj")],
            options=c.mixer_linear,
            config=c,
            outer_norm_scale=None if new_state else outer_norm_scale_D,
            skip=not new_state,
            name="i_f_g",
        )
        x_BTD = skipped[0] if skipped else x_BTD
        g_BTD = checkpoint_name(g_BTD, "g")
        if c.short_conv and not c.share_short_conv:
            i_BTD, f_BTD = convolve("i_conv", i_BTD), convolve("f_conv", f_BTD)
        h_BTD, new_state["h"] = mlgru_recurrence(
            i_BTD,
            f_BTD,
            lower_bound_D,
            h0_BD=None if state is None else state["h"],
            reset_BT=reset_BT,
            # Padding ends a row: whoever asks for no state afterwards need not hold it there.
            padding_BT=None if state is None else padding_BT,
            partition=channel_partition(i_BTD.shape),
            implementation=c.recurrence_kernel,
        )
        gate_scale_D = NormScale(c.param_dtype, name="gate_norm")(inner)
        (out_BTD,) = project(
            g_BTD,
            [linear("o_proj", width)(inner)],
            options=c.mixer_linear,
            config=c,
            outer_norm_scale=gate_scale_D,
            times_silu=h_BTD,
            name="o",
        )
        return x_BTD + out_BTD.astype(x_BTD.dtype), None if state is None else new_state
