"""RG-LRU with ternary layers (Griffin, De et al., arXiv 2402.19427, section 2.4).

y = x_proj(u), r_t = sigmoid(r_proj(y) + b_r), i_t = sigmoid(i_proj(y) + b_i),
a_t = sigmoid(lambda)^(8 r_t), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t y_t), and the output
o_proj(gelu(g_proj(u)) h). Griffin's block also has a short convolution of y, and block-diagonal
matrices for both gates; here the first is left out and the second are whole.
"""

from typing import Any, Generic, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfree_jax.model.layer import LinearT, Operations, VectorT
from mmfree_jax.model.linear import projections
from mmfree_jax.model.mixer import Kept, Mixer, OfLayer, PackedForm, one_vector
from mmfree_jax.model.operations import Rows, linear_over, run_mixer
from mmfree_jax.model_config import ModelConfig

_POWER = 8.0
# The least 1 - a^2: at zero the derivative of its root has no bound.
_LEAST = 1e-6


class RGLRUWeights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      g_proj, x_proj, r_proj, i_proj, o_proj: linear layers, of the output gate, the input of the
        recurrence, its recurrence gate and input gate, and the output.
      r_bias, i_bias: of both gates, [E].
      decay: lambda, [E].
    """

    norm: VectorT
    g_proj: LinearT
    x_proj: LinearT
    r_proj: LinearT
    i_proj: LinearT
    o_proj: LinearT
    r_bias: VectorT
    i_bias: VectorT
    decay: VectorT


class RGLRU(nn.Module):
    """Owns the token mixer: projections g and x in, gates r and i of x, projection o out."""

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
        del of_layer
        c = self.config
        dtype, shape = jnp.dtype(c.param_dtype), (c.state_size,)
        weights = RGLRUWeights(
            norm=norm_scale_D,
            **projections(c, _matrices(c)),
            r_bias=self.param("r_bias", nn.initializers.zeros, shape, dtype),
            i_bias=self.param("i_bias", nn.initializers.zeros, shape, dtype),
            decay=self.param("decay", _decay_init, shape, dtype),
        )
        return run_mixer(_mix, weights, x_BTD, rows, state, c)


def _decay_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The fastest decay sigmoid(lambda)^8 is uniform in [0.9, 0.999], as Griffin starts."""
    fastest = jax.random.uniform(key, shape, jnp.float32, 0.9, 0.999)
    return jax.scipy.special.logit(fastest ** (1 / _POWER)).astype(dtype)


def _mix(
    ops: Operations,
    weights: RGLRUWeights[Any, Any],
    x_BTD: jax.Array,
    update_BTD: jax.Array | None,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it starts at zero."""
    assert ops.steps is not None
    x_BTD, (g_BTE, y_BTE) = ops.linears(
        [weights.g_proj, weights.x_proj],
        x_BTD,
        residual=update_BTD,
        outer_norm=weights.norm,
        skip=True,
        name="i_f_g",
    )
    _, (r_BTE, i_BTE) = ops.linears([weights.r_proj, weights.i_proj], y_BTE, name="i_f_g")

    def gate(x_BTE: jax.Array, bias: Any) -> jax.Array:
        return jax.nn.sigmoid(x_BTE.astype(jnp.float32) + ops.vector(bias).astype(jnp.float32))

    rate_E = _POWER * jax.nn.softplus(-ops.vector(weights.decay).astype(jnp.float32))
    log_a_BTE = -rate_E * gate(r_BTE, weights.r_bias)
    scale_BTE = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a_BTE), _LEAST))
    input_BTE = scale_BTE * gate(i_BTE, weights.i_bias) * y_BTE.astype(jnp.float32)
    h0_BE = None if state is None else state["h"]
    h_BTE, last_BE = linear_over(config, ops.steps, jnp.exp(log_a_BTE), input_BTE, h0_BE)
    gated_BTE = (jax.nn.gelu(g_BTE.astype(jnp.float32)) * h_BTE).astype(g_BTE.dtype)
    _, (out_BTD,) = ops.linears([weights.o_proj], gated_BTE, name="o")
    return x_BTD, out_BTD, {"h": last_BE}


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    inner, width = config.state_size, config.hidden_size
    return {
        "g_proj": (inner, width),
        "x_proj": (inner, width),
        "r_proj": (inner, inner),
        "i_proj": (inner, inner),
        "o_proj": (width, inner),
    }


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    """An elementary function counting one: biases 2, gates 2, log a 1, a 1, its root 4, the input
    2, recurrence 2, gelu 2, gate 1."""
    del seq_len, bounded_before
    return 17.0 * config.state_size


def _kept(config: ModelConfig) -> Kept:
    """In float32 both gates, log a, a, the root, the recurrence's input and the states."""
    inner, width = config.state_size, config.hidden_size
    return Kept(
        states=inner,
        gated=inner,
        gates=5 * inner,
        inputs=width + 2 * inner,
        float32=7 * inner,
        compute=0,
    )


_VECTORS = ("r_bias", "i_bias", "decay")

MIXER = Mixer(
    module=RGLRU,
    state=one_vector,
    matrices=_matrices,
    norms=lambda config: 0,
    vectors=lambda config: 3 * config.state_size,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(
        RGLRUWeights,
        _mix,
        {"norm": "mixer_norm/scale"} | {n: f"mixer/{n}" for n in _VECTORS},
    ),
)
