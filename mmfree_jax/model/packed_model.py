"""The MatMul-free model on packed weights, as `LanguageModel.apply` computes it.

Linear layers come in two kinds: one unpacks a layer where it is used and computes as the model
does, right on every backend; one is GPU kernels that read the packed stacks in place. One token of
a few rows goes through `pallas_kernels/decode` where that is faster. The integers are the model's
own.

Shapes: B rows, T tokens, D hidden, L layers, V vocabulary, N outputs, Q bytes of a packed row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.model import depth, functional, layer
from mmfree_jax.model.decode_kernels import decode_token
from mmfree_jax.model.linear import LinearWeights, linears
from mmfree_jax.model.mixers import mixer_of
from mmfree_jax.model.operations import recurrence, whole
from mmfree_jax.model.state import State
from mmfree_jax.model.weights import EmbeddingTable, Packed, PackedLinear
from mmfree_jax.model_config import BITLINEAR, ModelConfig
from mmfree_jax.pallas_kernels.decode import api as decode_op
from mmfree_jax.pallas_kernels.packed_matmul.api import (
    kernels_serve,
    quantize_rows,
    scaled_matmul,
    unpack_many,
)
from mmfree_jax.pallas_kernels.ternary_matmul.api import gated_ternary_matmul, ternary_matmul

# Tokens beyond which a matrix is unpacked to int8 before its product: each tile of the packed
# product unpacks the weights again.
UNPACK_TOKENS = 512


def forward(
    packed: Packed,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
    """As `LanguageModel.__call__`."""
    x_BTD, _ = hidden(packed, config, tokens_BT, segment_ids_BT)
    return logits(packed, config, x_BTD)


def hidden(
    packed: Packed,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    state: State | None = None,
    *,
    fresh: bool = False,
) -> tuple[jax.Array, State | None]:
    """As `LanguageModel.hidden`."""
    x_BTD, update_BTD, after = _layers(
        packed, config, tokens_BT, state, segment_ids_BT, fresh=fresh
    )
    return x_BTD + update_BTD.astype(x_BTD.dtype), after


def logits(packed: Packed, config: ModelConfig, x_BTD: jax.Array) -> jax.Array:
    """As `LanguageModel.logits`."""
    x_NTD = x_BTD.reshape(-1, x_BTD.shape[-2] if x_BTD.ndim > 2 else 1, x_BTD.shape[-1])
    logits_NTV = _head(packed, config, x_NTD, None)
    return logits_NTV.reshape(*x_BTD.shape[:-1], -1)


def decode(
    packed: Packed,
    config: ModelConfig,
    tokens_BT: jax.Array,
    state: State,
    segment_ids_BT: jax.Array | None = None,
    *,
    fresh: bool = False,
    kernels: bool | None = None,
    unroll: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, State]:
    """As `LanguageModel.decode`.

    Args:
      packed: the weights.
      config: of the model.
      tokens_BT: int32.
      state: to go on from.
      segment_ids_BT: 0 marks padding on the right; None: there is none.
      fresh: as in `LanguageModel.hidden`.
      kernels: compute the linear layers by the GPU kernels; None: on a GPU, or all in the decode
        op where it serves the call.
      unroll: periods of layers in one round of the loop over them; None: all with the kernels, so
        that a GPU gets the whole program as one graph, and one at a time without.
      interpret: run those as JAX programs.

    Returns:
      [B, V] float32 logits after each row's last token, and the new state.
    """
    if kernels is None and serves_token(packed, *tokens_BT.shape):
        held_B = None if segment_ids_BT is None else segment_ids_BT[:, 0] == 0
        return decode_token(packed, config, tokens_BT[:, 0], state, held_B)
    how: Any = {"kernels": kernels, "interpret": interpret}
    x_BTD, update_BTD, after = _layers(
        packed, config, tokens_BT, state, segment_ids_BT, fresh=fresh, unroll=unroll, **how
    )
    assert after is not None  # a state went in
    last_B11 = (after.position_B - state.position_B - 1)[:, None, None]
    x_B1D, update_B1D = (jnp.take_along_axis(x, last_B11, axis=1) for x in (x_BTD, update_BTD))
    return _head(packed, config, x_B1D, update_B1D, **how)[:, 0], after


def _layers(
    packed: Packed,
    config: ModelConfig,
    tokens_BT: jax.Array,
    state: State | None,
    segment_ids_BT: jax.Array | None,
    *,
    fresh: bool = False,
    kernels: bool | None = None,
    unroll: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, State | None]:
    """The residual stream in two parts, before the last update and the update, and the state."""
    B, T = tokens_BT.shape
    reset_BT = padding_BT = None
    length_B = jnp.full((B,), T, jnp.int32)
    if segment_ids_BT is not None:
        reset_BT, padding_BT = functional.document_edges(segment_ids_BT)
        length_B = jnp.sum(~padding_BT, axis=1, dtype=jnp.int32)
    kernels = _by_kernels(packed, kernels)
    start_B = jnp.zeros((B,), jnp.int32) if state is None else state.position_B
    positions_BT = None if fresh else start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    steps = layer.Steps(reset_BT, padding_BT, whole, positions_BT, segment_ids_BT)
    recur = recurrence(config, steps)

    def period(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, Any]) -> Any:
        x_BTD, update_BTD = carry
        index, before = inputs
        after = []

        def vector(stack: jax.Array) -> jax.Array:
            return stack[index]

        def recurrence_here(
            i_BTE: jax.Array, f_BTE: jax.Array, bounds_LE: jax.Array, h0_BE: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            return recur(i_BTE, f_BTE, vector(bounds_LE), h0_BE)

        ops = layer.Operations(
            _linears(config, index, kernels, interpret), recurrence_here, vector, steps
        )
        for mixer, blocks, state in zip(config.period, packed.blocks, before, strict=True):
            form = mixer_of(mixer).packed
            assert form is not None  # `can_pack`
            x_BTD, update_BTD, new = form.mix(ops, blocks.mixer, x_BTD, update_BTD, state, config)
            x_BTD, update_BTD = layer.glu(ops, blocks.glu, x_BTD, update_BTD, config.glu_activation)
            after.append(new)
        return (x_BTD, update_BTD), tuple(after)

    x_BTD = embed(packed.embedding, tokens_BT, config)
    nothing_BTD = jnp.zeros(x_BTD.shape, jnp.dtype(config.compute_dtype))
    periods = config.num_layers // len(config.period)
    none = (None,) * len(config.period)
    (x_BTD, update_BTD), places = jax.lax.scan(
        period,
        (x_BTD, nothing_BTD),
        (
            jnp.arange(periods, dtype=jnp.int32),
            none if state is None else depth.split(state.layers, config),
        ),
        unroll=(periods if kernels else 1) if unroll is None else unroll,
    )
    if state is None:
        return x_BTD, update_BTD, None
    return x_BTD, update_BTD, State(start_B + length_B, depth.join(places, config))


def _head(
    packed: Packed,
    config: ModelConfig,
    x_BTD: jax.Array,
    residual_BTD: jax.Array | None,
    *,
    kernels: bool | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Final norm and head on x + residual: [B, T, V] float32."""
    head_linears = _linears(config, jnp.int32(0), _by_kernels(packed, kernels), interpret)
    _, (logits_BTV,) = head_linears(
        [packed.head_stack()], x_BTD, residual=residual_BTD, outer_norm=packed.final_norm_D[None]
    )
    return logits_BTV.astype(jnp.float32)


