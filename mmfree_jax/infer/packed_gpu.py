"""One token a row of the MatMul-free model through the decode kernels.

A single row goes through one kernel that runs the whole token (`token_gpu`); a few rows through
four kernels a layer (`fused_gpu`); more through `packed_model.decode`.

Shapes: B rows, D hidden, L layers, V vocabulary, as in `packed_model.py`, whose arithmetic
this repeats; the tree holds its weights as words (`packed_model.kernel_layout`).
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.config import ModelConfig
from mmfree_jax.infer.packed_model import embed, lower_bounds
from mmfree_jax.model import State
from mmfree_jax.pallas_kernels.decode import fused_gpu, token_gpu
from mmfree_jax.pallas_kernels.decode.fused_gpu import Layer

Tree = dict[str, Any]

# Programs of the one-kernel form wait for each other, so all must run at once. With fewer
# multiprocessors than this (a slice of a GPU) four kernels a layer do better.
FEWEST_MULTIPROCESSORS = 64

# Environment variable: "layers" keeps the one-kernel form off.
KERNELS_VARIABLE = "MMFREE_DECODE_KERNELS"

# Layers whose kernels are laid out one after another in the compiled loop over layers.
UNROLL = 8


# Hidden size -> most rows for which four fused kernels a layer, whose products are dot products
# row by row, are faster on an H100 than tensor cores; wider models: `_FEWEST_ROWS`.
_FEW_ROWS = {1024: 4, 2048: 3}
_FEWEST_ROWS = 2


def applies(packed: Tree, batch: int, tokens: int) -> bool:
    """Whether these kernels serve a call: one token a row, few rows, on a GPU."""
    if tokens != 1 or "words" not in packed["head"] or jax.default_backend() != "gpu":
        return False
    width = packed["final_norm"]["scale"].shape[-1]
    rows = [rows for widest, rows in _FEW_ROWS.items() if width <= widest]
    return batch <= max(rows, default=_FEWEST_ROWS)


def multiprocessors() -> int:
    """Multiprocessors of the first device; 0 where it is not a GPU."""
    if jax.default_backend() != "gpu":
        return 0
    return int(getattr(jax.local_devices()[0], "core_count", 0) or 0)


def prefetches() -> bool:
    """Whether the first device takes requests to bring memory to its L2 cache.

    `cp.async.bulk.prefetch.L2` is there from compute capability 9.0 (PTX ISA, section on bulk
    copies); on older devices the kernel does without.
    """
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    return float(capability) >= 9.0


def token_config(config: ModelConfig) -> token_gpu.Config:
    """How the one-kernel form is cut on this device: as measured for the nearest width."""
    widths = _measured_configs()
    nearest = min(widths, key=lambda width: abs(math.log(width / config.hidden_size)))
    cut = dict(widths[nearest])
    if not prefetches():
        cut["ahead"] = 0
    return token_gpu.Config(programs=cut.pop("each") * multiprocessors(), **cut)


def _one_kernel(packed: Tree) -> bool:
    """Whether the kernel that runs the whole token is to be used on this device."""
    mixer, glu = packed["blocks"]["mixer"], packed["blocks"]["glu"]
    widths = [linear["norm_scale"].shape[-1] for linear in (mixer["o_proj"], glu["down_proj"])]
    return (
        os.environ.get(KERNELS_VARIABLE) != "layers"
        and multiprocessors() >= FEWEST_MULTIPROCESSORS
        and all(width % 16 == 0 for width in widths)
    )


@functools.cache
def _measured_configs() -> dict[int, dict[str, Any]]:
    """Hidden size -> the fastest of a few cuts on an H100; "each": programs a multiprocessor."""
    text = Path(__file__).with_name("token_configs.json").read_text(encoding="utf-8")
    return {int(width): cut for width, cut in json.loads(text).items()}


def decode_token(
    packed: Tree,
    config: ModelConfig,
    token_B: jax.Array,
    state: State,
    held_B: jax.Array | None = None,
    *,
    token: token_gpu.Config | None = None,
    unroll: int = UNROLL,
    interpret: bool = False,
) -> tuple[jax.Array, State]:
    """Reads one token a row.

    Args:
      packed: the tree, with words.
      config: of the model.
      token_B: int32.
      state: to go on from.
      held_B: True for rows whose token is padding: their state is kept.
      token: cut of the kernel that runs the whole token, for one row; None: that kernel, where
        the device is large enough and the model's widths are multiples of 16.
      unroll: else, layers in one round of the loop over layers.
      interpret: run the kernels as JAX programs.

    Returns:
      [B, V] float32 logits, and the new state.
    """
    if token is None and token_B.shape[0] == 1 and _one_kernel(packed):
        token = token_config(config)
    if token is None:
        logits_BV, new_LBD = _layer_by_layer(packed, config, token_B, state, unroll, interpret)
        if held_B is not None:
            new_LBD = jnp.where(held_B[None, :, None], state.layers["h"], new_LBD)
    else:
        limit_B = jnp.ones(1, jnp.int32) if held_B is None else (~held_B).astype(jnp.int32)
        _, logits_BV, new_LBD = _tokens(
            packed, config, token_B, state, jnp.zeros((1, config.vocab_size)), limit_B,
            jnp.full(1, -1, jnp.int32), 1, token, interpret,
        )  # fmt: skip
    length_B = jnp.ones_like(state.position_B)
    if held_B is not None:
        length_B = (~held_B).astype(jnp.int32)
    return logits_BV, State(state.position_B + length_B, {"h": new_LBD})


def chains(packed: Tree, batch: int) -> bool:
    """Whether `decode_greedy` serves a call."""
    return applies(packed, batch, 1) and batch == 1 and _one_kernel(packed)


def decode_greedy(
    packed: Tree,
    config: ModelConfig,
    state: State,
    logits_BV: jax.Array,
    limit_B: jax.Array,
    stop_ids_S: jax.Array,
    steps: int,
    *,
    token: token_gpu.Config | None = None,
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
      token: cut of the kernel; None: as measured.
      interpret: run it as a JAX program.

    Returns:
      [1, steps] int32 tokens, -1 behind the last; the logits after it, and the new state.
    """
    first_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    token = token_config(config) if token is None else token
    tokens_N, logits_BV, new_LBD = _tokens(
        packed, config, first_B, state, logits_BV, limit_B, stop_ids_S, steps, token, interpret
    )
    read = jnp.sum(tokens_N >= 0, dtype=jnp.int32)
    return tokens_N[None], logits_BV, State(state.position_B + read, {"h": new_LBD})


