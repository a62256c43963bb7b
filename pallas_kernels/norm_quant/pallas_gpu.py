"""The double RMSNorm and quantisation through Pallas Mosaic GPU: one pass each way.

What runs for each group of rows is in `gpu_kernels.py`. A program is a warpgroup that walks over
groups of four rows, which copies bring into shared memory ahead of it: inputs are read again from
there where they are needed again, so that registers hold few rows. The sum of x and its residual,
the gradient of x and the dequantised inputs take the places of what they were made from.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import mosaic
from .. import mosaic_gpu as plgpu
from ..refs import Ref
from .gpu_kernels import Backward, Forward
from .xla import Statistics

_GROUP = 4  # rows whose scalars, 16 bytes, are copied together
_LEAST_STAGES = 2
_SCALAR_BYTES = 1024  # of rows' scalars on their way, at most


class Plan(NamedTuple):
    """How a kernel runs."""

    rows: int  # worked on at a time: 1, 2 or 4
    stages: int  # of the ring of tiles
    blocks: int  # at most, of a multiprocessor


def _plan(k: int, backward: bool) -> Plan:
    """Rows of which a thread holds few values, so that several blocks share a multiprocessor."""
    return Plan(rows=2 if k <= 1024 and not backward else 1, stages=2 if k > 4096 else 3, blocks=8)


def takes(k: int, row_bytes: int, vectors: int) -> bool:
    """Whether the kernels run for K columns.

    Args:
      k: columns.
      row_bytes: of a token, in all arrays read and all written to places of their own.
      vectors: norm weights.
    """
    return k % mosaic.WARPGROUP == 0 and _fits(_LEAST_STAGES, k, row_bytes, vectors)


def _fits(rows: int, k: int, row_bytes: int, vectors: int) -> bool:
    """Whether shared memory holds so many rows at a time, and the norm weights."""
    return mosaic.fits(rows * row_bytes + 4 * k * vectors + _SCALAR_BYTES)


@functools.partial(jax.jit, static_argnames=("eps", "outer_eps", "gated", "plan", "interpret"))
def norm_quant(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    *,
    eps: float,
    outer_eps: float,
    residual: jax.Array | None = None,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...], Statistics]:
    """See `api.norm_quant`; x is [M, K], or [M, 2K] gated; `plan` is for benchmarks and tests."""
    m, k = x.shape[0], x.shape[1] // (2 if gated else 1)
    count, own, outer = len(weights), weights[0] is not None, outer_weight is not None
    names = [*["outer"] * outer, *["inner"] * own]
    names += [f"{name}{j}" for name in ("absmax", "scale") for j in range(count)]
    rows = {"x": x.reshape(m, 2, k) if gated else x}
    rows |= _present(residual=residual, silu=times_silu)
    vectors = {f"weight{j}": w for j, w in enumerate(weights)} | {"outer_weight": outer_weight}
    outputs, scalars, _ = _walk(
        Forward(k=k, count=count, gated=gated, eps=eps, outer_eps=outer_eps),
        plan or _plan(k, backward=False),
        rows,
        vectors=_present(**vectors),
        in_place={"x": "sum"} if residual is not None else {},
        written={f"q{j}": jnp.dtype(jnp.int8) for j in range(count)},
        scalars_out=names,
        interpret=interpret,
    )
    stats = Statistics(
        scalars.get("outer"), scalars.get("inner"),
        tuple(scalars[f"absmax{j}"] for j in range(count)),
    )  # fmt: skip
    qs = tuple(outputs[f"q{j}"] for j in range(count))
    return outputs.get("sum", x), qs, tuple(scalars[f"scale{j}"] for j in range(count)), stats


@functools.partial(jax.jit, static_argnames=("eps", "gated", "input_dtype", "plan", "interpret"))
def norm_backward(
    x: jax.Array,
    weights: tuple[jax.Array | None, ...],
    outer_weight: jax.Array | None,
    stats: Statistics,
    gradients: tuple[jax.Array, ...],
    gradient_scales: tuple[jax.Array, ...],
    *,
    eps: float,
    times_silu: jax.Array | None = None,
    gated: bool = False,
    d_skip: jax.Array | None = None,
    input_dtype: jax.typing.DTypeLike | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[
    jax.Array,
    tuple[jax.Array | None, ...],
    jax.Array | None,
    tuple[jax.Array, ...],
    jax.Array | None,
]:
    """`xla.norm_backward` and `xla.requantize` in one pass, for x [M, K], or [M, 2K] gated.

    Each gradient is multiplied by its scale, one float32, as it is read. `plan` is for benchmarks
    and tests.

    Returns:
      The gradient of x in x's dtype, those of the norm weights and of the outer weight in
      float32, the inputs in `input_dtype` as `api.norm_backward` says (none where stats holds no
      absmax), and the gradient of times_silu in its dtype.
    """
    m, k = gradients[0].shape
    input_dtype = jnp.dtype(input_dtype or x.dtype)
    count, own, outer = len(weights), weights[0] is not None, outer_weight is not None
    requantized = len(stats.absmaxes)
    rows = {"x": x.reshape(m, 2, k) if gated else x}
    rows |= _present(silu=times_silu, skip=d_skip)
    rows |= {f"g{j}": g for j, g in enumerate(gradients)}
    vectors = {f"weight{j}": w for j, w in enumerate(weights)} | {"outer_weight": outer_weight}
    scalars = {"outer": stats.outer, "inner": stats.inner}
    scalars |= {f"absmax{j}": a for j, a in enumerate(stats.absmaxes)}
    in_place, written = {"x": "d_x"}, {}
    if times_silu is not None:
        in_place["silu"] = "d_silu"
    for j in range(requantized):
        if gradients[j].dtype == input_dtype:
            in_place[f"g{j}"] = f"input{j}"
        else:
            written[f"input{j}"] = input_dtype
    sums = [f"d_weight{j}" for j in range(count) if own] + ["d_outer"] * outer
    outputs, _, totals = _walk(
        Backward(k=k, count=count, gated=gated, eps=eps, requantized=requantized),
        plan or _plan(k, backward=True),
        rows,
        vectors=_present(**vectors),
        constants={f"scale{j}": s for j, s in enumerate(gradient_scales)},
        scalars_in=_present(**scalars),
        in_place=in_place,
        written=written,
        sums=sums,
        interpret=interpret,
    )
    return (
        outputs["d_x"].reshape(x.shape),
        tuple(totals.get(f"d_weight{j}") for j in range(count)),
        totals.get("d_outer"),
        tuple(outputs[f"input{j}"] for j in range(requantized)),
        outputs.get("d_silu"),
    )


def _present(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    return {name: array for name, array in arrays.items() if array is not None}


def _walk(
    body: Any,
    plan: Plan,
    rows: dict[str, jax.Array],
    *,
    vectors: dict[str, jax.Array],
    constants: Mapping[str, jax.Array] | None = None,
    scalars_in: Mapping[str, jax.Array] | None = None,
    in_place: Mapping[str, str],
    written: Mapping[str, jnp.dtype],
    scalars_out: Sequence[str] = (),
    sums: Sequence[str] = (),
    interpret: bool,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """Runs `body` over all rows.

    Args:
      body: `body(values, refs, row_scalars, sums)`; see `gpu_kernels.py`.
      plan: how.
      rows: [M, K] or [M, 2, K] each, by name.
      vectors: [K], in float32 from here on.
      constants: one float32 each.
      scalars_in: [M, 1] float32.
      in_place: the outputs that take an input's place, by that input's name.
      written: the other outputs [M, K] and their dtypes.
      scalars_out: outputs [M, 1] float32.
      sums: totals [K] over all rows.

    Returns:
      The outputs [M, ...], the scalars [M, 1] and the sums [K], by name.
    """
    m, k = rows["x"].shape[0], rows["x"].shape[-1]
    # A last group of less than four rows is filled up.
    padded = m + -m % _GROUP
    rows = {n: _filled(a, padded, 0) for n, a in rows.items()}
    scalars_in = {n: _filled(a.reshape(m), padded, 1) for n, a in (scalars_in or {}).items()}
    vectors = {n: a.astype(jnp.float32) for n, a in vectors.items()}
    constants = {n: a.astype(jnp.float32).reshape(1) for n, a in (constants or {}).items()}
    inputs = {**rows, **vectors, **constants, **scalars_in}
    moved_out = dict.fromkeys(in_place.values()) | dict.fromkeys(written)
    tiles = {n: (a.shape[1:], a.dtype) for n, a in rows.items()}
    tiles |= {n: ((k,), dtype) for n, dtype in written.items()}
    places = {**{name: name for name in written}, **{out: at for at, out in in_place.items()}}

    row_bytes = sum(math.prod(s) * jnp.dtype(d).itemsize for s, d in tiles.values())
    if not _fits(plan.stages * plan.rows, k, row_bytes, len(vectors)):
        plan = plan._replace(rows=1, stages=_LEAST_STAGES)
    shape = mosaic.Rows(plan.rows, k, interpret)
    scratch: dict[str, Any] = {
        f"tile:{n}": plgpu.SMEM((plan.stages, plan.rows, *s), d) for n, (s, d) in tiles.items()
    }
    scratch |= {f"vector:{n}": plgpu.SMEM((k,), jnp.float32) for n in vectors}
    for n in (*scalars_in, *scalars_out):
        scratch[f"scalar:{n}"] = plgpu.SMEM((plan.stages, _GROUP), jnp.float32)
    shared = sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in scratch.values())
    scratch["arrived"] = plgpu.Barrier(
        num_arrivals=len(rows) + len(scalars_in), num_barriers=plan.stages
    )
    if vectors:
        scratch["vectors_arrived"] = plgpu.Barrier(num_arrivals=len(vectors))
    programs = mosaic.MULTIPROCESSORS * mosaic.blocks_that_fit(shared, plan.blocks)
    programs = min(programs, padded // _GROUP)

    out_type = {}
    for n in moved_out:
        tile_shape, dtype = tiles[places[n]]
        out_type[n] = jax.ShapeDtypeStruct((padded, *tile_shape), dtype)
    out_type |= {n: jax.ShapeDtypeStruct((padded,), jnp.float32) for n in scalars_out}
    if sums:
        out_type["sums"] = jax.ShapeDtypeStruct((len(sums), programs, k), jnp.float32)

    def kernel(*refs: Ref, **scratch: Ref) -> None:
        named = dict(zip((*inputs, *out_type), refs, strict=True))
        program = lax.axis_index("program")
        groups = lax.div(padded // _GROUP - program + programs - 1, jnp.int32(programs))
        pieces = _GROUP // plan.rows  # of a group
        for n in vectors:
            mosaic.fetch(named[n], scratch[f"vector:{n}"], scratch["vectors_arrived"])
        if vectors:
            plgpu.barrier_wait(scratch["vectors_arrived"])
        values = {n: named[n][0] for n in constants}
        values |= {n: functools.partial(shape.vector, scratch[f"vector:{n}"]) for n in vectors}

        def where(step: Any) -> tuple[Any, Any]:
            """The first row of the step's group, and of the step within that."""
            group, piece = lax.div(step, jnp.int32(pieces)), lax.rem(step, jnp.int32(pieces))
            return (program + group * programs) * _GROUP, piece * plan.rows

        def fetch(step: Any, slot: Any) -> None:
            first, within = where(step)
            for n in rows:
                source = named[n].at[pl.ds(first + within, plan.rows)]
                mosaic.fetch(source, scratch[f"tile:{n}"].at[slot], scratch["arrived"].at[slot])
            for n in scalars_in:
                source = named[n].at[pl.ds(first, _GROUP)]
                mosaic.fetch(source, scratch[f"scalar:{n}"].at[slot], scratch["arrived"].at[slot])

        def group_slot(step: Any) -> Any:
            return lax.rem(lax.div(step, jnp.int32(pieces)), jnp.int32(plan.stages))

        def work(step: Any, slot: Any, totals: Any) -> Any:
            within = pl.ds(where(step)[1], plan.rows)
            refs = {n: scratch[f"tile:{n}"].at[slot] for n in tiles}
            refs |= {out: refs[at] for out, at in places.items()}
            scalars = {n: scratch[f"scalar:{n}"].at[slot, within] for n in scalars_in}
            scalars = {n: shape.scalars(ref) for n, ref in scalars.items()}
            made, totals = body(shape, values | scalars, refs, totals)
            for n in scalars_out:
                shape.put_scalars(scratch[f"scalar:{n}"].at[group_slot(step), within], made[n])
            return totals

        def store(step: Any, slot: Any) -> None:
            first, within = where(step)
            for n in moved_out:
                target = named[n].at[pl.ds(first + within, plan.rows)]
                mosaic.store(scratch[f"tile:{places[n]}"].at[slot], target)

            @pl.when(within + plan.rows == _GROUP)
            def _scalars() -> None:
                for n in scalars_out:
                    source = scratch[f"scalar:{n}"].at[group_slot(step)]
                    mosaic.store(source, named[n].at[pl.ds(first, _GROUP)])

        totals = mosaic.ring(
            groups * pieces, plan.stages, scratch["arrived"], fetch, work, store,
            tuple(shape.full(0.0) for _ in sums),
        )  # fmt: skip
        for j, total in enumerate(totals):
            # Through the place of a weight that nothing reads any more.
            passing = scratch[f"vector:{next(iter(vectors))}"]
            passing[...] = total
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(passing, named["sums"].at[j, program])
            plgpu.wait_smem_to_gmem(0)

    results = mosaic.kernel(
        kernel, out_type=list(out_type.values()), scratch=scratch, grid={"program": programs},
        interpret=interpret, name=body.NAME,
    )(*inputs.values())  # fmt: skip
    by_name = dict(zip(out_type, results, strict=True))
    totals = jnp.sum(by_name["sums"], axis=1) if sums else ()
    return (
        {n: by_name[n][:m] for n in moved_out},
        {n: by_name[n][:m, None] for n in scalars_out},
        dict(zip(sums, totals, strict=True)),
    )


def _filled(a: jax.Array, rows: int, value: float) -> jax.Array:
    beyond = ((0, rows - a.shape[0]),) + ((0, 0),) * (a.ndim - 1)
    return jnp.pad(a, beyond, constant_values=value) if rows > a.shape[0] else a
