"""The packed product on GPU tensor cores through Pallas-Triton, and unpacking.

A program makes one tile of the output. It walks the bytes of its packed rows, unpacks each
plane in registers to int8 (four trits with four instructions) and multiplies it with that
plane's columns of x. Matrices may be stacked over layers: the kernels take the stack and the
layer's number, so that nothing is sliced in memory. For one row or a few, the decode kernels
(`token_gpu.py`, `fused_gpu.py`) do better; for thousands, `unpack` and a product of int8.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import triton as pltriton
from ..refs import Ref


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes (powers of two; tile_k in bytes of a packed row), warps and pipeline depth."""

    tile_m: int = 64
    tile_n: int = 64
    tile_k: int = 64
    warps: int = 4
    stages: int = 3


def choose_config(m: int) -> Config:
    """The tiles for x [m, k].

    Of ten cuts timed on an H100 at 64 and 128 rows, tiles of 64 by 64 were the fastest or
    within a few percent of it at every shape: wider ones leave multiprocessors without work.
    """
    return Config(tile_m=max(16, min(64 if m <= 128 else 128, pl.next_power_of_2(m))))


def packed_matmul(
    x_q: jax.Array, packed: jax.Array, *, config: Config | None = None, interpret: bool = False
) -> jax.Array:
    """x_q @ trits^T: [M, K] int8 and [N, Q] uint8 at 2 bits -> [M, N] int32."""
    return _call(
        x_q, packed[None], jnp.zeros((1,), jnp.int32), (), jnp.int32, config, interpret
    )  # fmt: skip


