"""Linear layers: parameters in a thin module, the choice of program in a function."""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.config import LinearConfig, ModelConfig
from mmfree_jax.model import quantize
from mmfree_jax.model.functional import gated_output, swiglu
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
from mmfree_jax.parallel.sharding import token_axes


class LinearWeights(NamedTuple):
    """What one linear layer reads.

    Attributes:
      weight: [N, K] master weight; None in a packed model, which has only the trits.
      norm_scale: [K] of the layer's own RMSNorm; None where it has none.
      trits: [N, K] int8 and
      scale: [1, 1] float32, the weight ternarised once for the whole step; None where that
        was not done.
    """

    weight: jax.Array | None
    norm_scale: jax.Array | None
    trits: jax.Array | None
    scale: jax.Array | None


class Linear(nn.Module):
    """Owns the parameters of one linear layer without bias.

    Parameters `weight` [N, K] and, with `input_norm`, `norm_scale` [K]. A variable
    collection `ternary` may carry `trits` and `scale` (see `model/ternary.py`).
    """

    features: int
    options: LinearConfig
    param_dtype: str
    weight_init: jax.nn.initializers.Initializer

    @nn.compact
    def __call__(self, in_features: int) -> LinearWeights:
        """Returns the parameters of a layer with `in_features` inputs."""
        dtype = jnp.dtype(self.param_dtype)
        trits = scale = weight = norm_scale = None
        if self.has_variable("ternary", "trits"):
            trits = self.get_variable("ternary", "trits")
            scale = self.get_variable("ternary", "scale")
        if trits is None or self.has_variable("params", "weight"):
            weight = self.param("weight", self.weight_init, (self.features, in_features), dtype)
        if self.options.input_norm:
            norm_scale = self.param("norm_scale", nn.initializers.ones, (in_features,), dtype)
        return LinearWeights(weight, norm_scale, trits, scale)


class NormScale(nn.Module):
    """Owns the scale of one RMSNorm."""

    param_dtype: str

    @nn.compact
    def __call__(self, features: int) -> jax.Array:
        """Returns the scale, [features]."""
        dtype = jnp.dtype(self.param_dtype)
        return self.param("scale", nn.initializers.ones, (features,), dtype)


def project(
    x: jax.Array,
    layers: Sequence[LinearWeights],
    *,
    options: LinearConfig,
    config: ModelConfig,
    outer_norm_scale: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    skip: bool = False,
    name: str = "linear",
) -> tuple[jax.Array, ...]:
    """Linear layers that read one input, behind an optional norm that they share.

    Args:
      x: [..., K]; [..., 2K] where `gated`.
      layers: the layers' parameters.
      options: what each computes.
      config: gives the program, the dtypes and the norms' eps.
      outer_norm_scale: [K], an RMSNorm in front of all; None leaves it out.
      times_silu: [..., K]; the input is RMSNorm(x) * silu(times_silu), the norm the shared one.
      gated: the input is silu(gate) * up, of the two halves of x.
      skip: return x too, for the residual connection around the layers; its gradients are
        then added in one pass.
      name: of the outputs, for the policies of `ModelConfig.remat`.

    Returns:
      [..., N_j] in the compute dtype for each layer; with `skip`, x after them.
    """
    dtype = jnp.dtype(config.compute_dtype)
    packed = any(layer.weight is None for layer in layers)
    if options.ternary_weights and (packed or config.bitlinear == "fused"):
        ternary = [_ternary(layer) for layer in layers]
        return bitlinear_many(
            x,
            tuple(layer.norm_scale for layer in layers) if options.input_norm else None,
            tuple(layer.weight for layer in layers),
            tuple(trits for trits, _ in ternary),
            tuple(scale for _, scale in ternary),
            eps=config.linear_norm_eps,
            outer_norm_weight=outer_norm_scale,
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
    given = x
    if gated:
        x = swiglu(x)
    if outer_norm_scale is not None and times_silu is not None:
        x = gated_output(x, times_silu, outer_norm_scale, eps=config.norm_eps)
    elif outer_norm_scale is not None:
        x = rms_norm(x, outer_norm_scale, eps=config.norm_eps)
    outputs = tuple(
        quantize.linear(
            x.astype(dtype),
            _master(layer),
            layer.norm_scale,
            eps=config.linear_norm_eps,
            ternary_weights=options.ternary_weights,
            int8_activations=options.int8_activations,
        )
        for layer in layers
    )
    outputs = checkpoint_name(outputs, name)
    return (*outputs, given) if skip else outputs


def _ternary(layer: LinearWeights) -> tuple[jax.Array, jax.Array]:
    """The layer's trits and scale, made here unless they were made for the whole step."""
    if layer.trits is not None and layer.scale is not None:
        return layer.trits, layer.scale
    return ternarize(_master(layer))


def _master(layer: LinearWeights) -> jax.Array:
    if layer.weight is None:
        raise ValueError("weight is None: a packed model computes with ternary weights only")
    return layer.weight
