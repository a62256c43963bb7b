"""One token a row through all layers, from packed weights, in plain jnp: the oracle.

Right on every backend, and read there layer after layer: nothing is fused, and each matrix is
unpacked where it is used.

Shapes: B rows, D hidden, E state, L layers, V vocabulary, S stop tokens.
"""

import jax
import jax.numpy as jnp

from ..norm_quant.reference import norm_quantize, rms_norm
from ..packed_matmul.linears import Linears
from ..packed_matmul.reference import unpack
from ..packed_matmul.words import from_words
from ..ternary_matmul.reference import ternary_matmul
from .model import Arithmetic, Model


def decode_token(
    model: Model, token_B: jax.Array, h_LBE: jax.Array, *, arithmetic: Arithmetic
) -> tuple[jax.Array, jax.Array]:
    """Reads one token a row.

    Args:
      model: weights.
      token_B: int32.
      h_LBE: float32 states.
      arithmetic: norms' eps and dtypes.

    Returns:
      [B, V] float32 logits, and the new states.
    """
    a = arithmetic

    def layer(x_BD: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, before_BE = inputs
        normed_BD = rms_norm(x_BD, model.mixer_norm[index], eps=a.outer_eps)
        i_BE, f_BE, g_BE = _linears(model.mixer_in, index, normed_BD, a)
        bound_E = model.lower_bound[index]
        forget_BE = bound_E + (1.0 - bound_E) * jax.nn.sigmoid(f_BE.astype(jnp.float32))
        new_BE = jax.nn.silu(i_BE.astype(jnp.float32)) * (1.0 - forget_BE)
        h_BE = forget_BE * before_BE + new_BE
        gated_BE = rms_norm(g_BE, model.gate_norm[index], eps=a.outer_eps)
        gated_BE *= jax.nn.silu(h_BE.astype(a.dtype).astype(jnp.float32))
        (update_BD,) = _linears(model.mixer_out, index, gated_BE, a)
        x_BD += update_BD.astype(x_BD.dtype)

        normed_BD = rms_norm(x_BD, model.glu_norm[index], eps=a.outer_eps)
        (gate_up_BM,) = _linears(model.glu_in, index, normed_BD, a)
        gate_BM, up_BM = jnp.split(gate_up_BM.astype(jnp.float32), 2, axis=-1)
        z_BM = (jax.nn.silu(gate_BM) * up_BM).astype(a.dtype)
        (update_BD,) = _linears(model.glu_out, index, z_BM, a)
        return x_BD + update_BD.astype(x_BD.dtype), h_BE

    indices_L = jnp.arange(model.layers, dtype=jnp.int32)
    x_BD, new_LBE = jax.lax.scan(layer, embed(model, token_B, a), (indices_L, h_LBE))
    normed_BD = rms_norm(x_BD, model.final_norm[0], eps=a.outer_eps)
    (logits_BV,) = _linears(model.head, jnp.int32(0), normed_BD, a)
    return logits_BV.astype(jnp.float32), new_LBE


def embed(model: Model, token_B: jax.Array, arithmetic: Arithmetic) -> jax.Array:
    """The tokens' rows of the embedding, [B, D] in the stream's dtype."""
    x_BD = jnp.take(model.embedding, token_B, axis=0)
    if model.embedding_scale is not None:
        x_BD = x_BD.astype(jnp.float32) * jnp.take(model.embedding_scale, token_B, axis=0)
    return x_BD.astype(arithmetic.residual_dtype)


def decode_greedy(
    model: Model,
    h_L1E: jax.Array,
    logits_1V: jax.Array,
    limit: jax.Array,
    stop_ids_S: jax.Array,
    *,
    steps: int,
    arithmetic: Arithmetic,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads the likeliest token, then the likeliest that follows, and so on; see `api`."""

    def reads(carry: tuple[jax.Array, ...]) -> jax.Array:
        step, _, logits_1V, _ = carry
        return (step < limit[0]) & ~jnp.any(jnp.argmax(logits_1V) == stop_ids_S)

    def read(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        step, tokens_N, logits_1V, h_L1E = carry
        token_1 = jnp.argmax(logits_1V, axis=-1).astype(jnp.int32)
        logits_1V, h_L1E = decode_token(model, token_1, h_L1E, arithmetic=arithmetic)
        return step + 1, tokens_N.at[step].set(token_1[0]), logits_1V, h_L1E

    none_N = jnp.full(steps, -1, jnp.int32)
    carry = jax.lax.while_loop(reads, read, (jnp.int32(0), none_N, logits_1V, h_L1E))
    return carry[1], carry[2], carry[3]


def _linears(
    linears: Linears, layer: jax.Array, x_BK: jax.Array, arithmetic: Arithmetic
) -> list[jax.Array]:
    """The outputs of each of the layer's matrices for one input, [B, N] in dtype."""
    out = []
    for words, scales, norms in zip(linears.words, linears.scales, linears.norms, strict=True):
        q_BK, scale_B1 = norm_quantize(x_BK, norms[layer], eps=arithmetic.eps)
        trits_NK = unpack(from_words(words[layer]), x_BK.shape[-1])
        out.append(
            ternary_matmul(q_BK, scale_B1, trits_NK, scales[layer], out_dtype=arithmetic.dtype)
        )
    return out
