"""One block: h += mixer(norm(h)); h += glu(norm(h)).

The modules own parameters and names; what is computed is `layer.py`'s.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model import functional, layer, mup
from mmfree_jax.model.attention import Attention
from mmfree_jax.model.linear import Linear, LinearWeights, NormScale, linears
from mmfree_jax.model.weights import GLUWeights, MLGRUWeights
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.pallas_kernels.recurrence.api import mlgru_recurrence
from mmfree_jax.parallel.sharding import channel_partition, constrain_batch

# Xavier uniform with gain 2^-2.5, as the authors initialise these projections: the variance
# is gain^2 * 2 / (fan_in + fan_out), which falls with the width as muP asks.
_MIXER_INIT = nn.initializers.variance_scaling(
    math.pow(2.0, -5.0), "fan_avg", "uniform", in_axis=-1, out_axis=-2
)


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
    """Owns the token mixer: projections i, f, g in, a gated norm, projection o out.

    With `short_conv`, a causal convolution acts on the input, or on i and f.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, norm_scale_D: jax.Array, lower_bound_E: jax.Array | None
    ) -> tuple[MLGRUWeights[LinearWeights, Any], dict[str, jax.Array]]:
        """Returns the weights, and the convolutions' kernels by the names of their states."""
        c = self.config
        width, inner = norm_scale_D.shape[0], c.state_size

        def linear(name: str, features: int, columns: int) -> LinearWeights:
            return Linear(features, c.mixer_linear, c.param_dtype, _MIXER_INIT, name=name)(columns)

        convolved: dict[str, int] = {}
        if c.short_conv:
            convolved = (
                {"conv": width} if c.share_short_conv else {"i_conv": inner, "f_conv": inner}
            )
        kernels = {name: ConvKernel(c, name=name)(size) for name, size in convolved.items()}
        weights = MLGRUWeights(
            norm=norm_scale_D,
            i_proj=linear("i_proj", inner, width),
            f_proj=linear("f_proj", inner, width),
            g_proj=linear("g_proj", inner, width),
            gate_norm=NormScale(c.param_dtype, name="gate_norm")(inner),
            o_proj=linear("o_proj", width, inner),
            lower_bound=lower_bound_E,
        )
        return weights, kernels


class GLU(nn.Module):
    """Owns the channel mixer: gate and up in one projection of width 2m, projection down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, norm_scale_D: jax.Array) -> GLUWeights[LinearWeights, jax.Array]:
        """Returns the weights."""
        c = self.config
        width, inner = norm_scale_D.shape[0], c.glu_size
        deviation = c.initializer_range * mup.hidden_scale(c)
        init = nn.initializers.normal(deviation)
        down_init = nn.initializers.normal(deviation / math.sqrt(2 * c.num_layers))
        gate_up = Linear(2 * inner, c.glu_linear, c.param_dtype, init, name="gate_up_proj")
        down = Linear(width, c.glu_linear, c.param_dtype, down_init, name="down_proj")
        return GLUWeights(norm_scale_D, gate_up(width), down(inner))


class Block(nn.Module):
    """A token mixer and a channel mixer, each behind a norm and added to the stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        lower_bound_E: jax.Array | None,
        state: dict[str, Any] | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Returns the residual stream after the block, and the layer's new state.

        Args:
          x_BTD: the residual stream.
          rows: its rows.
          lower_bound_E: of an MLGRU's forget gate; None: zero.
          state: to go on from, one layer of `State.layers`; None: start at zero, return none.
        """
        c = self.config
        width = x_BTD.shape[-1]
        mixer_scale_D = NormScale(c.param_dtype, name="mixer_norm")(width)
        ops = operations(c, rows.reset_BT, rows.padding_BT, holds=state is not None)
        if c.mixer == "mlgru":
            weights, kernels = MLGRU(c, name="mixer")(mixer_scale_D, lower_bound_E)
            if kernels:
                x_BTD, update_BTD, new_state = _convolved(
                    ops, weights, kernels, x_BTD, rows, state, c
                )
            else:
                h0_BE = None if state is None else state["h"]
                x_BTD, update_BTD, h_BE = layer.mlgru(ops, weights, x_BTD, None, h0_BE)
                new_state = {"h": h_BE}
            state = None if state is None else new_state
        else:
            update_BTD, state = Attention(c, name="mixer")(
                x_BTD, mixer_scale_D, rows.positions_BT, state, rows.segment_ids_BT
            )
        glu_scale_D = NormScale(c.param_dtype, name="glu_norm")(width)
        glu_weights = GLU(c, name="glu")(glu_scale_D)
        x_BTD, update_BTD = layer.glu(ops, glu_weights, x_BTD, update_BTD)
        return constrain_batch(x_BTD + update_BTD.astype(x_BTD.dtype)), state


def operations(
    config: ModelConfig,
    reset_BT: jax.Array | None,
    padding_BT: jax.Array | None,
    *,
    holds: bool,
) -> layer.Operations:
    """A layer's operations in JAX, on `LinearWeights`.

    Args:
      config: of the model.
      reset_BT: True where the recurrent state is dropped.
      padding_BT: True where it is held.
      holds: somebody wants the state after the last step. Padding ends a row: else it need not
        be held there.
    """

    def recurrence(
        i_BTE: jax.Array, f_BTE: jax.Array, bound_E: jax.Array | None, h0_BE: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        return mlgru_recurrence(
            i_BTE,
            f_BTE,
            bound_E,
            h0_BD=h0_BE,
            reset_BT=reset_BT,
            padding_BT=padding_BT if holds else None,
            partition=channel_partition(i_BTE.shape),
            implementation=config.recurrence_kernel,
        )

    return layer.Operations(functools.partial(linears, config), recurrence)


def _convolved(
    ops: layer.Operations,
    weights: MLGRUWeights[Any, Any],
    kernels: dict[str, jax.Array],
    x_BTD: jax.Array,
    rows: Rows,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """`layer.mlgru` with short convolutions, of its input or of i and f."""
    new_state: dict[str, Any] = {}

    def convolve(name: str, x: jax.Array) -> jax.Array:
        y, new_state[name] = functional.short_convolution(
            x,
            kernels[name],
            history_BWD=None if state is None else state[name],
            reset_BT=rows.reset_BT,
            padding_BT=rows.padding_BT,
        )
        return y

    inputs = [weights.i_proj, weights.f_proj, weights.g_proj]
    if "conv" in kernels:
        u_BTD = rms_norm(x_BTD, weights.norm, eps=config.norm_eps)
        u_BTD = convolve("conv", u_BTD.astype(jnp.dtype(config.compute_dtype)))
        _, (i_BTE, f_BTE, g_BTE) = ops.linears(inputs, u_BTD, name="i_f_g")
    else:
        x_BTD, (i_BTE, f_BTE, g_BTE) = ops.linears(
            inputs, x_BTD, outer_norm=weights.norm, skip=True, name="i_f_g"
        )
        i_BTE, f_BTE = convolve("i_conv", i_BTE), convolve("f_conv", f_BTE)
    h0_BE = None if state is None else state["h"]
    update_BTD, new_state["h"] = layer.mix(ops, weights, i_BTE, f_BTE, g_BTE, h0_BE)
    return x_BTD, update_BTD, new_state
