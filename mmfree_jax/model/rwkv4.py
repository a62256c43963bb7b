"""MatMul-free RWKV-4, the paper's other token mixer (arXiv 2406.02528v1, appendix).

The time mixing of RWKV-4 (arXiv 2305.13048, eq. 11 to 17) with BitLinears for its matrices: a
decay that is learnt but does not depend on the input, where the MLGRU's does. The channel mixer
stays the GLU. Their code of it is not public; what it leaves open is RWKV-4's here.
"""

import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model.layer import LinearT, Operations, VectorT
from mmfree_jax.model.linear import projections
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer, PackedForm
from mmfree_jax.model.operations import Rows, run_mixer, token_shift
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm
from mmfree_jax.pallas_kernels.wkv.api import NOTHING, wkv


class RWKV4Weights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      r_proj, k_proj, v_proj, o_proj: linear layers.
      r_mix, k_mix, v_mix: share of the token itself in what r, k and v read, [D]; the rest is the
        token before it.
      decay: logarithm of what a key loses a step, [E].
      bonus: added to the key of the token itself, [E].
    """

    norm: VectorT
    r_proj: LinearT
    k_proj: LinearT
    v_proj: LinearT
    o_proj: LinearT
    r_mix: VectorT
    k_mix: VectorT
    v_mix: VectorT
    decay: VectorT
    bonus: VectorT


class RWKV4(nn.Module):
    """Owns the token mixer: projections r, k and v of mixed tokens in, projection o out."""

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
        assert of_layer.index is not None
        depth = of_layer.index.astype(jnp.float32) / max(c.num_layers - 1, 1)
        left = 1 - of_layer.index.astype(jnp.float32) / c.num_layers
        width, inner = c.hidden_size, c.state_size

        def vector(name: str, value: Callable[[], jax.Array]) -> jax.Array:
            return self.param(name, lambda _: value().astype(jnp.dtype(c.param_dtype)))

        # RWKV-4's own initialisation, which depends on the channel and on the depth.
        channel_D = jnp.arange(width) / width
        share_E = jnp.arange(inner) / max(inner - 1, 1)
        zigzag_E = (jnp.arange(inner) + 1) % 3 - 1
        weights = RWKV4Weights(
            norm=norm_scale_D,
            **projections(c, _matrices(c)),
            r_mix=vector("r_mix", lambda: channel_D ** (left / 2)),
            k_mix=vector("k_mix", lambda: channel_D**left),
            v_mix=vector("v_mix", lambda: channel_D**left + 0.3 * depth),
            decay=vector("decay", lambda: -5 + 8 * share_E ** (0.7 + 1.3 * depth)),
            bonus=vector("bonus", lambda: math.log(0.3) + 0.5 * zigzag_E),
        )
        return run_mixer(_mix, weights, x_BTD, rows, state, c)


def _mix(
    ops: Operations,
    weights: RWKV4Weights[Any, Any],
    x_BTD: jax.Array,
    update_BTD: jax.Array | None,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it starts afresh."""
    assert ops.steps is not None
    if update_BTD is not None:
        x_BTD = x_BTD + update_BTD.astype(x_BTD.dtype)
    dtype = jnp.dtype(config.compute_dtype)
    state = {} if state is None else state
    u_BTD = rms_norm(x_BTD, ops.vector(weights.norm), eps=config.norm_eps).astype(jnp.float32)
    before_BTD, shift_BD = token_shift(ops.steps, u_BTD, state.get("shift"))

    def project(linear: Any, mix: Any) -> jax.Array:
        share_D = ops.vector(mix).astype(jnp.float32)
        mixed_BTD = before_BTD + share_D * (u_BTD - before_BTD)
        return ops.linears([linear], mixed_BTD.astype(dtype), name="i_f_g")[1][0]

    r_BTE = project(weights.r_proj, weights.r_mix)
    k_BTE = project(weights.k_proj, weights.k_mix)
    v_BTE = project(weights.v_proj, weights.v_mix)
    average_BTE, average_BE, log_weight_BE = wkv(
        k_BTE,
        v_BTE,
        jnp.exp(ops.vector(weights.decay).astype(jnp.float32)),
        ops.vector(weights.bonus),
        average_BD=state.get("average"),
        log_weight_BD=state.get("log_weight"),
        reset_BT=ops.steps.reset_BT,
        padding_BT=ops.steps.padding_BT,
        partition=ops.steps.partition(k_BTE.shape),
        implementation=config.recurrence_kernel,
    )
    gated_BTE = jax.nn.sigmoid(r_BTE.astype(jnp.float32)) * average_BTE.astype(jnp.float32)
    _, (out_BTD,) = ops.linears([weights.o_proj], gated_BTE.astype(dtype), name="o")
    return x_BTD, out_BTD, {"shift": shift_BD, "average": average_BE, "log_weight": log_weight_BE}


def _state(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """{"shift": [L, B, D], the token before; "average", "log_weight": [L, B, E]}, all float32."""
    del max_length
    inner = (*rows, config.state_size)
    return {
        "shift": jnp.zeros((*rows, config.hidden_size), jnp.float32),
        "average": jnp.zeros(inner, jnp.float32),
        "log_weight": jnp.full(inner, NOTHING, jnp.float32),
    }


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    inner, width = config.state_size, config.hidden_size
    inputs = dict.fromkeys(("r_proj", "k_proj", "v_proj"), (inner, width))
    return inputs | {"o_proj": (width, inner)}


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    """An elementary function counting one.

    Each of three mixes of tokens 3 a channel of the stream. A channel of the state: s - w and
    s - w - k 2, both shares 2, the logarithm of the sum 4, (1 - f) v 1, recurrence 2,
    s - u - k 2, its shares 2, out 3, sigmoid(r) 1, gate 1.
    """
    del seq_len, bounded_before
    return float(9 * config.hidden_size + 20 * config.state_size)


def _kept(config: ModelConfig) -> Kept:
    """In float32 the token before and the normed one; both shares, their input, the logarithms,
    the averages and what comes out."""
    inner, width = config.state_size, config.hidden_size
    return Kept(
        states=inner,
        gated=inner,
        gates=4 * inner,
        inputs=3 * width + inner,
        float32=2 * width + 6 * inner,
        compute=0,
    )


_VECTORS = ("r_mix", "k_mix", "v_mix", "decay", "bonus")

MIXER = Mixer(
    module=RWKV4,
    state=_state,
    matrices=_matrices,
    norms=lambda config: 0,
    vectors=lambda config: 3 * config.hidden_size + 2 * config.state_size,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(
        RWKV4Weights,
        _mix,
        {"norm": "mixer_norm/scale"} | {n: f"mixer/{n}" for n in _VECTORS},
    ),
)
