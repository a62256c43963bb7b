"""Causal multi-head attention with rotary positions: the Transformer++ token mixer."""

import math
from typing import Any, Generic, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model import functional, mup, quantize, rope
from mmfree_jax.model.layer import LinearT, Operations, Steps, VectorT
from mmfree_jax.model.linear import Linear, NormScale
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer, PackedForm
from mmfree_jax.model.operations import Rows, run_mixer
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm


class AttentionWeights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      q_proj, k_proj, v_proj, o_proj: linear layers.
      q_norm, k_norm: scales of the RMSNorms over heads, [K]; None without `qk_norm`.
    """

    norm: VectorT
    q_proj: LinearT
    k_proj: LinearT
    v_proj: LinearT
    o_proj: LinearT
    q_norm: VectorT | None
    k_norm: VectorT | None


class Attention(nn.Module):
    """Token mixer: projections q, k, v in, attention within each document, o out.

    Shapes: H heads of queries, G of keys and values, K channels a head.
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
        """As `Mixer.module` says.

        The state is {"k", "v": [B, S, G, K]}, the cache to read and extend, and {"start": [B]
        int32}, the place where the row's document begins. Without one it attends within x, and
        within its documents.
        """
        del of_layer
        c = self.config
        matrices, linear = _matrices(c), c.linear_of("attention")
        deviation = c.initializer_range * mup.hidden_scale(c)
        deviations = dict.fromkeys(matrices, deviation) | {
            "q_proj": deviation * mup.query_scale(c),
            "o_proj": deviation / math.sqrt(2 * c.num_layers),
        }
        biased = {"none": (), "qkv": ("q_proj", "k_proj", "v_proj"), "qkvo": tuple(matrices)}
        projections = {
            name: Linear(
                outputs,
                linear,
                c.param_dtype,
                nn.initializers.normal(deviations[name]),
                name in biased[c.attention_bias],
                weight_scale=c.weight_scale,
                name=name,
            )(inputs)
            for name, (outputs, inputs) in matrices.items()
        }
        norms = {
            name: NormScale(c.param_dtype, name=name)(c.head_channels) if c.qk_norm else None
            for name in ("q_norm", "k_norm")
        }
        weights = AttentionWeights(norm=norm_scale_D, **projections, **norms)
        return run_mixer(_mix, weights, x_BTD, rows, state, c)


