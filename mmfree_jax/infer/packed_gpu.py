"""One token a row of a packed model through the decode kernels.

Shapes: B rows, D hidden, L layers, V vocabulary, as in `model/packed_model.py`, whose arithmetic
`pallas_kernels/decode` repeats on weights in words.
"""

import jax
import jax.numpy as jnp

from mmfree_jax.config import ModelConfig
from mmfree_jax.model import State
from mmfree_jax.model.weights import Packed, PackedLinear
from mmfree_jax.pallas_kernels.decode import api as decode


def _widths(packed: Packed) -> dict[str, int]:
    return {
        "width": packed.head.columns,
        "state_size": packed.mixer.o_proj.columns,
        "glu_size": packed.glu.down_proj.columns,
    }


def serves_token(packed: Packed, batch: int, tokens: int) -> bool:
    """Whether `decode_token` serves a call: one token a row, few rows, on a GPU."""
    in_words = packed.head.layout == "words"
    return in_words and tokens == 1 and decode.measured_best(batch, **_widths(packed)) is not None


def serves_greedy(packed: Packed, batch: int) -> bool:
    """Whether `decode_greedy` serves a call: few rows, on a GPU that runs one as one kernel."""
    return packed.head.layout == "words" and batch <= decode.greedy_rows(**_widths(packed))


def decode_token(
    packed: Packed,
    config: ModelConfig,
    token_B: jax.Array,
    state: State,
    held_B: jax.Array | None = None,
    *,
    implementation: str | None = None,
    cut: decode.Cut | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, State]:
    """Reads one token a row.

    Args:
      packed: weights, in words.
      config: of the model.
      token_B: int32.
      state: to go on from.
      held_B: True for rows whose token is padding: their state is kept.
      implementation: of the decode op; None: as measured.
      cut: of the kernel of whole tokens; None: as measured.
      interpret: run the kernels as JAX programs.

    Returns:
      [B, V] float32 logits, and the new state.
    """
    logits_BV, new_LBD = decode.decode_token(
        whole_model(packed), token_B, state.layers["h"], held_B,
        arithmetic=arithmetic(config), implementation=implementation, cut=cut, interpret=interpret,
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
    stop_ids_S: jax.Array,
    steps: int,
    *,
    implementation: str | None = None,
    cut: decode.Cut | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, State]:
    """The likeliest tokens of each row, one after another in one kernel; a row after another.

    Args:
      packed: weights, in words.
      config: of the model.
      state: to go on from.
      logits_BV: float32, of the token that comes next.
      limit_B: int32, most tokens.
      stop_ids_S: int32 tokens before which it ends; -1 is none.
      steps: static, what `limit_B` may be at most.
      implementation: of the decode op; None: as measured.
      cut: of the kernel; None: as measured.
      interpret: run it as a JAX program.

    Returns:
      [B, steps] int32 tokens, -1 behind the last; the logits after it, and the new state.
    """
    model = whole_model(packed)

    def row(
        inputs: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        h_LD, logits_V, limit = inputs
        tokens_N, logits_1V, new_L1D = decode.decode_greedy(
            model, h_LD[:, None], logits_V[None], limit[None], stop_ids_S, steps=steps,
            arithmetic=arithmetic(config), implementation=implementation, cut=cut,
            interpret=interpret,
        )  # fmt: skip
        return tokens_N, logits_1V[0], new_L1D[:, 0]

    h_BLD = jnp.swapaxes(state.layers["h"], 0, 1)
    tokens_BN, logits_BV, new_BLD = jax.lax.map(row, (h_BLD, logits_BV, limit_B))
    read_B = jnp.sum(tokens_BN >= 0, axis=1, dtype=jnp.int32)
    return (
        tokens_BN,
        logits_BV,
        State(state.position_B + read_B, {"h": jnp.swapaxes(new_BLD, 0, 1)}),
    )


def arithmetic(config: ModelConfig) -> decode.Arithmetic:
    """What surrounds the integer products."""
    return decode.Arithmetic(
        eps=config.linear_norm_eps,
        outer_eps=config.norm_eps,
        dtype=jnp.dtype(config.compute_dtype),
        residual_dtype=jnp.dtype(config.residual_dtype),
    )


def whole_model(packed: Packed) -> decode.Model:
    """The weights as the decode op takes them."""
    mixer, glu = packed.mixer, packed.glu
    return decode.Model(
        mixer_in=_linears(mixer.i_proj, mixer.f_proj, mixer.g_proj),
        mixer_out=_linears(mixer.o_proj),
        glu_in=_linears(glu.gate_up_proj),
        glu_out=_linears(glu.down_proj),
        head=_linears(packed.head_stack()),
        mixer_norm=mixer.norm,
        gate_norm=mixer.gate_norm,
        glu_norm=glu.norm,
        final_norm=packed.final_norm_D[None],
        lower_bound=mixer.lower_bound,
        embedding=packed.embedding.table_VD,
        embedding_scale=packed.embedding.row_scale_V1,
    )


def _linears(*stacks: PackedLinear) -> decode.Linears:
    return decode.Linears(
        tuple(stack.matrix for stack in stacks),
        tuple(stack.scale for stack in stacks),
        tuple(stack.norm_scale for stack in stacks),
    )
