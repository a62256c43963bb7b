"""Gated linear attention: the public door.

A state of K x V numbers a head that fades row by row and gains an outer product each step. There
is one program, XLA's, whose products run where the compiler's run; no kernel has been written.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from . import xla
from .xla import CHUNK

__all__ = ["CHUNK", "gla"]


def gla(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHK: jax.Array,
    *,
    state_BHKV: jax.Array | None = None,
    reset_BT: jax.Array | None = None,
    padding_BT: jax.Array | None = None,
    partition: PartitionSpec | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`reference.gla` in float32 (float64 for float64 inputs), in parallel over time.

    Differentiable in all floats, for cotangents of both outputs; the backward pass keeps the
    operands. One step is the recurrent form. On GPUs and TPUs the products of float32 are rounded
    as JAX's default precision says; decays, their sums and the state are not.

    Args:
      q_BTHK: queries, any float dtype.
      k_BTHK: keys, any float dtype.
      v_BTHV: values, any float dtype.
      log_decay_BTHK: at most 0; -inf lets nothing pass.
      state_BHKV: before the first step; None: zeros.
      reset_BT: bool; where true what came before that step is dropped, the given state too.
      padding_BT: bool; where true the state is held and the inputs are ignored.
      partition: mesh axes of rows, time (None) and heads: each device computes its own rows and
        heads. None leaves the partitioning to the compiler.

    Returns:
      out_BTHV in v's dtype, and the state after the last step, [B, H, K, V] float32.

    Raises:
      ValueError: shapes disagree, or partition splits time.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.gla.api import gla
      >>> q = k = v = jnp.ones((1, 3, 1, 2))
      >>> out, state = gla(q, k, v, jnp.zeros((1, 3, 1, 2)))  # nothing fades
      >>> out[0, :, 0, 0].tolist(), state.shape
      ([2.0, 4.0, 6.0], (1, 1, 2, 2))
    """
    _check(q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK, state_BHKV)
    B, T, H, K = k_BTHK.shape
    dtype = jnp.promote_types(v_BTHV.dtype, jnp.float32)
    q, k, v, log_decay = (x.astype(dtype) for x in (q_BTHK, k_BTHK, v_BTHV, log_decay_BTHK))
    if padding_BT is not None:
        held = padding_BT[..., None, None]
        k, log_decay = jnp.where(held, 0, k), jnp.where(held, 0, log_decay)
    if reset_BT is not None:
        log_decay = jnp.where(reset_BT[..., None, None], -jnp.inf, log_decay)
    if state_BHKV is None:
        state_BHKV = jnp.zeros((B, H, K, v.shape[-1]), dtype)
    run = _one_step if T == 1 else xla.chunked
    if partition is not None:
        rows, time, heads = partition
        if time is not None:
            raise ValueError(f"partition={partition} splits time; it must be whole on each device")
        steps, state = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
        run = functools.partial(jax.shard_map, check_vma=False)(
            run, in_specs=(*(steps,) * 4, state), out_specs=(steps, state)
        )
    out_BTHV, last_BHKV = run(q, k, v, log_decay, state_BHKV.astype(dtype))
    return out_BTHV.astype(v_BTHV.dtype), last_BHKV


def _one_step(
    q_B1HK: jax.Array,
    k_B1HK: jax.Array,
    v_B1HV: jax.Array,
    log_decay_B1HK: jax.Array,
    state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    q, k, v, log_decay = (x[:, 0] for x in (q_B1HK, k_B1HK, v_B1HV, log_decay_B1HK))
    out_BHV, state_BHKV = xla.step(q, k, v, log_decay, state_BHKV)
    return out_BHV[:, None], state_BHKV


def _check(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    log_decay_BTHK: jax.Array,
    state_BHKV: jax.Array | None,
) -> None:
    if k_BTHK.ndim != 4 or 0 in k_BTHK.shape:
        raise ValueError(f"k_BTHK has shape {k_BTHK.shape}; it must be a non-empty [B, T, H, K]")
    for name, x in (("q_BTHK", q_BTHK), ("log_decay_BTHK", log_decay_BTHK)):
        if x.shape != k_BTHK.shape:
            raise ValueError(f"{name} has shape {x.shape}; it must be that of k, {k_BTHK.shape}")
    if v_BTHV.ndim != 4 or v_BTHV.shape[:3] != k_BTHK.shape[:3]:
        raise ValueError(f"v_BTHV has shape {v_BTHV.shape}; it must be {k_BTHK.shape[:3]} and V")
    B, _, H, K = k_BTHK.shape
    expected = (B, H, K, v_BTHV.shape[-1])
    if state_BHKV is not None and state_BHKV.shape != expected:
        raise ValueError(f"state_BHKV has shape {state_BHKV.shape}; it must be {expected}")
