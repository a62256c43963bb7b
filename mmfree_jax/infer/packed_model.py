"""The MatMul-free model on packed weights: plain functions on the tree of `load_packed`.

The wiring of a layer is stated once, over `linears`, of which there are two: one that unpacks a
layer where it is used and computes as the model does (`bitlinear_many`), right on every backend,
and one of GPU kernels that read the packed stacks. The integers are the model's own.

Shapes: B rows, T tokens, D hidden, L layers, V vocabulary, N outputs, Q bytes of a packed row.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.config import ModelConfig
from mmfree_jax.model import State, functional
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.packed_matmul.api import (
    from_words,
    quantize_rows,
    scaled_matmul,
    to_words,
    unpack,
    unpack_many,
)
from mmfree_jax.pallas_kernels.recurrence.api import mlgru_recurrence
from mmfree_jax.pallas_kernels.ternary_matmul.api import gated_ternary_matmul, ternary_matmul

Tree = dict[str, Any]

# Tokens beyond which a matrix is unpacked to int8 before its product: each tile of the packed
# product unpacks the weights again.
UNPACK_TOKENS = 512


def decode(
    packed: Tree,
    config: ModelConfig,
    tokens_BT: jax.Array,
    state: State,
    segment_ids_BT: jax.Array | None,
    *,
    kernels: bool | None = None,
    unroll: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, State]:
    """`LanguageModel.decode` on packed weights.

    Args:
      packed: the tree under "packed" of `load_packed`.
      config: of the model.
      tokens_BT: int32.
      state: to go on from.
      segment_ids_BT: 0 marks padding on the right; None: there is none.
      kernels: compute the linear layers by the GPU kernels; None: on a GPU.
      unroll: layers in one round of the loop over layers; None: all with the kernels, so that
        a GPU gets the whole program as one graph, and one at a time without.
      interpret: run those as JAX programs.

    Returns:
      [B, V] float32 logits after each row's last token, and the new state.
    """
    B, T = tokens_BT.shape
    reset_BT = padding_BT = None
    length_B = jnp.full((B,), T, jnp.int32)
    if segment_ids_BT is not None:
        reset_BT, padding_BT = functional.document_edges(segment_ids_BT)
        length_B = jnp.sum(~padding_BT, axis=1, dtype=jnp.int32)
    if kernels is None:
        kernels = "words" in packed["head"] and jax.default_backend() == "gpu"
    linears = functools.partial(
        functools.partial(kernel_linears, interpret=interpret) if kernels else xla_linears, config
    )
    blocks, mixer, glu = packed["blocks"], packed["blocks"]["mixer"], packed["blocks"]["glu"]
    bounds_LD = lower_bounds(packed, config)

    def layer(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]):
        x_BTD, update_BTD = carry
        index, h0_BD = inputs
        x_BTD, (i_BTD, f_BTD, g_BTD) = linears(
            [mixer[name] for name in ("i_proj", "f_proj", "g_proj")],
            index,
            x_BTD,
            residual=update_BTD,
            outer_norm=blocks["mixer_norm"]["scale"],
        )
        h_BTD, last_BD = mlgru_recurrence(
            i_BTD,
            f_BTD,
            bounds_LD[index],
            h0_BD=h0_BD,
            reset_BT=reset_BT,
            padding_BT=padding_BT,
            implementation=config.recurrence_kernel,
        )
        _, (update_BTD,) = linears(
            [mixer["o_proj"]],
            index,
            g_BTD,
            outer_norm=mixer["gate_norm"]["scale"],
            times_silu=h_BTD,
        )
        x_BTD, (gate_up_BTM,) = linears(
            [glu["gate_up_proj"]],
            index,
            x_BTD,
            residual=update_BTD,
            outer_norm=blocks["glu_norm"]["scale"],
            to_gate=True,
        )
        _, (update_BTD,) = linears([glu["down_proj"]], index, gate_up_BTM, gated=True)
        return (x_BTD, update_BTD), last_BD

    x_BTD = embed(packed["embedding"], tokens_BT, config)
    nothing_BTD = jnp.zeros(x_BTD.shape, jnp.dtype(config.compute_dtype))
    (x_BTD, update_BTD), h_LBD = jax.lax.scan(
        layer,
        (x_BTD, nothing_BTD),
        (jnp.arange(config.num_layers, dtype=jnp.int32), state.layers["h"]),
        unroll=(config.num_layers if kernels else 1) if unroll is None else unroll,
    )
    last_B11 = (length_B - 1)[:, None, None]
    x_B1D, update_B1D = (jnp.take_along_axis(x, last_B11, axis=1) for x in (x_BTD, update_BTD))
    _, (logits_B1V,) = linears(
        [jax.tree.map(lambda x: x[None], packed["head"])],
        jnp.int32(0),
        x_B1D,
        residual=update_B1D,
        outer_norm=packed["final_norm"]["scale"][None],
    )
    logits_BV = logits_B1V[:, 0].astype(jnp.float32)
    return logits_BV, State(state.position_B + length_B, {"h": h_LBD})


def kernel_layout(packed: Tree) -> Tree:
    """The tree with its packed rows as int32 "words", the layout that the kernels read.

    Prompts and large batches read it too, through `packed_rows`.
    """

    def visit(tree: Tree) -> Tree:
        out: Tree = {name: visit(x) if isinstance(x, dict) else x for name, x in tree.items()}
        if "packed" in out:
            out["words"] = to_words(out.pop("packed"), out["norm_scale"].shape[-1])
        return out

    return visit(packed)


def packed_rows(layer: Tree) -> jax.Array:
    """The packed rows of a layer or a stack, [..., N, Q] uint8, from either layout."""
    return from_words(layer["words"]) if "words" in layer else layer["packed"]


def lower_bounds(packed: Tree, config: ModelConfig) -> jax.Array:
    """The forget gates' lower bounds, [L, D] float32."""
    if "bounds" in packed:
        return packed["bounds"]
    if not config.use_lower_bound:
        return jnp.zeros((config.num_layers, config.state_size), jnp.float32)
    return functional.forget_gate_lower_bounds(packed["lower_bounds"])


