"""Causal multi-head attention with rotary positions: the Transformer++ token mixer."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model import functional, mup, quantize, rope
from mmfree_jax.model.linear import Linear, NormScale, linears
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer
from mmfree_jax.model.operations import Rows
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.parallel.sharding import channel_partition


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

        The state is {"k", "v": [B, S, G, K]}, the cache to read and extend. Without one it
        attends within x, and within its documents.
        """
        del of_layer
        c = self.config
        B, T, D = x_BTD.shape
        kv_heads, channels = c.kv_heads, c.head_channels
        options = c.linear_of("attention")
        deviation = c.initializer_range * mup.hidden_scale(c)
        scales = {"q_proj": mup.query_scale(c)}
        widths = {"q_proj": c.query_size, "k_proj": c.key_size, "v_proj": c.key_size}
        projections = [
            Linear(
                width,
                options,
                c.param_dtype,
                nn.initializers.normal(deviation * scales.get(name, 1.0)),
                c.attention_bias != "none",
                name=name,
            )(D)
            for name, width in widths.items()
        ]
        _, (q_BTHK, k_BTGK, v_BTGK) = linears(
            c, projections, x_BTD, outer_norm=norm_scale_D, name="q_k_v"
        )
        q_BTHK, k_BTGK, v_BTGK = (y.reshape(B, T, -1, channels) for y in (q_BTHK, k_BTGK, v_BTGK))
        if c.qk_norm:
            q_norm_K = NormScale(c.param_dtype, name="q_norm")(channels)
            k_norm_K = NormScale(c.param_dtype, name="k_norm")(channels)
            q_BTHK = rms_norm(q_BTHK, q_norm_K, eps=c.norm_eps).astype(q_BTHK.dtype)
            k_BTGK = rms_norm(k_BTGK, k_norm_K, eps=c.norm_eps).astype(k_BTGK.dtype)
        frequency_F = rope.frequencies(channels, theta=c.rope_theta, scaling=c.rope_scaling)
        q_BTHK = rope.rotate(q_BTHK, rows.positions_BT, frequency_F)
        k_BTGK = rope.rotate(k_BTGK, rows.positions_BT, frequency_F)
        if c.ternary_qk:
            q_BTHK, k_BTGK = (_ternary_heads(x) for x in (q_BTHK, k_BTGK))
        if state is None:
            out_BTHK = functional.causal_attention(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                rows.segment_ids_BT,
                partition=channel_partition((B, T, kv_heads)),
                implementation=c.attention_kernel,
            )
        else:
            out_BTHK, k_cache, v_cache = functional.cached_attention(
                q_BTHK, k_BTGK, v_BTGK, state["k"], state["v"], rows.positions_BT
            )
            state = {"k": k_cache, "v": v_cache}
        out_init = nn.initializers.normal(deviation / math.sqrt(2 * c.num_layers))
        o_proj = Linear(
            D,
            options,
            c.param_dtype,
            out_init,
            c.attention_bias == "qkvo",
            name="o_proj",
        )
        _, (out_BTD,) = linears(c, [o_proj(c.query_size)], out_BTHK.reshape(B, T, c.query_size))
        return x_BTD, out_BTD, state


def _ternary_heads(x_BTHK: jax.Array) -> jax.Array:
    """Each token's heads rounded to {-s, 0, s}, s of the head alone; gradient straight through."""
    return quantize.fake_ternarize(x_BTHK[..., None, :])[..., 0, :]


def _state(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """{"k", "v": [L, B, S, G, K] in the compute dtype}, S = max_length places.

    Raises:
      ValueError: max_length is None.
    """
    if max_length is None:
        raise ValueError("max_length is None: attention needs room for its keys and values")
    shape = (*rows, max_length, config.kv_heads, config.head_channels)
    dtype = jnp.dtype(config.compute_dtype)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


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


def _mixing_flops(config: ModelConfig, seq_len: int, number: int) -> float:
    """Causal: the token at position t (from 1) attends to t keys, on average (seq_len + 1) / 2,
    at 2 operations a channel of all heads each for the score and for the sum."""
    del number
    return 4 * config.query_size * (seq_len + 1) / 2


def _kept(config: ModelConfig) -> Kept:
    """Attention's output; its scores are never kept."""
    queries, keys = config.query_size, config.key_size
    return Kept(
        states=0,
        gated=0,
        gates=2 * keys + 2 * queries,
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
)
