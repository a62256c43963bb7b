"""One step of a token's kernel (`token_gpu.py`): wait, quantise, multiply, finish."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..keep_nan import at_least, from_magnitude, magnitude
from ..norm_quant.reference import MIN_ABSMAX
from ..packed_matmul.words import plane_columns
from . import inline
from .dot4 import dot4, quantize4
from .token_board import (
    Refs,
    Row,
    ask_for_norm,
    load,
    norm_weights,
    publish,
    read,
    read_some,
    shares_of_warps,
    store,
    take_off,
)
from .token_choice import Best, larger, nothing, ordered
from .token_plan import (
    LANES,
    Plan,
    Step,
    groups,
    places,
    tiling,
    word_numbers,
)

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
    tiles = tiling(plan, step).tiles
    matrices = 1 + max(matrix for matrix, _ in step.streams)
    norm = functools.partial(ask_for_norm, refs, plan, layer=layer, columns=step.columns)
    return Bundle(
        [_load_tile(refs, plan, step, layer, i) for i in range(min(plan.cut.depth, tiles))],
        norm(step.norm) if step.norm else None,
        [norm(f"{name}/norms/{i}") for i in range(matrices)],
        [refs[f"{name}/scales/{i}"][layer, 0, 0] for i in range(matrices)],
    )


def _share(refs: Refs, plan: Plan, step: Step, tile: Any) -> tuple[Any, Any]:
    """First output of this program's tile, and the end of its share."""
    p, programs = refs["program"], plan.cut.programs
    first = p * step.rows // programs + tile * tiling(plan, step).rows
    return first, (p + 1) * step.rows // programs


def _outputs(refs: Refs, plan: Plan, step: Step, tile: Any) -> tuple[jax.Array, jax.Array]:
    """The outputs that threads finish, one each in the first warp, and which exist."""
    first, end = _share(refs, plan, step, tile)
    place = places(plan)
    return first + place, (place < tiling(plan, step).rows) & (first + place < end)