def _tokens(
    packed: Tree, config: ModelConfig, first_B: jax.Array, state: State, logits_BV: jax.Array,
    limit_B: jax.Array, stop_ids_S: jax.Array, steps: int, token: token_gpu.Config,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    return token_gpu.decode_tokens(
        first_B, whole_model(packed, config), state.layers["h"], logits_BV, limit_B, stop_ids_S,
        steps=steps, eps=config.linear_norm_eps, outer_eps=config.norm_eps,
        dtype=jnp.dtype(config.compute_dtype), residual_dtype=jnp.dtype(config.residual_dtype),
        config=token, interpret=interpret,
    )  # fmt: skip


def _layer_by_layer(
    packed: Tree,
    config: ModelConfig,
    token_B: jax.Array,
    state: State,
    unroll: int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Logits and new states by four kernels a layer."""
    eps = {"eps": config.linear_norm_eps}
    norms = eps | {"outer_eps": config.norm_eps}
    how = {"dtype": jnp.dtype(config.compute_dtype), "interpret": interpret}
    blocks, mixer, glu = packed["blocks"], packed["blocks"]["mixer"], packed["blocks"]["glu"]
    bounds_LD = lower_bounds(packed, config)
    h_LBD = state.layers["h"]
    mixer_in = _layer(*(mixer[name] for name in ("i_proj", "f_proj", "g_proj")))
    mixer_out = _layer(mixer["o_proj"])
    glu_in, glu_out = _layer(glu["gate_up_proj"]), _layer(glu["down_proj"])

    def step(x_BD: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = index[None]
        g_BD, h_BD = fused_gpu.mixer_in(
            x_BD, layer, blocks["mixer_norm"]["scale"], mixer_in, bounds_LD, h_LBD, **norms, **how
        )
        x_BD = fused_gpu.mixer_out(
            g_BD, h_BD, layer, mixer["gate_norm"]["scale"], mixer_out, x_BD, **norms, **how
        )
        z_BM = fused_gpu.glu_in(x_BD, layer, blocks["glu_norm"]["scale"], glu_in, **norms, **how)
        return fused_gpu.glu_out(z_BM, layer, glu_out, x_BD, **eps, **how), h_BD

    x_BD, new_LBD = jax.lax.scan(
        step,
        embed(packed["embedding"], token_B, config),
        jnp.arange(config.num_layers, dtype=jnp.int32),
        unroll=min(unroll, config.num_layers),
    )
    head = jax.tree.map(lambda x: x[None], packed["head"])
    head["scale"] = head["scale"].reshape(1, 1, 1)
    logits_BV = fused_gpu.head(
        x_BD, packed["final_norm"]["scale"][None], _layer(head), **norms, **how
    )
    return logits_BV, new_LBD


def whole_model(packed: Tree, config: ModelConfig) -> token_gpu.Model:
    """The weights as the kernel that runs a whole token takes them."""
    blocks, mixer, glu = packed["blocks"], packed["blocks"]["mixer"], packed["blocks"]["glu"]
    head = jax.tree.map(lambda x: x[None], packed["head"])
    head["scale"] = head["scale"].reshape(1, 1, 1)
    return token_gpu.Model(
        mixer_in=_layer(*(mixer[name] for name in ("i_proj", "f_proj", "g_proj"))),
        mixer_out=_layer(mixer["o_proj"]),
        glu_in=_layer(glu["gate_up_proj"]),
        glu_out=_layer(glu["down_proj"]),
        head=_layer(head),
        mixer_norm=blocks["mixer_norm"]["scale"],
        gate_norm=mixer["gate_norm"]["scale"],
        glu_norm=blocks["glu_norm"]["scale"],
        final_norm=packed["final_norm"]["scale"][None],
        lower_bound=lower_bounds(packed, config),
        embedding=packed["embedding"]["weight"],
        embedding_scale=packed["embedding"].get("scale"),
    )


def _layer(*linears: Tree) -> Layer:
    return Layer(
        [linear["words"] for linear in linears],
        [linear["scale"] for linear in linears],
        [linear["norm_scale"] for linear in linears],
    )
