"""Causal multi-head attention with rotary positions: the Transformer++ token mixer."""

import math
from typing import Any

import flax.linen as nn
import jax

from mmfree_jax.model import functional, mup, rope
from mmfree_jax.model.linear import Linear, NormScale, linears
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
        outer_norm_scale_D: jax.Array,
        positions_BT: jax.Array,
        state: dict[str, Any] | None,
        segment_ids_BT: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Any] | None]:
        """Mixes RMSNorm(x).

        Args:
          x_BTD: the residual stream.
          outer_norm_scale_D: the block's norm.
          positions_BT: int32.
          state: {"k", "v": [B, S, G, K]}, the cache to read and extend; None: attend within x.
          segment_ids_BT: documents; read only without a state.

        Returns:
          The update of the residual stream [B, T, D] and the new state.
        """
        c = self.config
        B, T, D = x_BTD.shape
        kv_heads, channels = c.kv_heads, c.head_channels
        deviation = c.initializer_range * mup.hidden_scale(c)
        scales = {"q_proj": mup.query_scale(c)}
        widths = {"q_proj": c.query_size, "k_proj": c.key_size, "v_proj": c.key_size}
        projections = [
            Linear(
                width,
                c.mixer_linear,
                c.param_dtype,
                nn.initializers.normal(deviation * scales.get(name, 1.0)),
                c.attention_bias != "none",
                name=name,
            )(D)
            for name, width in widths.items()
        ]
        _, (q_BTHK, k_BTGK, v_BTGK) = linears(c, projections, x_BTD, outer_norm=outer_norm_scale_D)
        q_BTHK, k_BTGK, v_BTGK = (y.reshape(B, T, -1, channels) for y in (q_BTHK, k_BTGK, v_BTGK))
        if c.qk_norm:
            q_norm_K = NormScale(c.param_dtype, name="q_norm")(channels)
            k_norm_K = NormScale(c.param_dtype, name="k_norm")(channels)
            q_BTHK = rms_norm(q_BTHK, q_norm_K, eps=c.norm_eps).astype(q_BTHK.dtype)
            k_BTGK = rms_norm(k_BTGK, k_norm_K, eps=c.norm_eps).astype(k_BTGK.dtype)
        frequency_F = rope.frequencies(channels, theta=c.rope_theta, scaling=c.rope_scaling)
        q_BTHK = rope.rotate(q_BTHK, positions_BT, frequency_F)
        k_BTGK = rope.rotate(k_BTGK, positions_BT, frequency_F)
        if state is None:
            out_BTHK = functional.causal_attention(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                segment_ids_BT,
                partition=channel_partition((B, T, kv_heads)),
                implementation=c.attention_kernel,
            )
        else:
            out_BTHK, k_cache, v_cache = functional.cached_attention(
                q_BTHK, k_BTGK, v_BTGK, state["k"], state["v"], positions_BT
            )
            state = {"k": k_cache, "v": v_cache}
        out_init = nn.initializers.normal(deviation / math.sqrt(2 * c.num_layers))
        o_proj = Linear(
            D, c.mixer_linear, c.param_dtype, out_init, c.attention_bias == "qkvo", name="o_proj"
        )
        _, (out_BTD,) = linears(c, [o_proj(c.query_size)], out_BTHK.reshape(B, T, c.query_size))
        return out_BTD, state
