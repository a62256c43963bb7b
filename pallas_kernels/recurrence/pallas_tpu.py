"""The linear recurrence, its reverse, and both with the MLGRU's gates fused, on TPUs.

The grid is (batch, channel blocks, time blocks) with time last, hence sequential; the state
stays in VMEM between time blocks. Within a block, tiles of 16 steps (a packed bfloat16 tile) are
scanned in log2(16) rolls over sublanes, and the state passes from tile to tile.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..refs import Ref
from . import steps as _steps
from .steps import Row, Scan, Steps

_TILE = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """block_t: time steps of a block, a multiple of 16; block_d: channels, a multiple of 128."""

    block_t: int = 256
    block_d: int = 512

    def __post_init__(self) -> None:
        if self.block_t % _TILE or self.block_t < _TILE:
            raise ValueError(f"block_t={self.block_t} must be a multiple of {_TILE}")


def forward(
    *args: Any, config: Config = Config(), interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`steps.forward` as one kernel."""
    return _steps.forward(_bind(config, interpret), *args)


def backward(
    *args: Any, config: Config = Config(), interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`steps.backward` as one kernel."""
    return _steps.backward(_bind(config, interpret), *args)


def mlgru_forward(
    *args: Any, config: Config = Config(), interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`steps.mlgru_forward` as one kernel."""
    return _steps.mlgru_forward(_bind(config, interpret), *args)


def mlgru_backward(
    *args: Any, config: Config = Config(), interpret: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """`steps.mlgru_backward` as one kernel and a small sum."""
    return _steps.mlgru_backward(_bind(config, interpret), *args)


def _bind(config: Config, interpret: bool) -> Scan:
    return functools.partial(scan, config=config, interpret=interpret)


def scan(
    steps: Steps,
    rows: dict[str, jax.Array],
    *,
    previous_BTD: jax.Array | None = None,
    start_BD: jax.Array | None = None,
    initial_BD: jax.Array | None = None,
    lanes: dict[str, jax.Array] | None = None,
    reset_BT: jax.Array | None = None,
    config: Config,
    interpret: bool = False,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """Runs `steps` over time; see steps.py for arguments and results."""
    B, T, D = next(iter(rows.values())).shape
    block_t = min(config.block_t, pl.cdiv(T, _TILE) * _TILE)
    block_d = min(config.block_d, D)
    blocks_t = pl.cdiv(T, block_t)

    def when(t: Any) -> Any:
        return blocks_t - 1 - t if steps.reverse else t

    time_spec = pl.BlockSpec((None, block_t, block_d), lambda b, d, t: (b, when(t), d))
    # The tile before the block, for the row before its first.
    tile_before = pl.BlockSpec(
        (None, _TILE, block_d),
        lambda b, d, t: (b, jnp.maximum(when(t) * (block_t // _TILE) - 1, 0), d),
    )
    state_spec = pl.BlockSpec((None, 1, block_d), lambda b, d, t: (b, 0, d))
    lane_spec = pl.BlockSpec((1, block_d), lambda b, d, t: (0, d))
    column_spec = pl.BlockSpec((None, block_t, 1), lambda b, d, t: (b, when(t), 0))

    inputs = {f"row:{name}": (value, time_spec) for name, value in rows.items()}
    for name, value in (lanes or {}).items():
        inputs[f"lane:{name}"] = (value[None], lane_spec)
    if previous_BTD is not None:
        inputs["previous"] = (previous_BTD, time_spec)
        inputs["before"] = (previous_BTD, tile_before)
    for name, value in (("start", start_BD), ("initial", initial_BD)):
        if value is not None:
            inputs[name] = (value[:, None], state_spec)
    if reset_BT is not None:
        inputs["keep"] = (1 - reset_BT[..., None].astype(jnp.float32), column_spec)

    f32 = jnp.float32
    outputs = {f"out:{i}": ((B, T, D), dtype, time_spec) for i, dtype in enumerate(steps.outputs)}
    outputs["last"] = ((B, 1, D), f32, state_spec)
    outputs |= {f"sum:{i}": ((B, 1, D), f32, state_spec) for i in range(steps.sums)}
    names = [*inputs, *outputs, "state", *(f"total:{i}" for i in range(steps.sums))]

    def kernel(*refs: Ref) -> None:
        named = dict(zip(names, refs, strict=True))
        _kernel(named, steps, when(pl.program_id(2)) * block_t, block_t, block_d, T, blocks_t)

    results = pl.pallas_call(
        kernel,
        grid=(B, pl.cdiv(D, block_d), blocks_t),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, _, spec in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM((1, block_d), f32) for _ in range(1 + steps.sums)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="linear_recurrence_reversed" if steps.reverse else "linear_recurrence",
    )(*(value for value, _ in inputs.values()))
    by_name = dict(zip(outputs, results, strict=True))
    return (
        [by_name[f"out:{i}"] for i in range(len(steps.outputs))],
        by_name["last"][:, 0],
        [jnp.sum(by_name[f"sum:{i}"], axis=(0, 1)) for i in range(steps.sums)],
    )


def _kernel(
    refs: dict[str, Ref],
    steps: Steps,
    t0: jax.Array,
    block_t: int,
    block_d: int,
    T: int,
    blocks_t: int,
) -> None:
    tiles = block_t // _TILE
    step = jax.lax.broadcasted_iota(jnp.int32, (_TILE, block_d), 0)
    state_ref = refs["state"]
    first_block, last_block = pl.program_id(2) == 0, pl.program_id(2) == blocks_t - 1
    lanes = {
        name.removeprefix("lane:"): ref[...].astype(jnp.float32)
        for name, ref in refs.items()
        if name.startswith("lane:")
    }

    @pl.when(first_block)
    def _() -> None:
        zero = jnp.zeros((1, block_d), jnp.float32)
        state_ref[...] = refs["initial"][...] if "initial" in refs else zero
        for i in range(steps.sums):
            refs[f"total:{i}"][...] = zero

    def rows_of(tile: Any) -> Row:
        at = pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)
        row: Row = dict(lanes)
        for name, ref in refs.items():
            if name.startswith("row:"):
                row[name.removeprefix("row:")] = ref[at, :].astype(jnp.float32)
        if "previous" in refs:
            row["previous"] = previous_rows(tile, at)
        if "keep" in refs:
            row["keep"] = jnp.broadcast_to(refs["keep"][at, :], (_TILE, block_d)) > 0
            if "previous" in refs:
                row["previous"] = jnp.where(row["keep"], row["previous"], 0.0)
        return row

    def previous_rows(tile: Any, at: Any) -> jax.Array:
        """Row t - 1 for each t of the tile: a roll, with the first row from the tile before."""
        earlier = pl.ds(pl.multiple_of(jnp.maximum(tile - 1, 0) * _TILE, _TILE), _TILE)
        inner = refs["previous"][earlier, :].astype(jnp.float32)[_TILE - 1 :]
        outer = refs["before"][...].astype(jnp.float32)[_TILE - 1 :]
        start = refs["start"][...] if "start" in refs else jnp.zeros((1, block_d), jnp.float32)
        outer = jnp.where(t0 == 0, start, outer)
        first = jnp.where(tile == 0, outer, inner)
        rolled = pltpu.roll(refs["previous"][at, :].astype(jnp.float32), 1, 0)
        return jnp.where(step == 0, first, rolled)

    def walk(n: Any, carry: Any) -> Any:
        state, totals = carry
        tile = tiles - 1 - n if steps.reverse else n
        row = rows_of(tile)
        a, s = steps.coefficients(row)
        if "keep" in row:
            a = jnp.where(row["keep"], a, 0.0)
            s = jnp.where(row["keep"], s, 0.0) if steps.reverse else s
        inside = None
        if T % block_t:  # beyond T the block holds anything, NaN too
            inside = t0 + tile * _TILE + step < T
            a, s = jnp.where(inside, a, 1.0), jnp.where(inside, s, 0.0)
        before, after = _scan_tile(a, s, state, step, steps.reverse)
        emitted = steps.emit(row, before, after)
        at = pl.ds(pl.multiple_of(tile * _TILE, _TILE), _TILE)
        for i in range(len(steps.outputs)):
            ref = refs[f"out:{i}"]
            ref[at, :] = emitted[i].astype(ref.dtype)
        terms = emitted[len(steps.outputs) :]
        if inside is not None:
            terms = [jnp.where(inside, term, 0.0) for term in terms]
        totals = tuple(
            total + jnp.sum(term, axis=0, keepdims=True)
            for total, term in zip(totals, terms, strict=True)
        )
        return (after[:1] if steps.reverse else after[_TILE - 1 :]), totals

    totals = tuple(refs[f"total:{i}"][...] for i in range(steps.sums))
    state, totals = jax.lax.fori_loop(0, tiles, walk, (state_ref[...], totals))
    state_ref[...] = state
    for i, total in enumerate(totals):
        refs[f"total:{i}"][...] = total

    @pl.when(last_block)
    def _() -> None:
        refs["last"][...] = state_ref[...]
        for i in range(steps.sums):
            refs[f"sum:{i}"][...] = refs[f"total:{i}"][...]


def _scan_tile(
    a: jax.Array, s: jax.Array, state: jax.Array, step: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """States before and after each of a tile's steps, by doubling over sublanes."""

    def shifted(value: jax.Array, by: int, fill: jax.typing.ArrayLike) -> jax.Array:
        amount, exists = (_TILE - by, step < _TILE - by) if reverse else (by, step >= by)
        return jnp.where(exists, pltpu.roll(value, amount, 0), fill)

    by = 1
    while by < _TILE:
        a, s = a * shifted(a, by, 1.0), a * shifted(s, by, 0.0) + s
        by *= 2
    after = a * state + s
    return shifted(after, 1, state), after
