"""minGRU with ternary layers (Feng et al., "Were RNNs all we needed?", arXiv 2410.01201).

Their form for training in parallel, whose candidate is above zero: h_t = (1 - z_t) h_{t-1} +
z_t c(h~_t), z and h~ projections of the token alone. Beside an MLGRU it has no output gate and no
lower bound, and another candidate.
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


class MinGRUWeights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      z_proj, h_proj, o_proj: linear layers, of the gate, the candidate and the output.
    """

    norm: VectorT
    z_proj: LinearT
    h_proj: LinearT
    o_proj: LinearT


class MinGRU(nn.Module):
    """Owns the token mixer: projections z and h in, projection o out."""

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
        weights = MinGRUWeights(norm=norm_scale_D, **projections(c, _matrices(c)))
        return run_mixer(_mix, weights, x_BTD, rows, state, c)


def _mix(
    ops: Operations,
    weights: MinGRUWeights[Any, Any],
    x_BTD: jax.Array,
    update_BTD: jax.Array | None,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it starts at zero."""
    assert ops.steps is not None
    x_BTD, (z_BTE, h_BTE) = ops.linears(
        [weights.z_proj, weights.h_proj],
        x_BTD,
        residual=update_BTD,
        outer_norm=weights.norm,
        skip=True,
        name="i_f_g",
    )
    z, h = z_BTE.astype(jnp.float32), h_BTE.astype(jnp.float32)
    candidate_BTE = jnp.where(h >= 0, h + 0.5, jax.nn.sigmoid(h))
    h0_BE = None if state is None else state["h"]
    state_BTE, last_BE = linear_over(
        config, ops.steps, jax.nn.sigmoid(-z), jax.nn.sigmoid(z) * candidate_BTE, h0_BE
    )
    _, (out_BTD,) = ops.linears([weights.o_proj], state_BTE.astype(z_BTE.dtype), name="o")
    return x_BTD, out_BTD, {"h": last_BE}


def _matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    inner, width = config.state_size, config.hidden_size
    return {"z_proj": (inner, width), "h_proj": (inner, width), "o_proj": (width, inner)}


def _mixing_flops(config: ModelConfig, seq_len: int, bounded_before: int) -> float:
    """An elementary function counting one: z and 1 - z 2, candidate 2, product 1, recurrence 2."""
    del seq_len, bounded_before
    return 7.0 * config.state_size


def _kept(config: ModelConfig) -> Kept:
    """In float32 1 - z, the recurrence's input and the states."""
    inner, width = config.state_size, config.hidden_size
    return Kept(
        states=inner,
        gated=inner,
        gates=3 * inner,
        inputs=width + inner,
        float32=3 * inner,
        compute=0,
    )


MIXER = Mixer(
    module=MinGRU,
    state=one_vector,
    matrices=_matrices,
    norms=lambda config: 0,
    vectors=lambda config: 0,
    mixing_flops=_mixing_flops,
    kept=_kept,
    packed=PackedForm(MinGRUWeights, _mix, {"norm": "mixer_norm/scale"}),
)