def _mix(
    ops: Operations,
    weights: AttentionWeights[Any, Any],
    x_BTD: jax.Array,
    update_BTD: jax.Array | None,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it attends within x, and gives none."""
    c, steps = config, ops.steps
    assert steps is not None
    x_BTD, (q_BTE, k_BTF, v_BTF) = ops.linears(
        [weights.q_proj, weights.k_proj, weights.v_proj],
        x_BTD,
        residual=update_BTD,
        outer_norm=weights.norm,
        name="q_k_v",
    )
    B, T, _ = x_BTD.shape
    q_BTHK, k_BTGK, v_BTGK = (y.reshape(B, T, -1, c.head_channels) for y in (q_BTE, k_BTF, v_BTF))
    if c.qk_norm:
        q_norm_K, k_norm_K = ops.vector(weights.q_norm), ops.vector(weights.k_norm)
        q_BTHK = rms_norm(q_BTHK, q_norm_K, eps=c.norm_eps).astype(q_BTHK.dtype)
        k_BTGK = rms_norm(k_BTGK, k_norm_K, eps=c.norm_eps).astype(k_BTGK.dtype)
    frequency_F = rope.frequencies(c.head_channels, theta=c.rope_theta, scaling=c.rope_scaling)
    fresh = steps.positions_BT is None
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None] if fresh else steps.positions_BT
    q_BTHK = rope.rotate(q_BTHK, positions_BT, frequency_F)
    k_BTGK = rope.rotate(k_BTGK, positions_BT, frequency_F)
    if c.ternary_qk:
        q_BTHK, k_BTGK = (_ternary_heads(x, steps.strength) for x in (q_BTHK, k_BTGK))
    new_state: dict[str, Any] = {}
    if state is None or fresh:
        out_BTHK = functional.causal_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            None if fresh else steps.segment_ids_BT,  # Nothing before padding looks at it.
            partition=steps.partition((B, T, c.kv_heads)),
            implementation=c.attention_kernel,
        )
        if state is not None:
            new_state = state | {
                name: functional.begin_cache(state[name], x_BTGK)
                for name, x_BTGK in (("k", k_BTGK), ("v", v_BTGK))
            }
    else:
        start_BT, new_state["start"] = _document_starts(steps, state["start"])
        out_BTHK, new_state["k"], new_state["v"] = functional.cached_attention(
            q_BTHK,
            k_BTGK,
            v_BTGK,
            state["k"],
            state["v"],
            steps.positions_BT,
            start_BT,
            implementation=c.attention_kernel,
        )
    _, (out_BTD,) = ops.linears([weights.o_proj], out_BTHK.reshape(B, T, c.query_size))
    return x_BTD, out_BTD, new_state


def _document_starts(steps: Steps, start_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The place at which each token's document begins, and that of each row's last token.

    Args:
      steps: of the tokens.
      start_B: int32, of the document that the row is in before them.
    """
    if steps.reset_BT is None:
        return jnp.broadcast_to(start_B[:, None], steps.positions_BT.shape), start_B
    begun_BT = jnp.where(steps.reset_BT, steps.positions_BT, start_B[:, None])
    start_BT = jax.lax.cummax(begun_BT, axis=1)
    return start_BT, start_BT[:, -1]  # None begins in the padding behind.


def _ternary_heads(x_BTHK: jax.Array, strength: jax.Array | None) -> jax.Array:
    """Each token's heads rounded to {-s, 0, s}, s of the head alone; gradient straight through."""
    return quantize.fake_ternarize(x_BTHK[..., None, :], strength=strength)[..., 0, :]


def _state(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """{"k", "v": [L, B, S, G, K] in the compute dtype}, S = max_length places, {"start": [L, B]}.

    Raises:
      ValueError: max_length is None.
    """
    if max_length is None:
        raise ValueError("max_length is None: attention needs room for its keys and values")
    shape = (*rows, max_length, config.kv_heads, config.head_channels)
    dtype = jnp.dtype(config.compute_dtype)
    start_LB = jnp.zeros(rows, jnp.int32)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype), "start": start_LB}


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    width, queries, keys = config.hidden_size, config.query_size, config.key_size
    return {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
    }


def _biases(config: ModelConfig) -> int:
    """Biases of one layer's projections."""
    if config.attention_bias == "none":
        return 0
    of_output = config.hidden_size if config.attention_bias == "qkvo" else 0
    return config.query_size + 2 * config.key_size + of_output


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    """Causal: the token at position t (from 1) attends to t keys, on average (seq_len + 1) / 2,
    at 2 operations a channel of all heads each for the score and for the sum."""
    del bounded_before
    return 4 * config.query_size * (seq_len + 1) / 2


def _kept(config: ModelConfig) -> Kept:
    """Attention's output; its scores are never kept, and "gates" none of its projections."""
    queries = config.query_size
    return Kept(
        states=0,
        gated=0,
        gates=0,
        inputs=config.hidden_size + queries,
        float32=0,
        compute=queries,
    )


MIXER = Mixer(
    module=Attention,
    state=_state,
    matrices=_matrices,
    norms=lambda config: 2 * config.head_channels if config.qk_norm else 0,
    vectors=_biases,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(
        AttentionWeights,
        _mix,
        {
            "norm": "mixer_norm/scale",
            "q_norm": "mixer/q_norm/scale",
            "k_norm": "mixer/k_norm/scale",
        },
    ),
)
