"""One step of a token's kernel (`token_gpu.py`): wait, quantise, multiply, finish."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.norm_quant.reference import MIN_ABSMAX
from pallas_kernels.packed_matmul import inline
from pallas_kernels.packed_matmul.dot4 import dot4, quantize4
from pallas_kernels.packed_matmul.token_board import (
    Refs,
    Row,
    ask_for_norm,
    load,
    norm_weights,
    publish,
    read,
    read_some,
    store,
)
from pallas_kernels.packed_matmul.token_plan import Plan, Step, places, tiling, word_numbers
from pallas_kernels.packed_matmul.words import plane_columns

_ONES = 0x01010101


class _Tile(NamedTuple):
    """Weights [stream][row][word], and what a tile's outputs are combined with."""

    words: Any
    extras: Any


class Bundle(NamedTuple):
    """What a step reads besides its input: the first tiles, norms and scales."""

    tiles: list[_Tile]
    outer: Any
    norms: Any
    scales: list[jax.Array]


# --- weights, asked for ahead of time ---------------------------------------------------------


def prefetch(refs: Refs, plan: Plan, name: str, layer: Any) -> Bundle:
    """Starts the loads of a step."""
    step = plan.steps[name]
    _, tiles = tiling(plan, step)
    matrices = 1 + max(matrix for matrix, _ in step.streams)
    norm = functools.partial(ask_for_norm, refs, plan, layer=layer, columns=step.columns)
    return Bundle(
        [_load_tile(refs, plan, step, layer, i) for i in range(min(plan.config.depth, tiles))],
        norm(step.norm) if step.norm else None,
        [norm(f"{name}/norms/{i}") for i in range(matrices)],
        [refs[f"{name}/scales/{i}"][layer, 0, 0] for i in range(matrices)],
    )


def _share(refs: Refs, plan: Plan, step: Step, tile: Any) -> tuple[Any, Any]:
    """First output of this program's tile, and the end of its share."""
    p, programs = refs["program"], plan.config.programs
    rows, _ = tiling(plan, step)
    return p * step.rows // programs + tile * rows, (p + 1) * step.rows // programs


def _outputs(refs: Refs, plan: Plan, step: Step, tile: Any) -> tuple[jax.Array, jax.Array]:
    """The outputs that threads finish, one each in the first warp, and which exist."""
    first, end = _share(refs, plan, step, tile)
    rows, _ = tiling(plan, step)
    place = places(plan)
    return first + place, (place < rows) & (first + place < end)


def _load_tile(refs: Refs, plan: Plan, step: Step, layer: Any, tile: Any) -> _Tile:
    first, end = _share(refs, plan, step, tile)
    rows, _ = tiling(plan, step)
    certain = step.rows // plan.config.programs  # rows that every share has

    def row(matrix, first_row, number):
        exists = jnp.broadcast_to(first + number < end, places(plan).shape)
        out = []
        for word, inside in word_numbers(plan, step.columns):
            masks = [] if inside is None else [inside]
            if not (isinstance(tile, int) and tile * rows + number < certain):
                masks.append(exists)
            mask = functools.reduce(jnp.logical_and, masks) if masks else None
            index = (layer, first + first_row + number, word)
            out.append(load(plan, refs[f"{step.name}/words/{matrix}"], index, mask))
        return out

    words = [[row(*stream, number) for number in range(rows)] for stream in step.streams]
    n, inside = _outputs(refs, plan, step, tile)
    if step.name == "mixer_in":
        extras = [load(plan, refs["h"], (layer, 0, n), inside)]
        for name in ("lower_bound", "gate_norm"):
            extras.append(load(plan, refs[name], (layer, n), inside))
    elif step.name == "mixer_out":
        extras = [read_some(refs, plan, "x", layer, n, inside)]
    elif step.name == "glu_out":
        extras = [read_some(refs, plan, "middle", layer, n, inside)]
    else:
        extras = []
    return _Tile(words, extras)


def fetch(refs: Refs, plan: Plan, name: str, layer: Any, tile: Any, patience: Any) -> Any:
    """Asks for a tile to come to the L2 cache, where it exists."""
    step = plan.steps[name]
    words = plane_columns(step.columns) // 4
    if plan.emulate or not plan.config.ahead or words % 4:
        return patience
    first, end = _share(refs, plan, step, tile)
    rows, _ = tiling(plan, step)
    place = places(plan)
    size = 4 * words * jnp.clip(end - first, 0, rows)
    for matrix, first_row in step.streams:
        ref = refs[f"{name}/words/{matrix}"]
        at = (layer * ref.shape[1] + first + first_row) * words
        patience = inline.fetch(
            ref, jnp.broadcast_to(at, place.shape), jnp.where(place == 0, size, 0), patience
        )
    return patience