def _by_kernels(packed: Packed, kernels: bool | None) -> bool:
    return runs_kernels(packed) if kernels is None else kernels


def runs_kernels(packed: Packed) -> bool:
    """Whether the linear layers' kernels read these weights here."""
    one_scale = packed.head.scale.size == 1
    return packed.head.layout == "words" and one_scale and kernels_serve()


def _linears(
    config: ModelConfig, index: jax.Array, kernels: bool, interpret: bool
) -> layer.Linears:
    if kernels:
        return functools.partial(kernel_linears, config, index, interpret=interpret)
    return functools.partial(unpacked_linears, config, index)


def embed(embedding: EmbeddingTable, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """The tokens' rows of the table, [B, T, D] in the residual dtype."""
    x_BTD = jnp.take(embedding.table_VD, tokens_BT, axis=0)
    if embedding.row_scale_V1 is not None:
        x_BTD = x_BTD.astype(jnp.float32) * jnp.take(embedding.row_scale_V1, tokens_BT, axis=0)
    return x_BTD.astype(jnp.dtype(config.residual_dtype))


def unpacked_linears(
    config: ModelConfig,
    index: jax.Array,
    layers: Sequence[PackedLinear],
    x: jax.Array,
    *,
    outer_norm: jax.Array | None = None,
    **how: Any,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`linear.linears` on one layer of packed stacks, unpacked here.

    Args:
      config: of the model.
      index: int32 scalar, the layer.
      layers: stacks over the model's layers.
      x: as there.
      outer_norm: a stack too, [L, K].
      **how: as there.
    """
    one = [jax.tree.map(lambda stack: stack[index], stacks) for stacks in layers]
    weights = [LinearWeights(None, w.norm_scale, w.trits(), w.scale, BITLINEAR) for w in one]
    outer_norm = None if outer_norm is None else outer_norm[index]
    return linears(config, weights, x, outer_norm=outer_norm, **how)


def kernel_linears(
    config: ModelConfig,
    index: jax.Array,
    layers: Sequence[PackedLinear],
    x: jax.Array,
    *,
    outer_norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    skip: bool = False,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    to_gate: bool = False,
    name: str = "",
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`unpacked_linears` by GPU kernels, which read the stacks in place.

    With many rows the output of a call with `to_gate` comes gated, [B, T, N / 2], and the next
    call takes it so: of x's width it tells whether there is a gate to apply.
    """
    del skip, name
    B, T = x.shape[:2]
    columns = layers[0].columns
    out_dtype = jnp.dtype(config.compute_dtype)

    def rows(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else a.reshape(B * T, a.shape[-1])

    unpacked = B * T > UNPACK_TOKENS
    stream, qs, scales = quantize_rows(
        x.reshape(B * T, -1),
        index,
        [stack.norm_scale for stack in layers],
        outer_norm,
        eps=config.linear_norm_eps,
        outer_eps=config.norm_eps,
        residual=rows(residual),
        times_silu=rows(times_silu),
        matrix_scales=[stack.scale for stack in layers] if unpacked else (),
        gated=gated and x.shape[-1] == 2 * columns,
        interpret=interpret,
    )
    if unpacked:
        trits = unpack_many([stack.rows() for stack in layers], index, columns, interpret=interpret)
        one = jnp.ones((1,), jnp.float32)  # The rows' scales hold the matrices'.
        product = gated_ternary_matmul if to_gate else ternary_matmul
        outputs = [
            product(q, scale, t, one, out_dtype=out_dtype, implementation=config.matmul_kernel)
            for q, scale, t in zip(qs, scales, trits, strict=True)
        ]
    else:
        outputs = [
            scaled_matmul(
                q, scale, stack.rows(), stack.scale, index, out_dtype=out_dtype,
                interpret=interpret,
            )
            for stack, q, scale in zip(layers, qs, scales, strict=True)
        ]  # fmt: skip
    return stream.reshape(x.shape), tuple(y.reshape(B, T, -1) for y in outputs)


# One token a row by the decode op, whose kernels read the whole model.


def _widths(packed: Packed) -> dict[str, int]:
    return {
        "width": packed.head.columns,
        "state_size": packed.mixer.o_proj.columns,
        "glu_size": packed.glu.down_proj.columns,
    }


def serves_token(packed: Packed, batch: int, tokens: int) -> bool:
    """Whether `decode_token` serves a call: one token a row, few rows, on a GPU."""
    served = _decode_op_reads(packed) and tokens == 1
    return served and decode_op.measured_best(batch, **_widths(packed)) is not None


def serves_greedy(packed: Packed, batch: int) -> bool:
    """Whether `decode_greedy` serves a call: few rows, on a GPU that runs one as one kernel."""
    return _decode_op_reads(packed) and batch <= decode_op.greedy_rows(**_widths(packed))


def _decode_op_reads(packed: Packed) -> bool:
    return packed.decode_op and packed.head.layout == "words"