def scaled_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    packed: jax.Array,
    w_scale: jax.Array,
    layer: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike,
    config: Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x_scale w_scale (x_q @ trits^T) with one matrix of a stack.

    Args:
      x_q: [M, K] int8.
      x_scale: [M, 1] float32.
      packed: [L, N, Q] uint8 at 2 bits, Q a quarter of K or a little more (`words.py`).
      w_scale: [L, 1, 1] float32.
      layer: int32 scalar.
      out_dtype: of the result.
      config: tiles; None chooses.
      interpret: run as a JAX program.

    Returns:
      [M, N] of out_dtype.
    """
    scales = (x_scale.reshape(-1), w_scale.reshape(-1))
    return _call(x_q, packed, layer.reshape(1), scales, out_dtype, config, interpret)


def _call(
    x_q: jax.Array,
    packed: jax.Array,
    layer: jax.Array,
    scales: tuple[jax.Array, ...],
    out_dtype: jax.typing.DTypeLike,
    config: Config | None,
    interpret: bool,
) -> jax.Array:
    m, n = x_q.shape[0], packed.shape[1]
    if config is None:
        config = choose_config(m)
    return pl.pallas_call(
        functools.partial(_kernel, config=config, emulate=interpret),
        out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
        grid=(pl.cdiv(m, config.tile_m), pl.cdiv(n, config.tile_n)),
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="packed_matmul",
    )(layer, x_q, packed, *scales)


def _kernel(
    layer_ref: Ref, x_ref: Ref, w_ref: Ref, *refs: Ref, config: Config, emulate: bool
) -> None:
    *scale_refs, out_ref = refs
    m, columns = x_ref.shape
    _, n, size = w_ref.shape
    layer = layer_ref[0]
    rows = pl.program_id(0) * config.tile_m + jnp.arange(config.tile_m)
    outputs = pl.program_id(1) * config.tile_n + jnp.arange(config.tile_n)
    in_rows = None if m % config.tile_m == 0 else (rows < m)[:, None]
    in_outputs = None if n % config.tile_n == 0 else (outputs < n)[:, None]

    def step(i: jax.Array, sums: jax.Array) -> jax.Array:
        place = (i * config.tile_k + jnp.arange(config.tile_k))[None, :]
        in_place = None if size % config.tile_k == 0 else place < size
        packed = _load(w_ref.at[layer, outputs[:, None], place], in_outputs, in_place)
        for plane in range(4):
            column = plane * size + place
            in_columns = None if 4 * size == columns else column < columns
            x = _load(x_ref.at[rows[:, None], column], in_rows, in_place, in_columns)
            trits = _trits(packed, plane, emulate=emulate)
            # The weights are the first operand, which tensor cores take from registers.
            sums += lax.dot_general(
                trits, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )
        return sums

    sums = jnp.zeros((config.tile_n, config.tile_m), jnp.int32)
    y = lax.fori_loop(0, pl.cdiv(size, config.tile_k), step, sums)
    if scale_refs:
        x_scale_ref, w_scale_ref = scale_refs
        x_scale = pltriton.load(x_scale_ref.at[rows], mask=rows < m, other=0.0)
        y = y.astype(jnp.float32) * (x_scale * w_scale_ref[layer])[None, :]
    inside = (rows < m)[None, :] & (outputs < n)[:, None]
    out = out_ref.at[rows[None, :], outputs[:, None]]
    pltriton.store(out, y.astype(out_ref.dtype), mask=inside)


def _load(ref: Ref, *masks: jax.Array | None) -> jax.Array:
    given = [mask for mask in masks if mask is not None]
    if not given:
        return pltriton.load(ref)
    return pltriton.load(ref, mask=functools.reduce(jnp.logical_and, given), other=0)


def _trits(packed: jax.Array, plane: int, *, emulate: bool) -> jax.Array:
    """One plane of a tile of bytes, int8. Beyond the edges it is -1: x is zero there."""
    if emulate:
        return (((packed.astype(jnp.int32) >> (2 * plane)) & 3) - 1).astype(jnp.int8)
    # Four bytes at a time: no carry crosses from one to the next.
    (trits,) = pltriton.elementwise_inline_asm(
        "{ .reg .b32 t; "
        f"shr.u32 t, $1, {2 * plane}; "
        "and.b32 t, t, 0x03030303; add.u32 t, t, 0x7f7f7f7f; xor.b32 $0, t, 0x80808080; }",
        args=[packed],
        constraints="=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.int8)],
    )
    return trits


# Rows and bytes of a row that a program unpacks; the bytes of a plane fill a line of the cache.
_UNPACK_ROWS, _UNPACK_BYTES = 64, 128


def unpack(
    packed: jax.Array, layer: jax.Array, columns: int, *, interpret: bool = False
) -> jax.Array:
    """One matrix of a stack as int8: [L, N, Q] uint8 at 2 bits -> [N, columns]."""
    return unpack_many([packed], layer, columns, interpret=interpret)[0]


def unpack_many(
    stacks: Sequence[jax.Array], layer: jax.Array, columns: int, *, interpret: bool = False
) -> list[jax.Array]:
    """One layer's matrices of several stacks of one shape, in one launch.

    Args:
      stacks: [L, N, Q] uint8 at 2 bits.
      layer: int32 scalar.
      columns: of the matrices.
      interpret: run as a JAX program.

    Returns:
      [N, columns] int8 for each.
    """
    _, n, size = stacks[0].shape
    return pl.pallas_call(
        functools.partial(_unpack_kernel, emulate=interpret),
        out_shape=[jax.ShapeDtypeStruct((n, columns), jnp.int8)] * len(stacks),
        grid=(pl.cdiv(n, _UNPACK_ROWS), pl.cdiv(size, _UNPACK_BYTES)),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="unpack",
    )(layer.reshape(1), *stacks)


def _unpack_kernel(layer_ref: Ref, *refs: Ref, emulate: bool) -> None:
    pairs = list(zip(refs[: len(refs) // 2], refs[len(refs) // 2 :], strict=True))
    n, columns = pairs[0][1].shape
    size = pairs[0][0].shape[2]
    row = (pl.program_id(0) * _UNPACK_ROWS + jnp.arange(_UNPACK_ROWS))[:, None]
    place = (pl.program_id(1) * _UNPACK_BYTES + jnp.arange(_UNPACK_BYTES))[None, :]
    in_rows = None if n % _UNPACK_ROWS == 0 else row < n
    in_place = None if size % _UNPACK_BYTES == 0 else place < size
    layer = layer_ref[0]
    loaded = [_load(w_ref.at[layer, row, place], in_rows, in_place) for w_ref, _ in pairs]
    for packed, (_, out_ref) in zip(loaded, pairs, strict=True):
        for plane in range(4):
            column = plane * size + place
            in_columns = None if 4 * size == columns else column < columns
            masks = [mask for mask in (in_rows, in_place, in_columns) if mask is not None]
            mask = functools.reduce(jnp.logical_and, masks) if masks else None
            if mask is not None:
                mask = jnp.broadcast_to(mask, packed.shape)
            trits = _trits(packed, plane, emulate=emulate)
            pltriton.store(out_ref.at[row, column], trits, mask=mask)
