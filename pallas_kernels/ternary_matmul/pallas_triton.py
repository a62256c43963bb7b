"""The ternary product on GPU tensor cores through Pallas-Triton, any shape.

One program makes one output tile: it walks K in steps with int32 accumulators (s8 wgmma on
Hopper, mma elsewhere) and scales them in registers. The hardware's several programs a
multiprocessor hide each other's loads and stores.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import triton as pltriton
from ..refs import Ref


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two) and Triton's warps and pipeline depth."""

    tile_m: int = 128
    tile_n: int = 128
    tile_k: int = 128
    warps: int = 4
    stages: int = 3
    group: int = 8  # Rows of tiles walked together, so that their operands stay in L2.


def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config,
    interpret: bool = False,
) -> jax.Array:
    """(x_q @ trits^T) * x_scale * w_scale.

    Args:
      x_q: [M, K] int8.
      x_scale: [M] float32.
      trits: [N, K] int8.
      w_scale: [1] float32.
      out_dtype: dtype of the result.
      config: the tiles.
      interpret: run as a JAX program, to check the arithmetic without a GPU.

    Returns:
      [M, N] of out_dtype.
    """
    m, n = x_q.shape[0], trits.shape[0]
    return pl.pallas_call(
        functools.partial(_kernel, config=config),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(m, config.tile_m) * pl.cdiv(n, config.tile_n),),
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="ternary_matmul",
    )(x_q, x_scale, trits, w_scale)


def _kernel(
    x_ref: Ref, x_scale_ref: Ref, t_ref: Ref, w_scale_ref: Ref, out_ref: Ref, *, config: Config
) -> None:
    m, k = x_ref.shape
    n = t_ref.shape[0]
    tiles_m, tiles_n = pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)
    # Groups of rows: within one, programs run down the rows first.
    group_size = config.group * tiles_n
    program = pl.program_id(0)
    group = program // group_size
    rows_in_group = jnp.minimum(tiles_m - group * config.group, config.group)
    within = program % group_size
    m_index = group * config.group + within % rows_in_group
    n_index = within // rows_in_group

    # Numbers of rows and columns, as a slice must not end beyond the array, masked or not. A mask
    # costs loads their width, so it is there only where the shape needs it.
    rows, row_mask = _places(m_index, config.tile_m, m)
    columns, column_mask = _places(n_index, config.tile_n, n)

    def load(ref: Ref, rows: jax.Array, mask: jax.Array | None, step: Any) -> jax.Array:
        depth, depth_mask = _places(step, config.tile_k, k)
        mask = None if mask is None else mask[:, None]
        if depth_mask is not None:
            mask = depth_mask[None, :] if mask is None else mask & depth_mask[None, :]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (rows.size, config.tile_k))
        other = None if mask is None else 0
        return pltriton.load(ref.at[rows[:, None], depth[None, :]], mask=mask, other=other)

    def step(index: jax.Array, accumulator: jax.Array) -> jax.Array:
        x = load(x_ref, rows, row_mask, index)
        t = load(t_ref, columns, column_mask, index)
        return accumulator + lax.dot_general(
            x, t, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

    accumulator = lax.fori_loop(
        0,
        pl.cdiv(k, config.tile_k),
        step,
        jnp.zeros((config.tile_m, config.tile_n), jnp.int32),
    )
    scale = pltriton.load(
        x_scale_ref.at[rows], mask=row_mask, other=None if row_mask is None else 0.0
    )
    scale = scale * w_scale_ref[0]
    values = (accumulator.astype(jnp.float32) * scale[:, None]).astype(out_ref.dtype)
    mask = None
    if row_mask is not None or column_mask is not None:
        mask = jnp.ones(values.shape, jnp.bool_)
        mask = mask if row_mask is None else mask & row_mask[:, None]
        mask = mask if column_mask is None else mask & column_mask[None, :]
    pltriton.store(out_ref.at[rows[:, None], columns[None, :]], values, mask=mask)


def _places(index: Any, tile: int, size: int) -> tuple[jax.Array, jax.Array | None]:
    """Where a tile's elements lie, and which of them inside (None: all)."""
    places = index * tile + jnp.arange(tile)
    return places, None if size % tile == 0 else places < size
