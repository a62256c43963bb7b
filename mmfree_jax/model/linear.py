"""Linear layers: parameters in a thin module, the choice of program in a function."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.errors import ConfigError
from mmfree_jax.model import quantize
from mmfree_jax.model.functional import gated_output, swiglu
from mmfree_jax.model_config import GROUP, LinearConfig, ModelConfig, WeightScale
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.parallel.sharding import constrain_batch, token_axes


@dataclass(frozen=True)
class LinearWeights:
    """What one linear layer reads.

    Attributes:
      weight: [N, K] master weight; None where there are only trits.
      norm_scale: [K] of the layer's own RMSNorm; None where it has none.
      trits: [N, K] int8 and
      scale: float32 [1, 1] or, of groups, [N, K / 128]: the weight ternarised once for the whole
        step; None where that was not done.
      options: what the layer computes.
      bias: [N], added to the outputs; None where it has none.
      log_scale: [1, 1], of a learnt scale over the mean magnitude; None where there is none.
    """

    weight: jax.Array | None
    norm_scale: jax.Array | None
    trits: jax.Array | None
    scale: jax.Array | None
    options: LinearConfig
    bias: jax.Array | None = None
    log_scale: jax.Array | None = None


class Linear(nn.Module):
    """Owns the parameters of one linear layer.

    Parameters `weight` [N, K], with `input_norm` `norm_scale` [K], with `use_bias` `bias` [N], and
    with a learnt scale `log_scale` [1, 1].
    A variable collection `ternary` may carry `trits` and `scale` (see `Ternary`).
    """

    features: int
    options: LinearConfig
    param_dtype: str
    weight_init: jax.nn.initializers.Initializer
    use_bias: bool = False
    weight_scale: WeightScale = "matrix"

    @nn.compact
    def __call__(self, in_features: int) -> LinearWeights:
        """Returns the parameters of a layer with `in_features` inputs."""
        dtype = jnp.dtype(self.param_dtype)
        trits = scale = weight = norm_scale = bias = log_scale = None
        if self.has_variable("ternary", "trits"):
            trits = self.get_variable("ternary", "trits")
            scale = self.get_variable("ternary", "scale")
        if trits is None or self.has_variable("params", "weight"):
            weight = self.param("weight", self.weight_init, (self.features, in_features), dtype)
        if self.options.input_norm:
            norm_scale = self.param("norm_scale", nn.initializers.ones, (in_features,), dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
        if weight is not None and self.weight_scale == "learned" and self.options.ternary_weights:
            log_scale = self.param("log_scale", nn.initializers.zeros, (1, 1), dtype)
        return LinearWeights(weight, norm_scale, trits, scale, self.options, bias, log_scale)


# Xavier uniform with gain 2^-2.5, as the authors initialise a mixer's projections: the variance
# is gain^2 * 2 / (fan_in + fan_out), which falls with the width as muP asks.
_PROJECTION_INIT = nn.initializers.variance_scaling(
    math.pow(2.0, -5.0), "fan_avg", "uniform", in_axis=-1, out_axis=-2
)


def projections(
    config: ModelConfig, matrices: Mapping[str, tuple[int, int]]
) -> dict[str, LinearWeights]:
    """The linear layers of a recurrent token mixer, whose module this is called in.

    Args:
      config: of the model.
      matrices: (outputs, inputs) of each by its name.

    Raises:
      ConfigError: weights in groups that share a scale, and inputs that are no whole groups.
    """
    c = config
    if c.weight_scale == "groups" and c.mixer_linear.ternary_weights:
        for name, (_, columns) in matrices.items():
            if columns % GROUP:
                raise ConfigError(
                    f"model.weight_scale is groups: {name} of the mixer has {columns} inputs, no "
                    f"multiple of {GROUP}; set --model.weight-scale matrix"
                )
    return {
        name: Linear(
            rows,
            c.mixer_linear,
            c.param_dtype,
            _PROJECTION_INIT,
            weight_scale=c.weight_scale,
            name=name,
        )(columns)
        for name, (rows, columns) in matrices.items()
    }


class NormScale(nn.Module):
    """Owns the scale of one RMSNorm."""

    param_dtype: str

    @nn.compact
    def __call__(self, features: int) -> jax.Array:
        """Returns the scale, [features]."""
        dtype = jnp.dtype(self.param_dtype)
        return self.param("scale", nn.initializers.ones, (features,), dtype)


def linears(
    config: ModelConfig,
    layers: Sequence[LinearWeights],
    x: jax.Array,
    *,
    outer_norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    skip: bool = False,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    to_gate: bool = False,
    name: str = "linear",
    strength: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Linear layers that read one input, behind an optional norm that they share.

    Args:
      config: gives the program, the dtypes and the norms' eps.
      layers: the layers' parameters; their options are the same.
      x: [..., K]; [..., 2K] where `gated`.
      outer_norm: [K], scale of an RMSNorm in front of all; None leaves it out.
      residual: [..., K] to add to x first; None: nothing.
      skip: the caller goes on with x, whose gradients are then added in one pass.
      times_silu: [..., K]; the input is RMSNorm(x) * silu(times_silu), the norm the shared one.
      gated: the input is silu(gate) * up, of the two halves of x.
      to_gate: not needed here.
      name: of the outputs, for the policies of `ModelConfig.remat`.
      strength: of the activations' quantiser, where the weights are not ternary; None: 1.

    Returns:
      x + residual, and [..., N_j] in the compute dtype for each layer.
    """
    del to_gate
    options = layers[0].options
    dtype = jnp.dtype(config.compute_dtype)
    if residual is not None:
        x = checkpoint_name(constrain_batch(x + residual.astype(x.dtype)), "mixed")
    if times_silu is not None:
        x = checkpoint_name(x, "g")
    packed = any(layer.weight is None for layer in layers)
    if options.ternary_weights and (packed or config.bitlinear == "fused"):
        ternary = [_ternary(layer, config) for layer in layers]
        outputs = bitlinear_many(
            x,
            tuple(layer.norm_scale for layer in layers) if options.input_norm else None,
            tuple(
                _handing_on(layer, scale) for layer, (_, scale) in zip(layers, ternary, strict=True)
            ),
            tuple(trits for trits, _ in ternary),
            tuple(scale for _, scale in ternary),
            eps=config.linear_norm_eps,
            outer_norm_weight=outer_norm,
            outer_eps=config.norm_eps,
            out_dtype=dtype,
            int8_activations=options.int8_activations,
            implementation=config.matmul_kernel,
            backward=config.backward if options.int8_activations else "bf16",
            token_axes=token_axes(x.shape),
            times_silu=times_silu,
            gated=gated,
            skip=skip,
            name=name,
        )
        read, outputs = (outputs[-1], outputs[:-1]) if skip else (x, outputs)
        return read, _with_biases(layers, outputs)
    given = x
    if gated:
        x = swiglu(x)
    if outer_norm is not None and times_silu is not None:
        x = gated_output(x, times_silu, outer_norm, eps=config.norm_eps)
    elif outer_norm is not None:
        x = rms_norm(x, outer_norm, eps=config.norm_eps)
    outputs = tuple(
        quantize.linear(
            x.astype(dtype),
            _master(layer),
            layer.norm_scale,
            eps=config.linear_norm_eps,
            ternary_weights=options.ternary_weights,
            int8_activations=options.int8_activations,
            strength=strength,
            weight_scale=config.weight_scale,
            log_scale=layer.log_scale,
        )
        for layer in layers
    )
    return given, checkpoint_name(_with_biases(layers, outputs), name)


def _with_biases(
    layers: Sequence[LinearWeights], outputs: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    return tuple(
        y if layer.bias is None else y + layer.bias.astype(y.dtype)
        for layer, y in zip(layers, outputs, strict=True)
    )


def _handing_on(layer: LinearWeights, scale: jax.Array) -> jax.Array | None:
    """The master weight, whose gradient goes to a learnt scale too."""
    if layer.weight is None or layer.log_scale is None:
        return layer.weight
    return quantize.hand_to_scale(layer.weight, layer.log_scale, scale)


def _ternary(layer: LinearWeights, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """The layer's trits and scale, made here unless they were made for the whole step."""
    if layer.trits is not None and layer.scale is not None:
        return layer.trits, layer.scale
    master = jax.lax.stop_gradient(_master(layer))
    return quantize.ternarise(master, config.weight_scale, layer.log_scale)


def _master(layer: LinearWeights) -> jax.Array:
    if layer.weight is None:
        raise ValueError("weight is None: without masters only ternary layers can be computed")
    return layer.weight
