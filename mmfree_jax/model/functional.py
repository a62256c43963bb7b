"""The maths of the model as plain functions, without Flax.

Shapes: B rows, T time steps, D hidden channels, L layers, H heads, G heads of keys and values,
K channels a head, S places in a key-value cache, W steps that a convolution sees.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmfree_jax.pallas_kernels.norm_quant.api import rms_norm


def forget_gate_lower_bounds(raw_LD: jax.Array) -> jax.Array:
    """Each layer's lower bound of the forget gate, zero in the first and rising with depth.

    cumsum(softmax(raw over layers)) minus its first row (HGRN, arXiv 2311.04823, eq. 6).

    Args:
      raw_LD: learned logits; zeros give layer l the bound l / L.

    Returns:
      [L, D] float32 in [0, 1).
    """
    share_LD = jax.nn.softmax(raw_LD.astype(jnp.float32), axis=0)
    return jnp.cumsum(share_LD, axis=0) - share_LD[:1]


def document_edges(segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Where the recurrent state is dropped, and where it is held.

    Args:
      segment_ids_BT: int32; documents count from 1 within a row, 0 is padding.

    Returns:
      reset_BT: True on the first token of each document but the row's first.
      padding_BT: True on padding, where the state passes through unchanged.
    """
    padding_BT = segment_ids_BT == 0
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    reset_BT = jnp.pad(changed_BT, ((0, 0), (1, 0))) & ~padding_BT
    return reset_BT, padding_BT


