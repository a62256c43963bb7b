"""The language-model loss, without ever holding all logits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmfree_jax.model import LanguageModel, Master, Ternary
from mmfree_jax.model.quantize import (
    fake_quantize_int8,
    fake_ternarize,
    hand_to_scale,
    ternarise,
)
from mmfree_jax.model.weights import Blended
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.cross_entropy.api import (
    CrossEntropy,
    linear_cross_entropy_sum,
    ternary_linear_cross_entropy_sum,
)
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.parallel.sharding import flat_token_axes, flatten_tokens, unflatten_tokens

Batch = dict[str, jax.Array]


class LossSums(NamedTuple):
    """Sums over the predicted tokens of a batch; divide by `tokens` for means.

    Attributes:
      loss: negative log-likelihood (nats), float32.
      z_loss: squared log-partition, unweighted, float32.
      correct: tokens predicted right, float32.
      tokens: tokens predicted, float32.
    """

    loss: jax.Array
    z_loss: jax.Array
    correct: jax.Array
    tokens: jax.Array


class TokenLosses(NamedTuple):
    """What a model makes of each token of a batch.

    Attributes:
      loss_BT: negative log-likelihood (nats), float32; 0 where nothing is predicted.
      correct_BT: whether it was predicted right, bool.
      counted_BT: whether it is predicted at all, bool.
    """

    loss_BT: jax.Array
    correct_BT: jax.Array
    counted_BT: jax.Array


def head_cross_entropy(
    x_ND: jax.Array,
    targets_N: jax.Array,
    weights: Master | Blended | Ternary,
    config: ModelConfig,
    *,
    z_loss: float,
    chunk: int,
) -> tuple[jax.Array, CrossEntropy]:
    """Final norm, head and summed cross-entropy on the residual stream, chunk by chunk.

    Args:
      x_ND: residual stream after the last block.
      targets_N: int32; below zero is not counted.
      weights: of the model.
      config: of the model.
      z_loss: weight of the squared log-partition in each token's loss.
      chunk: tokens whose logits are held at once on each device.

    Returns:
      The sum of the losses, which alone is differentiable, and each token's.
    """
    options, head = config.head_linear, weights.params["head"]
    x_ND = rms_norm(x_ND, weights.params["final_norm"]["scale"], eps=config.norm_eps)
    if options.input_norm:
        x_ND = rms_norm(x_ND, head["norm_scale"], eps=config.linear_norm_eps)
    dtype = jnp.dtype(config.compute_dtype)
    weight_VD, log_scale = head["weight"], head.get("log_scale")
    if config.bitlinear == "fused" and options.ternary_weights and options.int8_activations:
        if isinstance(weights, Ternary):
            trits_VD, scale = weights.ternary["head"]["trits"], weights.ternary["head"]["scale"]
        else:
            master_VD = jax.lax.stop_gradient(weight_VD)
            trits_VD, scale = ternarise(master_VD, config.weight_scale, log_scale)
        if log_scale is not None:
            weight_VD = hand_to_scale(weight_VD, log_scale, scale)
        return ternary_linear_cross_entropy_sum(
            x_ND.astype(dtype),
            weight_VD,
            trits_VD,
            scale,
            targets_N,
            z_loss=z_loss,
            chunk_size=chunk,
            token_axes=flat_token_axes(targets_N.shape),
        )
    if options.int8_activations:
        x_ND = fake_quantize_int8(x_ND, weights.strength if isinstance(weights, Blended) else None)
    if options.ternary_weights:
        weight_VD = fake_ternarize(weight_VD, config.weight_scale, log_scale)
    return linear_cross_entropy_sum(
        x_ND.astype(dtype),
        weight_VD.astype(dtype),
        targets_N,
        z_loss=z_loss,
        chunk_size=chunk,
        token_axes=flat_token_axes(targets_N.shape),
    )


def loss_sums(
    weights: Master | Blended | Ternary,
    batch: Batch,
    *,
    model: LanguageModel,
    z_loss: float = 0.0,
    chunk: int = 2048,
) -> tuple[jax.Array, LossSums]:
    """Sums of the loss over a batch.

    Args:
      weights: of the model (`weights_of_form`).
      batch: "tokens", "targets", "segment_ids", int32 [B, T] each.
      model: the model.
      z_loss: weight of the squared log-partition in the objective.
      chunk: tokens whose logits are held at once.

    Returns:
      The objective's sum, whose gradient is wanted, and its parts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax.model import training_weights
      >>> from mmfree_jax.train import loss_sums
      >>> targets, one_document = jnp.array([[2, 3, -1]]), jnp.ones_like(tokens)
      >>> batch = {"tokens": tokens, "targets": targets, "segment_ids": one_document}
      >>> weights = training_weights(params, config)
      >>> loss = jax.jit(lambda weights: loss_sums(weights, batch, model=model))
      >>> objective, sums = loss(weights)
      >>> int(sums.tokens)  # -1 is not counted
      2
    """
    x_BTD, _ = model.apply(weights, batch["tokens"], batch["segment_ids"], method="hidden")
    targets_N = flatten_tokens(batch["targets"])
    objective, result = head_cross_entropy(
        flatten_tokens(x_BTD),
        targets_N,
        weights,
        model.config,
        z_loss=z_loss,
        chunk=chunk,
    )
    counted_N = (targets_N >= 0).astype(jnp.float32)
    z_sum = jnp.sum(counted_N * jnp.square(result.lse_N))
    sums = LossSums(
        loss=jax.lax.stop_gradient(objective) - z_loss * z_sum,
        z_loss=z_sum,
        correct=jnp.sum(result.correct_N.astype(jnp.float32)),
        tokens=jnp.sum(counted_N),
    )
    return objective, sums


def token_losses(
    weights: Master | Ternary, batch: Batch, *, model: LanguageModel, chunk: int = 2048
) -> TokenLosses:
    """The loss of each token of a batch, for sums that are made elsewhere.

    Args: as `loss_sums`.
    """
    targets_BT = batch["targets"]
    x_BTD, _ = model.apply(weights, batch["tokens"], batch["segment_ids"], method="hidden")
    _, result = head_cross_entropy(
        flatten_tokens(x_BTD),
        flatten_tokens(targets_BT),
        weights,
        model.config,
        z_loss=0.0,
        chunk=chunk,
    )
    B, T = targets_BT.shape
    return TokenLosses(
        loss_BT=unflatten_tokens(result.loss_N, (B, T)),
        correct_BT=unflatten_tokens(result.correct_N, (B, T)),
        counted_BT=targets_BT >= 0,
    )
