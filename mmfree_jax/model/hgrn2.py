"""HGRN2 with ternary layers (Qin et al., arXiv 2404.07904), as flash-linear-attention has it.

z, q, i = f_proj(u), q_proj(u), i_proj(u), in heads of n channels; f = b + (1 - b) sigmoid(z) with
the layer's lower bound b, and in each head S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T and
y_t = silu(q_t) S_t / sqrt(n), so that 1 - f is the key, the output gate the query, and a state has
n times as many numbers as i has channels. The output is o_proj(RMSNorm(y)). The authors' first code
has sigmoid(q) and silu(i).
"""

from typing import Any, Generic, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.model.layer import LinearT, Operations, VectorT
from mmfree_jax.model.linear import NormScale, projections
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer, PackedForm
from mmfree_jax.model.operations import Rows, run_mixer
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.gla.api import CHUNK, gla

# The least z: a gate of e^-60 is shut in float32, and its logarithm is still finite.
_SHUT = -60.0


class HGRN2Weights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      q_proj, f_proj, i_proj, o_proj: linear layers, of the query, the forget gate, the input and
        the output.
      out_norm: scale of the RMSNorm on what is read from the state, [E].
      lower_bound: of the forget gate, [E].
    """

    norm: VectorT
    q_proj: LinearT
    f_proj: LinearT
    i_proj: LinearT
    out_norm: VectorT
    o_proj: LinearT
    lower_bound: VectorT


class HGRN2(nn.Module):
    """Owns the token mixer: projections q, f and i in, a norm, projection o out."""

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
        assert of_layer.lower_bound_E is not None
        weights = HGRN2Weights(
            norm=norm_scale_D,
            **projections(c, _matrices(c)),
            out_norm=NormScale(c.param_dtype, name="out_norm")(c.state_size),
            lower_bound=of_layer.lower_bound_E,
        )
        return run_mixer(_mix, weights, x_BTD, rows, state, c)


def _mix(
    ops: Operations,
    weights: HGRN2Weights[Any, Any],
    x_BTD: jax.Array,
    update_BTD: jax.Array | None,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it starts at zero."""
    assert ops.steps is not None
    x_BTD, (q_BTE, f_BTE, i_BTE) = ops.linears(
        [weights.q_proj, weights.f_proj, weights.i_proj],
        x_BTD,
        residual=update_BTD,
        outer_norm=weights.norm,
        skip=True,
        name="i_f_g",
    )
    B, T, E = q_BTE.shape
    heads, channels = config.state_heads, config.head_expansion

    def in_heads(x_BTE: jax.Array) -> jax.Array:
        return x_BTE.reshape(B, T, heads, channels)

    k_BTE, log_forget_BTE = _gate(f_BTE, ops.vector(weights.lower_bound))
    query_BTE = jax.nn.silu(q_BTE.astype(jnp.float32)) * channels**-0.5
    out_BTHV, last_BHKV = gla(
        *(in_heads(x) for x in (query_BTE, k_BTE, i_BTE, log_forget_BTE)),
        state_BHKV=None if state is None else state["outer"],
        reset_BT=ops.steps.reset_BT,
        padding_BT=ops.steps.padding_BT,
        partition=ops.steps.partition((B, T, heads)),
    )
    out_BTE = checkpoint_name(out_BTHV.reshape(B, T, E), "state")
    _, (out_BTD,) = ops.linears([weights.o_proj], out_BTE, outer_norm=weights.out_norm, name="o")
    return x_BTD, out_BTD, {"outer": last_BHKV}


def _gate(f_BTE: jax.Array, bound_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """1 - f and log f in float32, neither with cancellation."""
    z = jnp.maximum(f_BTE.astype(jnp.float32), _SHUT)
    open_E = 1 - bound_E
    k_BTE = open_E * jax.nn.sigmoid(-z)
    forget_BTE = bound_E + open_E * jax.nn.sigmoid(z)
    near_one = k_BTE < 0.5
    # Both logarithms are finite wherever they are not taken: so are their derivatives.
    by_key = jnp.log1p(-jnp.where(near_one, k_BTE, 0))
    return k_BTE, jnp.where(near_one, by_key, jnp.log(forget_BTE))


def _state(
    config: ModelConfig, rows: tuple[int, int], max_length: int | None
) -> dict[str, jax.Array]:
    """{"outer": [L, B, H, n, n] float32}."""
    del max_length
    n = config.head_expansion
    return {"outer": jnp.zeros((*rows, config.state_heads, n, n), jnp.float32)}


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    inner, width = config.state_size, config.hidden_size
    inputs = dict.fromkeys(("q_proj", "f_proj", "i_proj"), (inner, width))
    return inputs | {"o_proj": (width, inner)}


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    """An elementary function counting one, by the recurrence as it is written.

    A channel: silu(q) 2 and its factor 1, sigmoid 1, lower bound 2 but in the first layer, 1 - f
    1. A number of the state: its decay, the outer product and their sum 3, the read 2.
    """
    del seq_len
    bound = 2 if config.use_lower_bound and bounded_before else 0
    return float(config.state_size * (5 + bound + 5 * config.head_expansion))


def _kept(config: ModelConfig) -> Kept:
    """In float32 the query, the gate's two sigmoids, itself, the key and its logarithm.

    The op's backward pass computes all its pieces again: 27 arrays by the plan of XLA's compiler
    for an H100 (8 x 2048 tokens, 8 heads of 128), among them the chunks' states, which grow with n.
    """
    inner, width = config.state_size, config.hidden_size
    return Kept(
        states=inner,
        gated=inner,
        gates=4 * inner,
        inputs=width + inner,
        float32=6 * inner,
        compute=inner,
        working=inner * (21 + 3 * config.head_expansion // CHUNK),
    )


MIXER = Mixer(
    module=HGRN2,
    state=_state,
    matrices=_matrices,
    norms=lambda config: config.state_size,
    vectors=lambda config: config.hidden_size if config.use_lower_bound else 0,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(
        HGRN2Weights,
        _mix,
        {"norm": "mixer_norm/scale", "out_norm": "mixer/out_norm/scale"},
    ),
)
