"""The MLGRU, the token mixer of the MatMul-free models (arXiv 2406.02528, section 3.3)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model import functional, layer
from mmfree_jax.model.linear import NormScale, projections
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer, PackedForm
from mmfree_jax.model.operations import Rows, operations
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm


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
        self,
        x_BTD: jax.Array,
        norm_scale_D: jax.Array,
        rows: Rows,
        of_layer: OfLayer,
        state: dict[str, Any] | None,
    ) -> tuple[jax.Array, jax.Array, dict[str, Any] | None]:
        """As `Mixer.module` says."""
        c = self.config
        kernels = {
            name: ConvKernel(c, name=name)(size) for name, size in _convolved_channels(c).items()
        }
        weights = _own_weights(c, norm_scale_D, of_layer)
        ops = operations(c, rows, holds=state is not None)
        if kernels:
            x_BTD, update_BTD, new_state = _convolved(ops, weights, kernels, x_BTD, rows, state, c)
        else:
            x_BTD, update_BTD, new_state = layer.mlgru_from_state(
                ops, weights, x_BTD, None, state, c
            )
        return x_BTD, update_BTD, None if state is None else new_state


def _own_weights(
    config: ModelConfig, norm_scale_D: jax.Array, of_layer: OfLayer
) -> layer.MLGRUWeights[Any, Any]:
    """What the module that this is called in owns, as a layer reads it."""
    linears = projections(config, _matrices(config))
    gate_norm_E = None
    if config.output_gate == "authors":
        gate_norm_E = NormScale(config.param_dtype, name="gate_norm")(config.state_size)
    return layer.MLGRUWeights(
        norm=norm_scale_D,
        i_proj=linears["i_proj"],
        f_proj=linears["f_proj"],
        g_proj=linears.get("g_proj"),
        gate_norm=gate_norm_E,
        o_proj=linears["o_proj"],
        lower_bound=of_layer.lower_bound_E,
    )


def _convolved(
    ops: layer.Operations,
    weights: layer.MLGRUWeights[Any, Any],
    kernels: dict[str, jax.Array],
    x_BTD: jax.Array,
    rows: Rows,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """`layer.mlgru_from_state` with short convolutions, of its input or of i and f."""
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

    inputs = layer.mlgru_inputs(weights)
    if "conv" in kernels:
        u_BTD = rms_norm(x_BTD, weights.norm, eps=config.norm_eps)
        u_BTD = convolve("conv", u_BTD.astype(jnp.dtype(config.compute_dtype)))
        _, outputs = ops.linears(inputs, u_BTD, name="i_f_g")
    else:
        x_BTD, (i_BTE, f_BTE, *rest) = ops.linears(
            inputs, x_BTD, outer_norm=weights.norm, skip=True, name="i_f_g"
        )
        outputs = [convolve("i_conv", i_BTE), convolve("f_conv", f_BTE), *rest]
    h0_BE = None if state is None else state["h"]
    update_BTD, new_state["h"] = layer.after_projections(
        ops, weights, outputs, h0_BE, config.output_gate
    )
    return x_BTD, update_BTD, new_state


def _convolved_channels(config: ModelConfig) -> dict[str, int]:
    """Channels of each short convolution, by its name."""
    if not config.short_conv:
        return {}
    if config.share_short_conv:
        return {"conv": config.hidden_size}
    return {"i_conv": config.state_size, "f_conv": config.state_size}


def _state(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """{"h": [L, B, E] float32}, and of each convolution the last inputs [L, B, W - 1, channels]."""
    del max_length
    state = {"h": jnp.zeros((*rows, config.state_size), jnp.float32)}
    for name, width in _convolved_channels(config).items():
        state[name] = jnp.zeros((*rows, config.short_conv - 1, width), jnp.float32)
    return state


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    inner, width = config.state_size, config.hidden_size
    names = ("i_proj", "f_proj") if config.output_gate == "none" else ("i_proj", "f_proj", "g_proj")
    inputs = dict.fromkeys(names, (inner, width))
    return inputs | {"o_proj": (width, inner)}


def _convolution_weights(config: ModelConfig) -> int:
    return config.short_conv * sum(_convolved_channels(config).values())


def _vectors(config: ModelConfig) -> int:
    """Of the convolutions and the lower bound."""
    bounds = config.hidden_size if config.use_lower_bound else 0
    return _convolution_weights(config) + bounds


def elementwise_flops(config: ModelConfig, *, bounded: bool) -> int:
    """Operations of the MLGRU per channel and token, an elementary function counting one.

    sigmoid(f) 1, lower bound 2, candidate (silu 2), 1 - f 1, their product 1, recurrence 2, and
    the output gate (the authors': silu(h) 2, gate 1).
    """
    candidate = {"silu": 2, "tanh": 1, "linear": 0}[config.candidate]
    gate = {"authors": 3, "text": 2, "figure": 2, "none": 0}[config.output_gate]
    return 5 + candidate + gate + (2 if bounded else 0)


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    del seq_len
    bounded = config.use_lower_bound and bounded_before > 0  # The first has no lower bound.
    elementwise = config.state_size * elementwise_flops(config, bounded=bounded)
    return float(elementwise + 2 * _convolution_weights(config))


def _kept(config: ModelConfig) -> Kept:
    """In float32 f, x and h; in the compute dtype the gate's norm."""
    inner, width = config.state_size, config.hidden_size
    gates = len(_matrices(config)) - 1  # i, f and g, where there is one
    return Kept(
        states=inner,
        gated=(gates - 1) * inner,
        gates=(gates + 1) * inner,
        inputs=width + inner,
        float32=3 * inner,
        compute=inner,
    )


MIXER = Mixer(
    module=MLGRU,
    state=_state,
    matrices=_matrices,
    norms=lambda config: config.state_size if config.output_gate == "authors" else 0,
    vectors=_vectors,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(
        layer.MLGRUWeights,
        layer.mlgru_from_state,
        {"norm": "mixer_norm/scale", "gate_norm": "mixer/gate_norm/scale"},
    ),
)
