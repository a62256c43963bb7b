"""s_t = a_t s_{t-1} + b_t by Pallas Mosaic GPU: a program walks all of time for some channels.

Copies bring tiles of time into shared memory well ahead of the walk, so that memory sees one read
of the inputs and one write of the outputs, and no program waits for another. Within a tile each
of the four warps takes its own stretch of time: it reduces it to a pair (product of the a_t, state
from a zero start), the pairs of all warps give each its starting state, and from there it walks
again. Only the walk over tiles is sequential.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import mosaic
from .. import mosaic_gpu as plgpu
from ..errors import MosaicError
from ..refs import Ref
from .steps import Row, Steps

WARPS = 4
# Marks of steps: the state does not pass; it does not, and nothing comes in; it passes unchanged.
_RESET, _CLEARED, _HELD = 1, 2, 3
_NAMES = {False: "linear_recurrence", True: "linear_recurrence_reversed"}


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
      unroll: steps of a warp's stretch, in straight-line code; a tile has four stretches.
      channels: of a program, a multiple of 32.
      stages: of the ring of tiles.
    """

    unroll: int = 16
    channels: int = 32
    stages: int = 4


def scan(
    steps: Steps,
    rows: dict[str, jax.Array],
    *,
    previous_BTD: jax.Array | None = None,
    start_BD: jax.Array | None = None,
    initial_BD: jax.Array | None = None,
    lanes: dict[str, jax.Array] | None = None,
    reset_BT: jax.Array | None = None,
    held_BT: jax.Array | None = None,
    config: Config,
    interpret: bool = False,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """Runs `steps` over time; see steps.py for arguments and results.

    Raises:
      MosaicError: the channels are no multiple of the config's.
    """
    B, T, D = next(iter(rows.values())).shape
    L, C, stages = config.unroll, config.channels, config.stages
    if D % C:
        raise MosaicError(f"{D} channels are no multiple of {C}: take implementation='xla'")
    tiles = -(-T // (WARPS * L))
    pad = tiles * WARPS * L - T

    def stretches(x_BTD: jax.Array) -> jax.Array:
        """[B, stretches, L, D]."""
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0))) if pad else x_BTD
        return x_BTD.reshape(B, tiles * WARPS, L, D)

    tiled = {name: stretches(x) for name, x in rows.items()}
    edges, flat = {}, {name: x.astype(jnp.float32) for name, x in (lanes or {}).items()}
    if previous_BTD is not None:
        tiled["previous"] = stretches(previous_BTD)
        # What stands before the first step of each stretch.
        first = jnp.zeros((B, D)) if start_BD is None else start_BD
        ends = tiled["previous"][:, :-1, -1]
        edges["edge"] = jnp.concatenate([first[:, None].astype(ends.dtype), ends], axis=1)
    marks = None
    if reset_BT is not None or held_BT is not None or pad:
        marks = jnp.zeros((B, T), jnp.int32)
        if reset_BT is not None:
            marks = jnp.where(reset_BT, _RESET, marks)
        if held_BT is not None:
            marks = jnp.where(held_BT, jnp.where(marks == _RESET, _CLEARED, _HELD), marks)
        marks = jnp.pad(marks, ((0, 0), (0, pad)), constant_values=_HELD)
        marks = marks.reshape(B, tiles, WARPS, L).swapaxes(2, 3)
    f32 = jnp.float32
    if initial_BD is None:
        initial_BD = jnp.zeros((B, D), f32)
    inputs = {**tiled, **edges, **flat, "initial": initial_BD}
    if marks is not None:
        inputs["marks"] = marks

    outputs = [f"out{i}" for i in range(len(steps.outputs))]
    out_type = {
        name: jax.ShapeDtypeStruct((B, tiles * WARPS, L, D), dtype)
        for name, dtype in zip(outputs, steps.outputs, strict=True)
    }
    out_type["last"] = jax.ShapeDtypeStruct((B, D), f32)
    for i in range(steps.sums):
        out_type[f"sum{i}"] = jax.ShapeDtypeStruct((B, WARPS, D), f32)

    scratch: dict[str, Any] = {
        f"tile:{n}": plgpu.SMEM((stages, WARPS, L, C), x.dtype)
        for n, x in (*tiled.items(), *((n, out_type[n]) for n in outputs))
    }
    scratch |= {f"tile:{n}": plgpu.SMEM((stages, WARPS, C), x.dtype) for n, x in edges.items()}
    if marks is not None:
        scratch["tile:marks"] = plgpu.SMEM((stages, L, WARPS), jnp.int32)
    scratch |= {f"lane:{n}": plgpu.SMEM((C,), f32) for n in (*flat, "initial")}
    scratch |= {name: plgpu.SMEM((WARPS, C), f32) for name in ("products", "states")}
    mosaic.blocks_that_fit(
        sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch.values()), 1
    )
    moving = [*tiled, *edges, *(["marks"] if marks is not None else [])]
    scratch["arrived"] = plgpu.Barrier(num_arrivals=len(moving), num_barriers=stages)
    scratch["lanes_arrived"] = plgpu.Barrier(num_arrivals=len(flat) + 1)

    def kernel(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip((*inputs, *out_type), refs, strict=True))
        _kernel(named, scratch, steps, config, tiles, (moving, list(flat), outputs), interpret)

    results = mosaic.kernel(
        kernel, out_type=list(out_type.values()), scratch=scratch,
        grid={"lane": D // C, "batch": B}, interpret=interpret, name=_NAMES[steps.reverse],
    )(*inputs.values())  # fmt: skip
    by_name = dict(zip(out_type, results, strict=True))
    sums = [jnp.sum(by_name[f"sum{i}"], axis=(0, 1)) for i in range(steps.sums)]
    return [by_name[n].reshape(B, -1, D)[:, :T] for n in outputs], by_name["last"], sums


def _kernel(
    named: dict[str, Ref],
    scratch: dict[str, Ref],
    steps: Steps,
    config: Config,
    tiles: int,
    names: tuple[list[str], list[str], list[str]],
    interpret: bool,
) -> None:
    moving, flat, outputs = names
    L, C = config.unroll, config.channels
    b, d = lax.axis_index("batch"), lax.axis_index("lane") * C
    channels = pl.ds(d, C)
    shape = (WARPS, C)
    layout = vector = along = None
    if not interpret:
        layout = plgpu.Layout.TILED(
            plgpu.Tiling(((WARPS, C), (C // 32,))),
            warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1,
        )  # fmt: skip
        vector, along = layout.reduce(0), layout.reduce(1)

    def wide(x_C: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(x_C, shape, (1,))

    def spread(x_warps: jax.Array) -> jax.Array:
        x = lax.broadcast_in_dim(x_warps, shape, (0,))
        # jax 0.10 does not find the layout by itself.
        return x if layout is None else plgpu.layout_cast(x, layout)

    def full(value: float) -> jax.Array:
        x = jnp.full(shape, value, jnp.float32)
        return x if layout is None else plgpu.layout_cast(x, layout)

    for n in (*flat, "initial"):
        source = named[n].at[channels] if n in flat else named[n].at[b, channels]
        mosaic.fetch(source, scratch[f"lane:{n}"], scratch["lanes_arrived"])
    plgpu.barrier_wait(scratch["lanes_arrived"])
    lanes = {n: wide(mosaic.load(scratch[f"lane:{n}"], vector)) for n in flat}
    if interpret:
        warp = lax.broadcasted_iota(jnp.int32, shape, 0)
    else:
        warp = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)

    def piece(name: str, step: Any) -> Ref:
        """What a step reads or writes of an array in memory."""
        tile = tiles - 1 - step if steps.reverse else step
        if name == "marks":
            return named[name].at[b, tile]
        stretches = pl.ds(tile * WARPS, WARPS)
        if name == "edge":
            return named[name].at[b, stretches, channels]
        return named[name].at[b, stretches, :, channels]

    def fetch(step: Any, slot: Any) -> None:
        for n in moving:
            target = scratch[f"tile:{n}"].at[slot]
            mosaic.fetch(piece(n, step), target, scratch["arrived"].at[slot])

    def store(step: Any, slot: Any) -> None:
        for n in outputs:
            mosaic.store(scratch[f"tile:{n}"].at[slot], piece(n, step))

    order = range(L)[:: -1 if steps.reverse else 1]

    def row_at(slot: Any, s: int) -> tuple[Row, jax.Array | None]:
        """The values of one step of each stretch, and its marks."""

        def value(name: str, *index: int) -> jax.Array:
            ref = scratch[f"tile:{name}"].at[(slot, slice(None), *index)]
            return mosaic.load(ref, layout).astype(jnp.float32)

        row: Row = {n: value(n, s) for n in moving if n not in ("previous", "edge", "marks")}
        mark = None
        if "marks" in moving:
            mark = mosaic.load(scratch["tile:marks"].at[slot, s], along)
            mark = spread(mark)
        if "previous" in moving:
            previous = value("previous", s - 1) if s else value("edge")
            row["previous"] = previous if mark is None else jnp.where(mark == _RESET, 0.0, previous)
        return row | lanes, mark

    def coefficients(slot: Any, s: int) -> tuple[jax.Array, jax.Array]:
        row, mark = row_at(slot, s)
        a, x = steps.coefficients(row)
        if mark is not None:
            a = jnp.where(mark == _HELD, 1.0, jnp.where(mark != 0, 0.0, a))
            # In reverse the whole state crosses a boundary, not only its past.
            x = jnp.where(mark >= (_RESET if steps.reverse else _CLEARED), 0.0, x)
        return a, x

    def work(step: Any, slot: Any, carry: Any) -> Any:
        state_C, sums = carry
        kept = {s: coefficients(slot, s) for s in order}
        product, state = full(1.0), full(0.0)
        for a, x in kept.values():
            product, state = product * a, a * state + x
        scratch["products"][...] = product
        scratch["states"][...] = state
        plgpu.commit_smem()
        start = full(0.0)
        for w in range(WARPS)[:: -1 if steps.reverse else 1]:
            start = jnp.where(warp == w, wide(state_C), start)
            a_C = mosaic.load(scratch["products"].at[w], vector)
            state_C = a_C * state_C + mosaic.load(scratch["states"].at[w], vector)
        state = start
        for s, (a, x) in kept.items():
            before, state = state, a * state + x
            row, mark = row_at(slot, s)
            emitted = steps.emit(row, before, state)
            for n, value in zip(outputs, emitted, strict=False):
                ref = scratch[f"tile:{n}"]
                ref[slot, :, s] = value.astype(ref.dtype)
            terms = emitted[len(outputs) :]
            if mark is not None:
                terms = [jnp.where(mark == _HELD, 0.0, term) for term in terms]
            sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
        return state_C, sums

    initial = mosaic.load(scratch["lane:initial"], vector)
    sums = tuple(full(0.0) for _ in range(steps.sums))
    last, sums = mosaic.ring(
        tiles, config.stages, scratch["arrived"], fetch, work, store, (initial, sums)
    )
    scratch["lane:initial"][...] = last
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["lane:initial"], named["last"].at[b, channels])
    for i, total in enumerate(sums):
        plgpu.wait_smem_to_gmem(0)
        scratch["states"][...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch["states"], named[f"sum{i}"].at[b, :, channels])
    plgpu.wait_smem_to_gmem(0)