def short_convolution(
    x_BTD: jax.Array,
    kernel_DW: jax.Array,
    *,
    history_BWD: jax.Array | None,
    reset_BT: jax.Array | None,
    padding_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """silu of a causal convolution over each channel, within each document.

    y_t = silu(sum_j kernel[W - 1 - j] x_{t - j}), as the authors' package defines it.

    Args:
      x_BTD: inputs.
      kernel_DW: the last column weighs the step itself.
      history_BWD: the W - 1 inputs before the first step; None: zeros.
      reset_BT: True where another document begins, which does not see what came before.
      padding_BT: True on padding, all of it on the right.

    Returns:
      y_BTD in x's dtype and the history [B, W - 1, D] float32 after the last step.
    """
    B, T, D = x_BTD.shape
    W = kernel_DW.shape[1]
    if history_BWD is None:
        history_BWD = jnp.zeros((B, W - 1, D), jnp.float32)
    padded_BTD = jnp.concatenate([history_BWD, x_BTD.astype(jnp.float32)], axis=1)
    document_BT = jnp.zeros((B, W - 1 + T), jnp.int32)
    if reset_BT is not None:
        document_BT = document_BT.at[:, W - 1 :].set(jnp.cumsum(reset_BT, axis=1))

    y_BTD = jnp.zeros((B, T, D), jnp.float32)
    for w in range(W):
        same_BT = document_BT[:, w : w + T] == document_BT[:, W - 1 :]
        seen_BTD = jnp.where(same_BT[..., None], padded_BTD[:, w : w + T], 0.0)
        y_BTD += kernel_DW[:, w].astype(jnp.float32) * seen_BTD

    held_B = jnp.full((B,), T) if padding_BT is None else jnp.sum(~padding_BT, axis=1)
    places_BW = held_B[:, None] + jnp.arange(W - 1)
    history_BWD = jnp.take_along_axis(padded_BTD, places_BW[..., None], axis=1)
    now_B1 = jnp.take_along_axis(document_BT, held_B[:, None] + W - 2, axis=1)
    same_BW = jnp.take_along_axis(document_BT, places_BW, axis=1) == now_B1
    history_BWD = jnp.where(same_BW[..., None], history_BWD, 0.0)
    return jax.nn.silu(y_BTD).astype(x_BTD.dtype), history_BWD


def gated_output(
    g_BTD: jax.Array, h_BTD: jax.Array, norm_scale_D: jax.Array, *, eps: float
) -> jax.Array:
    """RMSNorm(g) * silu(h): the norm on the gate, SiLU on the state, as released."""
    gate_BTD = rms_norm(g_BTD, norm_scale_D, eps=eps)
    return (gate_BTD * jax.nn.silu(h_BTD.astype(jnp.float32))).astype(g_BTD.dtype)


def printed_output_gate(form: str, g_BTE: jax.Array | None, h_BTE: jax.Array) -> jax.Array:
    """What goes into the MLGRU's output projection by the paper's forms; see `ModelConfig`.

    Args:
      form: "text": g sigmoid(h); "figure": h sigmoid(g); "none": h.
      g_BTE: the gate's projection; None for "none".
      h_BTE: the states.

    Returns:
      [B, T, E] in h's dtype; computed in float32.
    """
    if g_BTE is None:
        return h_BTE
    g, h = g_BTE.astype(jnp.float32), h_BTE.astype(jnp.float32)
    gated = g * jax.nn.sigmoid(h) if form == "text" else h * jax.nn.sigmoid(g)
    return gated.astype(h_BTE.dtype)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up for [..., 2m], the gate in the first half; computed in float32."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def relu2_glu(gate_up: jax.Array) -> jax.Array:
    """relu(gate)^2 * up for [..., 2m], as `swiglu` (So et al., arXiv 2109.08668)."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jnp.square(jax.nn.relu(gate)) * up).astype(gate_up.dtype)


def causal_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segment_ids_BT: jax.Array | None,
    *,
    partition: PartitionSpec | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal attention within each document.

    cuDNN's flash attention keeps no [T, T] array of a head: documents reach it as one bias
    [B, 1, T, T] for all heads, and what lies ahead in time it skips.

    Args:
      q_BTHK: queries; H a multiple of G, whose heads serve H / G queries each.
      k_BTGK: keys.
      v_BTGK: values.
      segment_ids_BT: documents; None: each row is one.
      partition: mesh axes of rows, time (None) and heads: each device attends to its part. None
        leaves the partitioning to the compiler, which only "xla" allows on several devices.
      implementation: "xla", "cudnn" (bfloat16 and float16 on CUDA devices), or None for cuDNN
        where it can.

    Returns:
      [B, T, H, K] in q's dtype.

    Raises:
      ValueError: the implementation's name is unknown, or does not know these dtypes.
      NotImplementedError: cuDNN does not know this shape.
    """
    if implementation not in (None, "xla", "cudnn"):
        raise ValueError(f"implementation={implementation!r} is unknown; choose xla, cudnn or None")
    if implementation == "cudnn" and q_BTHK.dtype not in _CUDNN_DTYPES:
        raise ValueError(
            f"implementation='cudnn' with {q_BTHK.dtype}: it takes bfloat16 and float16; use xla"
        )
    if implementation is None:
        implementation = "cudnn" if _cudnn_can(q_BTHK, partition) else "xla"

    def attend(
        q_BTHK: jax.Array,
        k_BTGK: jax.Array,
        v_BTGK: jax.Array,
        segment_ids_BT: jax.Array | None,
    ) -> jax.Array:
        mask = None
        if segment_ids_BT is not None:
            mask = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTGK, v_BTGK, mask=mask, is_causal=True, implementation=implementation
        )

    if partition is None or implementation == "xla":
        return attend(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)
    heads, rows = PartitionSpec(*partition, None), PartitionSpec(partition[0])
    return jax.shard_map(
        attend,
        in_specs=(heads, heads, heads, None if segment_ids_BT is None else rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTHK, k_BTGK, v_BTGK, segment_ids_BT)


_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def _cudnn_can(q_BTHK: jax.Array, partition: PartitionSpec | None) -> bool:
    """Whether cuDNN takes these queries on this process's devices (Ampere and later)."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")  # "9.0"; "gfx942" with ROCm
    if device.platform != "gpu" or not capability.replace(".", "").isdigit():
        return False
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 or (not mesh.empty and mesh.size == 1)
    _, T, _, K = q_BTHK.shape
    widest = 256 if float(capability) >= 9 else 128
    return (
        q_BTHK.dtype in _CUDNN_DTYPES
        and (alone or partition is not None)
        and float(capability) >= 8
        and K in range(8, widest + 1, 8)
        and T % 2 == 0  # its backward pass with a bias wants whole pairs
    )


def cached_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    k_cache_BSGK: jax.Array,
    v_cache_BSGK: jax.Array,
    positions_BT: jax.Array,
    start_BT: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention over a key-value cache, after this call's keys and values are written to it.

    Each row stands at positions of its own, so that prompts of different lengths share a
    batch: padding on the right is overwritten by the tokens that follow. `start_BT` is the place
    of the first token of each one's document, before which it does not see. cuDNN, chosen as in
    `causal_attention`, keeps no [T, S] array of a head; one token is always XLA's.

    Returns:
      The output [B, T, H, K] and the updated caches [B, S, H, K].
    """
    rows = jnp.arange(q_BTHK.shape[0])[:, None]
    k_cache_BSGK = k_cache_BSGK.at[rows, positions_BT].set(
        k_BTGK.astype(k_cache_BSGK.dtype), mode="drop"
    )
    v_cache_BSGK = v_cache_BSGK.at[rows, positions_BT].set(
        v_BTGK.astype(v_cache_BSGK.dtype), mode="drop"
    )
    key_places = jnp.arange(k_cache_BSGK.shape[1])[None, None, None, :]
    mask = key_places <= positions_BT[:, None, :, None]
    mask &= key_places >= start_BT[:, None, :, None]
    by_cudnn = implementation == "cudnn" or (implementation is None and _cudnn_can(q_BTHK, None))
    out = jax.nn.dot_product_attention(
        q_BTHK,
        k_cache_BSGK.astype(q_BTHK.dtype),
        v_cache_BSGK.astype(q_BTHK.dtype),
        mask=mask,
        implementation="cudnn" if by_cudnn and q_BTHK.shape[1] > 1 else "xla",
    )
    return out, k_cache_BSGK, v_cache_BSGK


def begin_cache(cache_BSGK: jax.Array, x_BTGK: jax.Array) -> jax.Array:
    """A cache of nothing yet, with keys or values at its first places, as many as it has."""
    count = min(cache_BSGK.shape[1], x_BTGK.shape[1])
    return cache_BSGK.at[:, :count].set(x_BTGK[:, :count].astype(cache_BSGK.dtype))