def with_bounds(packed: Tree, config: ModelConfig) -> Tree:
    """The tree with its lower bounds worked out, for a loop that would do it at every token."""
    return packed | {"bounds": lower_bounds(packed, config)}


def embed(embedding: Tree, tokens_BT: jax.Array, config: ModelConfig) -> jax.Array:
    """The tokens' rows of the table, [B, T, D] in the residual dtype."""
    x_BTD = jnp.take(embedding["weight"], tokens_BT, axis=0)
    if "scale" in embedding:
        x_BTD = x_BTD.astype(jnp.float32) * jnp.take(embedding["scale"], tokens_BT, axis=0)
    return x_BTD.astype(jnp.dtype(config.residual_dtype))


def xla_linears(
    config: ModelConfig,
    layers: Sequence[Tree],
    index: jax.Array,
    x: jax.Array,
    *,
    outer_norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    to_gate: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """BitLinears of one input, from stacks of packed weights.

    Args:
      config: of the model.
      layers: stacks over the model's layers.
      index: int32 scalar, the layer.
      x: [B, T, K]; [B, T, 2K] gated.
      outer_norm: [L, K] of an RMSNorm in front of all; None leaves it out.
      residual: [B, T, K] to add to x first.
      times_silu: [B, T, K]; RMSNorm(x) * silu(times_silu) is the input.
      gated: silu(gate) * up, of the two halves of x, is the input.
      to_gate: the next call is gated, on this one's output.

    Returns:
      x + residual, and [B, T, N_j] in the compute dtype for each.
    """
    del to_gate
    if residual is not None:
        x = x + residual.astype(x.dtype)
    own = [jax.tree.map(lambda stack: stack[index], layer) for layer in layers]
    columns = x.shape[-1] // (2 if gated else 1)
    return x, bitlinear_many(
        x,
        tuple(layer["norm_scale"] for layer in own),
        (None,) * len(own),
        tuple(unpack(packed_rows(layer), columns) for layer in own),
        tuple(layer["scale"] for layer in own),
        eps=config.linear_norm_eps,
        outer_norm_weight=None if outer_norm is None else outer_norm[index],
        outer_eps=config.norm_eps,
        out_dtype=jnp.dtype(config.compute_dtype),
        times_silu=times_silu,
        gated=gated,
        implementation=config.matmul_kernel,
    )


def kernel_linears(
    config: ModelConfig,
    layers: Sequence[Tree],
    index: jax.Array,
    x: jax.Array,
    *,
    outer_norm: jax.Array | None = None,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    to_gate: bool = False,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """`xla_linears` by GPU kernels, which read the stacks in place.

    With many rows the output of a call with `to_gate` comes gated, [B, T, N / 2], and the next
    call takes it so: of x's width it tells whether there is a gate to apply.
    """
    B, T = x.shape[:2]
    columns = layers[0]["norm_scale"].shape[-1]
    out_dtype = jnp.dtype(config.compute_dtype)

    def rows(a: jax.Array | None) -> jax.Array | None:
        return None if a is None else a.reshape(B * T, a.shape[-1])

    unpacked = B * T > UNPACK_TOKENS
    stream, qs, scales = quantize_rows(
        x.reshape(B * T, -1),
        index,
        [layer["norm_scale"] for layer in layers],
        outer_norm,
        eps=config.linear_norm_eps,
        outer_eps=config.norm_eps,
        residual=rows(residual),
        times_silu=rows(times_silu),
        matrix_scales=[layer["scale"] for layer in layers] if unpacked else (),
        gated=gated and x.shape[-1] == 2 * columns,
        interpret=interpret,
    )
    if unpacked:
        trits = unpack_many(
            [packed_rows(layer) for layer in layers], index, columns, interpret=interpret
        )
        one = jnp.ones((1,), jnp.float32)  # The rows' scales hold the matrices'.
        product = gated_ternary_matmul if to_gate else ternary_matmul
        outputs = [
            product(q, scale, t, one, out_dtype=out_dtype, implementation=config.matmul_kernel)
            for q, scale, t in zip(qs, scales, trits, strict=True)
        ]
    else:
        outputs = [
            scaled_matmul(
                q, scale, packed_rows(layer), layer["scale"], index, out_dtype=out_dtype,
                interpret=interpret,
            )
            for layer, q, scale in zip(layers, qs, scales, strict=True)
        ]  # fmt: skip
    return stream.reshape(x.shape), tuple(y.reshape(B, T, -1) for y in outputs)
