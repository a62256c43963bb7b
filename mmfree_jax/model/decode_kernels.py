"""One token a row by the decode op, whose kernels read a whole packed model.

Shapes: B rows, L layers, D channels of the state, V vocabulary, N steps, S tokens that
end a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.model.state import State
from mmfree_jax.model.weights import Packed, PackedLinear
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.decode import api as decode_op


def decode_token(
    packed: Packed,
    config: ModelConfig,
    token_B: jax.Array,
    state: State,
    held_B: jax.Array | None = None,
    **how: Any,
) -> tuple[jax.Array, State]:
    """Reads one token a row.

    Args:
      packed: weights, in words.
      config: of the model.
      token_B: int32.
      state: to go on from.
      held_B: True for rows whose token is padding: their state is kept.
      how: implementation, cut and interpret of the decode op.

    Returns:
      [B, V] float32 logits, and the new state.
    """
    logits_BV, new_LBD = decode_op.decode_token(
        whole_model(packed), token_B, state.layers["h"], held_B,
        arithmetic=arithmetic(config), **how,
    )  # fmt: skip
    length_B = jnp.ones_like(state.position_B)
    if held_B is not None:
        length_B = (~held_B).astype(jnp.int32)
    return logits_BV, State(state.position_B + length_B, {"h": new_LBD})


def decode_greedy(
    packed: Packed,
    config: ModelConfig,
    state: State,
    logits_BV: jax.Array,
    limit_B: jax.Array,
    stop_ids: jax.Array,
    steps: int,
    **how: Any,
) -> tuple[jax.Array, jax.Array, State]:
    """The likeliest tokens of each row, one after another in one kernel; a row after another.

    Args:
      packed: weights, in words.
      config: of the model.
      state: to go on from.
      logits_BV: float32, of the token that comes next.
      limit_B: int32, most tokens.
      stop_ids: int32 tokens before which it ends, [S] for all rows or [B, S]; -1 is none.
      steps: static, what `limit_B` may be at most.
      how: implementation, cut and interpret of the decode op.

    Returns:
      [B, steps] int32 tokens, -1 behind the last; the logits after it, and the new state.
    """
    read_row = functools.partial(
        decode_op.decode_greedy,
        whole_model(packed),
        steps=steps,
        arithmetic=arithmetic(config),
        **how,
    )

    def row(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        h_L1D, logits_1V, limit_1, stop_ids_S = inputs
        return read_row(h_L1D, logits_1V, limit_1, stop_ids_S)

    h_BL1D = jnp.swapaxes(state.layers["h"], 0, 1)[:, :, None]
    stop_ids_BS = jnp.broadcast_to(stop_ids, (len(limit_B), stop_ids.shape[-1]))
    rows = (h_BL1D, logits_BV[:, None], limit_B[:, None], stop_ids_BS)
    if len(limit_B) == 1:  # Without a loop around the kernel.
        outputs = jax.tree.map(lambda x: x[None], row(tuple(x[0] for x in rows)))
    else:
        outputs = jax.lax.map(row, rows)
    tokens_BN, logits_B1V, h_BL1D = outputs
    read_B = jnp.sum(tokens_BN >= 0, axis=1, dtype=jnp.int32)
    h_LBD = jnp.swapaxes(h_BL1D[:, :, 0], 0, 1)
    return tokens_BN, logits_B1V[:, 0], State(state.position_B + read_B, {"h": h_LBD})


def arithmetic(config: ModelConfig) -> decode_op.Arithmetic:
    """What surrounds the integer products."""
    return decode_op.Arithmetic(
        eps=config.linear_norm_eps,
        outer_eps=config.norm_eps,
        dtype=jnp.dtype(config.compute_dtype),
        residual_dtype=jnp.dtype(config.residual_dtype),
    )


def whole_model(packed: Packed) -> decode_op.Model:
    """The weights as the decode op takes them."""
    mixer, glu = packed.mixer, packed.glu
    return decode_op.Model(
        mixer_in=_stacks(mixer.i_proj, mixer.f_proj, mixer.g_proj),
        mixer_out=_stacks(mixer.o_proj),
        glu_in=_stacks(glu.gate_up_proj),
        glu_out=_stacks(glu.down_proj),
        head=_stacks(packed.head_stack()),
        mixer_norm=mixer.norm,
        gate_norm=mixer.gate_norm,
        glu_norm=glu.norm,
        final_norm=packed.final_norm_D[None],
        lower_bound=mixer.lower_bound,
        embedding=packed.embedding.table_VD,
        embedding_scale=packed.embedding.row_scale_V1,
    )


def _stacks(*stacks: PackedLinear) -> decode_op.Linears:
    return decode_op.Linears(
        tuple(stack.matrix for stack in stacks),
        tuple(stack.scale for stack in stacks),
        tuple(stack.norm_scale for stack in stacks),
    )
