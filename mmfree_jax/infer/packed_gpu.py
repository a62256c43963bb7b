"""One token a row of the MatMul-free model through the decode kernels, from the packed tree.

Shapes: B rows, D hidden, L layers, V vocabulary, as in `packed_model.py`, whose arithmetic
`pallas_kernels/decode` repeats; the tree holds its weights as words
(`packed_model.kernel_layout`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.config import ModelConfig
from mmfree_jax.infer.packed_model import lower_bounds
from mmfree_jax.model import State
from mmfree_jax.pallas_kernels.decode import api as decode

Tree = dict[str, Any]


def _best(packed: Tree, batch: int) -> str | None:
    if "words" not in packed["head"]:
        return None
    mixer, glu = packed["blocks"]["mixer"], packed["blocks"]["glu"]
    return decode.measured_best(
        batch,
        width=packed["final_norm"]["scale"].shape[-1],
        state_size=mixer["o_proj"]["norm_scale"].shape[-1],
        glu_size=glu["down_proj"]["norm_scale"].shape[-1],
    )


def applies(packed: Tree, batch: int, tokens: int) -> bool:
    """Whether these kernels serve a call: one token a row, few rows, on a GPU."""
    return tokens == 1 and _best(packed, batch) is not None


def decode_token(
    packed: Tree,
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
      packed: the tree, with words.
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
        whole_model(packed, config), token_B, state.layers["h"], held_B,
        arithmetic=arithmetic(config), implementation=implementation, cut=cut, interpret=interpret,
    )  # fmt: skip
    length_B = jnp.ones_like(state.position_B)
    if held_B is not None:
        length_B = (~held_B).astype(jnp.int32)
    return logits_BV, State(state.position_B + length_B, {"h": new_LBD})


def chains(packed: Tree, batch: int) -> bool:
    """Whether `decode_greedy` serves a call."""
    return batch == 1 and _best(packed, batch) == "pallas_token_gpu"


def decode_greedy(
    packed: Tree,
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
    """The likeliest tokens of one row, one after another in one kernel.

    Args:
      packed: the tree, with words.
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
      [1, steps] int32 tokens, -1 behind the last; the logits after it, and the new state.
    """
    tokens_N, logits_BV, new_LBD = decode.decode_greedy(
        whole_model(packed, config), state.layers["h"], logits_BV, limit_B, stop_ids_S,
        steps=steps, arithmetic=arithmetic(config), implementation=implementation, cut=cut,
        interpret=interpret,
    )  # fmt: skip
    read = jnp.sum(tokens_N >= 0, dtype=jnp.int32)
    return tokens_N[None], logits_BV, State(state.position_B + read, {"h": new_LBD})


def arithmetic(config: ModelConfig) -> decode.Arithmetic:
    """What surrounds the integer products."""
    return decode.Arithmetic(
        eps=config.linear_norm_eps,
        outer_eps=config.norm_eps,
        dtype=jnp.dtype(config.compute_dtype),
        residual_dtype=jnp.dtype(config.residual_dtype),
    )


def whole_model(packed: Tree, config: ModelConfig) -> decode.Model:
    """The weights as the decode op takes them."""
    blocks, mixer, glu = packed["blocks"], packed["blocks"]["mixer"], packed["blocks"]["glu"]
    head = jax.tree.map(lambda x: x[None], packed["head"])
    head["scale"] = head["scale"].reshape(1, 1, 1)
    return decode.Model(
        mixer_in=_linears(*(mixer[name] for name in ("i_proj", "f_proj", "g_proj"))),
        mixer_out=_linears(mixer["o_proj"]),
        glu_in=_linears(glu["gate_up_proj"]),
        glu_out=_linears(glu["down_proj"]),
        head=_linears(head),
        mixer_norm=blocks["mixer_norm"]["scale"],
        gate_norm=mixer["gate_norm"]["scale"],
        glu_norm=blocks["glu_norm"]["scale"],
        final_norm=packed["final_norm"]["scale"][None],
        lower_bound=lower_bounds(packed, config),
        embedding=packed["embedding"]["weight"],
        embedding_scale=packed["embedding"].get("scale"),
    )


def _linears(*linears: Tree) -> decode.Linears:
    return decode.Linears(
        tuple(linear["words"] for linear in linears),
        tuple(linear["scale"] for linear in linears),
        tuple(linear["norm_scale"] for linear in linears),
    )