def _load_tile(refs: Refs, plan: Plan, step: Step, layer: Any, tile: Any) -> _Tile:
    first, end = _share(refs, plan, step, tile)
    _, rows, each = tiling(plan, step)
    certain = step.rows // plan.cut.programs  # rows that every share has
    threads = places(plan).size // groups(plan, step.columns)

    def row(matrix: int, first_row: int, number: Any) -> list[jax.Array]:
        number = number + each * (places(plan) // threads)
        last = tile * rows + rows - 1 if isinstance(tile, int) else certain
        out = []
        for word, inside in word_numbers(plan, step.columns):
            masks = [] if inside is None else [inside]
            if last >= certain:
                masks.append(first + number < end)
            mask = functools.reduce(jnp.logical_and, masks) if masks else None
            index = (layer, first + first_row + number, word)
            out.append(load(plan, refs[f"{step.name}/words/{matrix}"], index, mask))
        return out

    words = [[row(*stream, number) for number in range(each)] for stream in step.streams]
    n, inside = _outputs(refs, plan, step, tile)
    if step.name == "mixer_in":
        extras = [load(plan, refs["new_h"], (layer, 0, n), inside, written=True)]
        for name in ("lower_bound", "gate_norm"):
            extras.append(load(plan, refs[name], (layer, n), inside))
    elif step.name == "mixer_out":
        extras = [read_some(refs, plan, "x", layer, n, inside)]
    elif step.name == "glu_out":
        extras = [read_some(refs, plan, "middle", layer, n, inside)]
    else:
        extras = []
    return _Tile(words, extras)


def fetch(
    refs: Refs, plan: Plan, name: str, layer: Any, tile: Any, patience: Any, now: Any = None
) -> Any:
    """Asks for a tile to come to the L2 cache, where it exists.

    `now`, bool: the whole share instead, where true.
    """
    step = plan.steps[name]
    words = plane_columns(step.columns) // 4
    if plan.emulate or not plan.cut.ahead or words % 4:
        return patience
    first, end = _share(refs, plan, step, tile)
    place = places(plan)
    rows = end - first
    rows = jnp.clip(rows, 0, tiling(plan, step).rows) if now is None else jnp.where(now, rows, 0)
    size = 4 * words * rows
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
) -> tuple[jax.Array, Any, Best]:  # fmt: skip
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
      What is left of the patience, the result of `then`, and the largest output that each
      thread has finished.
    """
    step = plan.steps[name]
    at = jnp.int32(plan.layers) if name == "head" else layer
    # Before the wait: they are there already.
    outer = None
    if step.norm is not None:
        outer = _flat(norm_weights(refs, plan, step.norm, bundle.outer))
    norms = [
        _flat(norm_weights(refs, plan, f"{name}/norms/{i}", asked))
        for i, asked in enumerate(bundle.norms)
    ]
    values, patience = read(refs, plan, step.inputs, at, step.columns, patience)
    inputs = _quantize(refs, plan, step, [_flat(row) for row in values], outer, norms)
    tiles = tiling(plan, step).tiles

    def finish(tile: _Tile, index: Any, best: Best) -> Best:
        n, inside = _outputs(refs, plan, step, index)
        own = [inputs[matrix] for matrix, _ in step.streams]
        results = []
        for (matrix, _), y in zip(
            step.streams, _products(refs, plan, step, own, tile.words, index), strict=True
        ):
            y = y.astype(jnp.float32) * ((inputs[matrix][2] / 127.0) * bundle.scales[matrix])
            results.append(y.astype(plan.dtype).astype(jnp.float32))
        _finish(refs, plan, step, layer, n, inside, results, tile.extras)
        return larger(best, Best(ordered(results[0]), n), inside) if name == "head" else best

    def advance(index: Any, carry: Any) -> Any:
        queue, patience, best = carry
        if name != "head":  # It comes as a whole, in time.
            patience = fetch(refs, plan, name, layer, index + plan.cut.ahead, patience)
        following = _load_tile(refs, plan, step, layer, index + len(queue))
        best = finish(queue[0], index, best)
        return [*queue[1:], following], patience, best

    queue, best = bundle.tiles, nothing(plan)
    rounds = tiles - len(queue)
    if rounds > 2:
        queue, patience, best = jax.lax.fori_loop(0, rounds, advance, (queue, patience, best))
    else:
        for index in range(rounds):
            queue, patience, best = advance(index, (queue, patience, best))
    for ahead, tile in enumerate(queue):
        best = finish(tile, rounds + ahead, best)
    # Behind the last results, which others wait for; the loads go on while this program waits.
    return patience, then(), best


def _totals(
    refs: Refs, plan: Plan, step: Step, maxima: Sequence[jax.Array], sums: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Largest magnitudes and sums over all threads, float32, in every thread.

    `maxima` are bits (`keep_nan.magnitude`), of which a warp finds the largest by one instruction.
    """
    bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.int32)
    floats = functools.partial(jax.lax.bitcast_convert_type, new_dtype=jnp.float32)
    shape = places(plan).shape

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, None], shape)

    of_warp = [spread(jnp.max(x, axis=1)) for x in maxima]
    of_warp += [spread(bits(jnp.sum(x, axis=1))) for x in sums]
    shares = shares_of_warps(refs, plan, of_warp, plan.cut.warps // groups(plan, step.columns))
    largest = [from_magnitude(_tree(jnp.maximum, xs)) for xs in shares[: len(maxima)]]
    return largest, [_tree(jnp.add, [floats(x) for x in xs]) for xs in shares[len(maxima) :]]


def _flat(row: Row) -> list[jax.Array]:
    return [x for piece in row for plane in piece for x in plane]


def _quantize(
    refs: Refs, plan: Plan, step: Step, values: Sequence[list[jax.Array]],
    outer: list[jax.Array] | None, norms: Sequence[list[jax.Array]],
) -> Any:  # fmt: skip
    """The quantised input of each matrix: planes [word][plane], minus their sums, the absmax."""
    x, u = values[0], values[-1]
    if outer is not None:
        u = [v * w for v, w in zip(x, outer, strict=True)]
    # mean((r u)^2) is r^2 mean(u^2): all sums and largest elements in one exchange.
    normed = outer is not None or len(values) > 1
    squares = [_squares(row) for row in ([u, x] if normed else [u])]
    weighed = [[v * w for v, w in zip(u, norm, strict=True)] for norm in norms]
    sizes = [_tree(jnp.maximum, [magnitude(v) for v in n]) for n in weighed]
    largest, squares = _totals(refs, plan, step, sizes, squares)
    means = [total * (1.0 / step.columns) for total in squares]
    inverse: Any = 1.0
    if normed:
        inverse = jax.lax.rsqrt(means[1] + plan.outer_eps)
    inverse = inverse * jax.lax.rsqrt(inverse * inverse * means[0] + plan.eps)
    out = []
    for n, size in zip(weighed, largest, strict=True):
        absmax = at_least(size * inverse, MIN_ABSMAX)
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


def _products(
    refs: Refs, plan: Plan, step: Step, inputs: Sequence[Any], tile: Any, phase: Any
) -> list[jax.Array]:
    """The integers of each stream of a tile, row r in lane r of the first warp.

    `inputs` are each stream's planes, and minus their sum.
    """
    warps = plan.cut.warps
    shape = places(plan).shape
    lane = jnp.arange(LANES)[None, :]
    each = len(tile[0])
    # With several warps all streams go through one exchange, side by side where they have room.
    together = warps > 1 and each * len(tile) <= LANES and not plan.emulate
    outs = []
    for number, ((planes, start, _), words) in enumerate(zip(inputs, tile, strict=True)):
        if not (together and number):
            outs.append(jnp.zeros(shape, jnp.int32))
        for row, pieces in enumerate(words):
            total = start
            for word, quads in zip(pieces, planes, strict=True):
                for plane, x in enumerate(quads):
                    codes = (word >> (2 * plane)) & 0x03030303
                    total = dot4(x, codes, total, emulate=plan.emulate)
            total = jnp.broadcast_to(jnp.sum(total, axis=1)[:, None], shape)
            outs[-1] = jnp.where(lane == row + (each * number if together else 0), total, outs[-1])
    if warps == 1:
        return outs
    count = warps // groups(plan, step.columns)
    if plan.emulate:
        return [_emulated_join(out, count, each) for out in outs]
    row = jnp.minimum(places(plan) % LANES, warps // count * each - 1)
    place = (row // each) * (count * LANES) + row % each
    apart = each if together else warps * LANES
    wanted = [place + apart * number for number in range(len(tile))]
    shares = inline.exchange(refs["board"], outs, wanted, count, phase)
    return [_tree(jnp.add, xs) for xs in shares]


def _emulated_join(out: jax.Array, count: int, each: int) -> jax.Array:
    """The sums over `count` warps of each group, the groups' rows behind one another."""
    warps, lanes = out.shape
    rows = jnp.sum(out.reshape(-1, count, lanes), axis=1)[:, :each].reshape(-1)
    return jnp.broadcast_to(jnp.pad(rows, (0, lanes - rows.size))[None, :], (warps, lanes))


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _finish(
    refs: Refs, plan: Plan, step: Step, layer: Any, n: jax.Array, inside: jax.Array,
    results: list[jax.Array], extras: list[jax.Array],
) -> None:  # fmt: skip
    """What follows the products of one tile."""
    write = functools.partial(publish, refs, plan, layer=layer, n=n, inside=inside)
    clear = functools.partial(take_off, refs, plan, layer=layer, n=n, inside=inside)
    if step.name == "mixer_in":
        i, f, g = results
        before, bound, weight = extras
        forget = bound + (1.0 - bound) / (1.0 + jnp.exp(-f))
        new = forget * before + _silu(i) * ((1.0 - bound) / (1.0 + jnp.exp(f)))
        write("g", y=g)
        silu = _silu(new.astype(plan.dtype).astype(jnp.float32))
        write("u", y=g * weight * silu)
        store(plan, refs["new_h"], (layer, 0, n), new, inside)
        clear("g")
        clear("u")
    elif step.name == "glu_in":
        gate, up = results
        write("z", y=(_silu(gate) * up).astype(plan.dtype))
        clear("z")
    elif step.name == "head":
        store(plan, refs["logits"], (0, n), results[0], inside)
    else:
        (y,), (before,) = results, extras
        # The stream is rounded once, after the addition, as the model does.
        out = before.astype(plan.residual_dtype) + y.astype(plan.residual_dtype)
        value = "middle" if step.name == "mixer_out" else "out"
        write(value, y=out)
        clear(value)