# --- one step ---------------------------------------------------------------------------------


def run(
    refs: Refs, plan: Plan, name: str, layer: Any, bundle: Bundle,
    then: Callable[[], Any], patience: jax.Array,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """Waits for a step's input and makes this program's outputs.

    Args:
      refs: the kernel's arrays, and "program".
      plan: of the kernel.
      name: of the step.
      layer: its number.
      bundle: from `prefetch`.
      then: starts the loads of the step that follows.
      patience: [warps, 32] int32, looks at the board that each thread has left.

    Returns:
      What is left of the patience, and the result of `then`.
    """
    step = plan.steps[name]
    at = jnp.int32(plan.layers) if name == "head" else layer
    values, patience = read(refs, plan, step.inputs, at, step.columns, patience)
    inputs = _quantize(refs, plan, step, values, bundle)
    _, tiles = tiling(plan, step)

    def finish(tile: _Tile, index: Any) -> None:
        n, inside = _outputs(refs, plan, step, index)
        results = []
        for (matrix, _), words in zip(step.streams, tile.words, strict=True):
            planes, start, absmax = inputs[matrix]
            y = _product(plan, planes, start, words).astype(jnp.float32)
            y = y * ((absmax / 127.0) * bundle.scales[matrix])
            results.append(y.astype(plan.dtype).astype(jnp.float32))
        _finish(refs, plan, step, layer, n, inside, results, tile.extras)

    def advance(index: Any, carry: Any) -> Any:
        queue, patience = carry
        patience = fetch(refs, plan, name, layer, index + plan.config.ahead, patience)
        following = _load_tile(refs, plan, step, layer, index + len(queue))
        finish(queue[0], index)
        return [*queue[1:], following], patience

    queue = bundle.tiles
    rounds = tiles - len(queue)
    if rounds > 2:
        queue, patience = jax.lax.fori_loop(0, rounds, advance, (queue, patience))
    else:
        for index in range(rounds):
            queue, patience = advance(index, (queue, patience))
    for ahead, tile in enumerate(queue):
        finish(tile, rounds + ahead)
    # Behind the last results, which others wait for; the loads go on while this program waits.
    return patience, then()


def _totals(
    plan: Plan, maxima: Sequence[jax.Array], sums: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Largest elements and sums over all threads of float32, none negative, in every thread."""
    # Of floats that are not negative the bits are in the same order. Over integers a warp has
    # one instruction for the maximum and one for the sum, of which all but one may be 0.
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    floats = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    shape = places(plan).shape
    warps, lanes = shape

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, None], shape)

    of_warp = [spread(jnp.max(bits(x), axis=1)) for x in maxima]
    of_warp += [spread(bits(jnp.sum(x, axis=1))) for x in sums]
    if warps > 1:
        # Each exchange between warps has a lane for each warp's share of some quantities.
        warp, lane = jnp.arange(warps)[:, None], jnp.arange(lanes)[None, :]
        shares, of_warp, together = of_warp, [], lanes // warps
        for first in range(0, len(shares), together):
            table = jnp.zeros(shape, jnp.int32)
            for number, share in enumerate(shares[first : first + together]):
                table = jnp.where(lane == number * warps + warp, share, table)
            table = jnp.broadcast_to(jnp.sum(table, axis=0)[None, :], shape)
            for number in range(len(shares[first : first + together])):
                start = number * warps
                if first + number < len(maxima):
                    own = (lane >= start) & (lane < start + warps)
                    of_warp.append(spread(jnp.max(jnp.where(own, table, 0), axis=1)))
                    continue
                parts = [
                    floats(spread(jnp.sum(jnp.where(lane == start + w, table, 0), axis=1)))
                    for w in range(warps)
                ]
                of_warp.append(bits(_tree(jnp.add, parts)))
    totals = [floats(x) for x in of_warp]
    return totals[: len(maxima)], totals[len(maxima) :]


def _quantize(refs: Refs, plan: Plan, step: Step, values: Sequence[Row], bundle: Bundle) -> Any:
    """The quantised input of each matrix: planes [word][plane], minus their sums, the absmax."""

    def flat(row):
        return [x for piece in row for plane in piece for x in plane]

    x = flat(values[0])
    u = flat(values[-1])
    if bundle.outer is not None:
        assert step.norm is not None
        weights = flat(norm_weights(refs, plan, step.norm, bundle.outer))
        u = [v * w for v, w in zip(x, weights, strict=True)]
    # mean((r u)^2) is r^2 mean(u^2): all sums and largest elements in one exchange.
    outer = bundle.outer is not None or len(values) > 1
    squares = [_squares(row) for row in ([u, x] if outer else [u])]
    norms = [
        flat(norm_weights(refs, plan, f"{step.name}/norms/{i}", asked))
        for i, asked in enumerate(bundle.norms)
    ]
    weighed = [[v * w for v, w in zip(u, norm, strict=True)] for norm in norms]
    sizes = [_tree(jnp.maximum, [jnp.abs(v) for v in n]) for n in weighed]
    largest, squares = _totals(plan, sizes, squares)
    means = [total * (1.0 / step.columns) for total in squares]
    inverse: Any = 1.0
    if outer:
        inverse = jax.lax.rsqrt(means[1] + plan.outer_eps)
    inverse = inverse * jax.lax.rsqrt(inverse * inverse * means[0] + plan.eps)
    out = []
    for n, size in zip(weighed, largest, strict=True):
        absmax = jnp.maximum(size * inverse, MIN_ABSMAX)
        factor = inverse * (127.0 / absmax)
        quads = [quantize4(n[i : i + 4], factor, emulate=plan.emulate) for i in range(0, len(n), 4)]
        # The codes are trits plus one: the sum of x is taken off in advance.
        ones = jnp.full(quads[0].shape, _ONES, jnp.int32)
        start = jnp.zeros(quads[0].shape, jnp.int32)
        for x in quads:
            start = dot4(x, ones, start, emulate=plan.emulate)
        out.append(([quads[i : i + 4] for i in range(0, len(quads), 4)], -start, absmax))
    return out


def _tree(combine: Callable[..., jax.Array], xs: list[jax.Array]) -> jax.Array:
    """All combined, in few steps one after another."""
    while len(xs) > 1:
        pairs = [combine(a, b) for a, b in zip(xs[::2], xs[1::2], strict=False)]
        xs = pairs + xs[2 * len(pairs) :]
    return xs[0]


def _squares(xs: list[jax.Array]) -> jax.Array:
    """The sum of squares: four chains of products with an addition each."""
    totals = [x * x for x in xs[:4]]
    for number, x in enumerate(xs[4:]):
        totals[number % 4] = totals[number % 4] + x * x
    return _tree(jnp.add, totals)


def _product(plan: Plan, planes: Any, start: jax.Array, rows: Any) -> jax.Array:
    """The integers of one stream of a tile, row r in lane r: [warps, 32] int32."""
    lane = jnp.arange(places(plan).shape[1])[None, :]
    out = jnp.zeros(start.shape, jnp.int32)
    for number, words in enumerate(rows):
        total = start
        for word, quads in zip(words, planes, strict=True):
            for plane, x in enumerate(quads):
                codes = (word >> (2 * plane)) & 0x03030303
                total = dot4(x, codes, total, emulate=plan.emulate)
        total = jnp.broadcast_to(jnp.sum(total, axis=1)[:, None], out.shape)
        out = jnp.where(lane == number, total, out)
    if plan.config.warps > 1:
        out = jnp.broadcast_to(jnp.sum(out, axis=0)[None, :], out.shape)
    return out


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _finish(
    refs: Refs, plan: Plan, step: Step, layer: Any, n: jax.Array, inside: jax.Array,
    results: list[jax.Array], extras: list[jax.Array],
) -> None:  # fmt: skip
    """What follows the products of one tile."""
    write = functools.partial(publish, refs, plan, layer=layer, n=n, inside=inside)
    if step.name == "mixer_in":
        i, f, g = results
        before, bound, weight = extras
        forget = bound + (1.0 - bound) / (1.0 + jnp.exp(-f))
        new = forget * before + _silu(i) * ((1.0 - bound) / (1.0 + jnp.exp(f)))
        write("g", y=g)
        silu = _silu(new.astype(plan.dtype).astype(jnp.float32))
        write("u", y=g * weight * silu)
        held = jnp.broadcast_to(refs["held"][0], new.shape) != 0
        store(plan, refs["new_h"], (layer, 0, n), jnp.where(held, before, new), inside)
    elif step.name == "glu_in":
        gate, up = results
        write("z", y=(_silu(gate) * up).astype(plan.dtype))
    elif step.name == "head":
        store(plan, refs["logits"], (0, n), results[0], inside)
    else:
        (y,), (before,) = results, extras
        # The stream is rounded once, after the addition, as the model does.
        out = before.astype(plan.residual_dtype) + y.astype(plan.residual_dtype)
        write("middle" if step.name == "mixer_out" else "out", y=out)
