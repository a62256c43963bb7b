"""One token through the whole model in one GPU kernel.

A layer is four steps, each a matrix-vector product whose inputs are all outputs of the step
before. As kernels of their own they spend most of their time on starting and on waiting for
memory. Here one program a multiprocessor stays for the whole token:

    mixer_in   RMSNorm, {i, f, g}, the gates and the recurrence  -> g, state
    mixer_out  RMSNorm(g) silu(state), o, residual               -> stream
    glu_in     RMSNorm, gate and up, SwiGLU                      -> z
    glu_out    down, residual                                    -> stream
    head       final RMSNorm, head                               -> logits

Every program owns an equal share of the rows of each matrix. It asks for the weights of a step
before the step's input exists, so that memory is read while programs wait for each other.

Programs meet on a board, one int32 for each value that crosses between them (the value's
float32 bits). The board starts as `EMPTY`; a reader looks again until nothing that it needs is
empty, so that the data is its own flag and one trip through the L2 cache passes it on. All
programs must run at the same time: one a multiprocessor does. A wait that never ends gives NaN
logits rather than hang.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.norm_quant.reference import MIN_ABSMAX
from pallas_kernels.packed_matmul.dot4 import dot4, round_half_even
from pallas_kernels.packed_matmul.fused_gpu import Layer
from pallas_kernels.packed_matmul.words import plane_columns

EMPTY = -1  # the bits of a NaN that arithmetic never makes
_NAN = 0x7FC00000
_MAX_POLLS = 1 << 20  # of all waits of one program together: about a second


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel is cut.

    Attributes:
      programs: at most as many as run at the same time on the device.
      warps: of a program.
      tile: words of weights in a tile, for each thread.
      depth: tiles that are on their way while one is worked on.
      flags: look at a word from each program before looking at the data.
    """

    programs: int = 132
    warps: int = 8
    tile: int = 24
    depth: int = 1
    flags: bool = True


class Model(NamedTuple):
    """Weights, stacked over the layers (one "layer" for the head).

    Attributes:
      mixer_in: i, f and g.
      mixer_out: o.
      glu_in: gate and up, one matrix of 2M rows.
      glu_out: down.
      head: the head.
      mixer_norm, gate_norm, glu_norm: [L, columns].
      final_norm: [1, D].
      lower_bound: [L, E] float32, of the forget gates.
    """

    mixer_in: Layer
    mixer_out: Layer
    glu_in: Layer
    glu_out: Layer
    head: Layer
    mixer_norm: jax.Array
    gate_norm: jax.Array
    glu_norm: jax.Array
    final_norm: jax.Array
    lower_bound: jax.Array


class _Step(NamedTuple):
    """One of the five products.

    Attributes:
      name: and that of its weights in `Model`.
      norm: name of the norm in front.
      columns: K.
      rows: outputs, each from one row of each stream.
      streams: (matrix, first row) of the rows that are read side by side.
    """

    name: str
    norm: str | None
    columns: int
    rows: int
    streams: tuple[tuple[int, int], ...]


class _Plan(NamedTuple):
    """What is static in the kernel."""

    steps: dict[str, _Step]
    layers: int
    batch: int
    slots: dict[str, int]  # place of each value on the board of one layer and row
    board: int  # values on it
    eps: float
    outer_eps: float
    dtype: jnp.dtype
    residual_dtype: jnp.dtype
    config: Config
    emulate: bool


def decode_token(
    x: jax.Array,
    model: Model,
    h: jax.Array,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    config: Config,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Logits and new states after one token a row.

    Args:
      x: [B, D], the embedded tokens; its dtype is the residual stream's.
      model: weights.
      h: [L, B, E] float32 states.
      eps: of the BitLinears' norms.
      outer_eps: of the other norms.
      dtype: of the products' outputs.
      config: programs and tiles.
      interpret: run as a JAX program, step after step, to check the arithmetic without a GPU.

    Returns:
      [B, V] float32 logits, and [L, B, E] float32 states.

    Raises:
      ValueError: operands that do not fit.
    """
    layers, batch, inner = h.shape
    width = x.shape[1]
    glu = model.glu_in.words[0].shape[1] // 2
    vocabulary = model.head.words[0].shape[1]
    steps = {
        step.name: step
        for step in (
            _Step("mixer_in", "mixer_norm", width, inner, ((0, 0), (1, 0), (2, 0))),
            _Step("mixer_out", "gate_norm", inner, width, ((0, 0),)),
            _Step("glu_in", "glu_norm", width, glu, ((0, 0), (0, glu))),
            _Step("glu_out", None, glu, width, ((0, 0),)),
            _Step("head", "final_norm", width, vocabulary, ((0, 0),)),
        )
    }
    for step in steps.values():
        for words in getattr(model, step.name).words:
            if words.shape[2] != plane_columns(step.columns) // 4:
                raise ValueError(
                    f"{step.name} has words {words.shape}, but {step.columns} columns need "
                    f"{plane_columns(step.columns) // 4}"
                )
    flags = {f"{step} done": config.programs for step in list(steps)[:4]}
    sizes = {"g": inner, "h": inner, "middle": width, "z": glu, **flags, "out": width}
    starts = [sum(list(sizes.values())[:i]) for i in range(len(sizes))]
    plan = _Plan(
        steps, layers, batch, dict(zip(sizes, starts, strict=True)), sum(sizes.values()),
        float(eps), float(outer_eps), jnp.dtype(dtype), x.dtype, config, interpret,
    )  # fmt: skip
    operands = {"h": h}
    for name, value in model._asdict().items():
        if isinstance(value, Layer):
            for field, arrays in value._asdict().items():
                operands |= {f"{name}/{field}/{i}": array for i, array in enumerate(arrays)}
        else:
            operands[name] = value
    # The board has a layer of its own for the embedded tokens, the "out" of layer -1.
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    done = jnp.zeros((batch, config.programs), jnp.int32)
    before = jnp.full((batch, plan.slots["glu_out done"]), EMPTY, jnp.int32)
    after = jnp.full((layers * batch, plan.board), EMPTY, jnp.int32)
    operands["board_in"] = jnp.concatenate(
        [jnp.concatenate([before, done, bits], 1), after]
    ).reshape(-1)
    results = {
        "logits": jax.ShapeDtypeStruct((batch, vocabulary), jnp.float32),
        "board": jax.ShapeDtypeStruct(operands["board_in"].shape, jnp.int32),
    }

    def kernel(*refs):
        _kernel(dict(zip([*operands, *results], refs, strict=True)), plan)

    grid = (config.programs,)
    if interpret:  # Programs run one after another: a step must be over before the next begins.
        grid = (4 * layers + 1, config.programs)
    logits, board = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=grid,
        input_output_aliases={len(operands) - 1: 1},
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="decode_token",
    )(*operands.values())
    start = plan.slots["h"]
    bits = board.reshape(layers + 1, batch, plan.board)[1:, :, start : start + inner]
    h = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return logits, h


def _kernel(refs: dict[str, Any], plan: _Plan) -> None:
    # Read once, here: the interpreter knows program numbers outside conditionals only.
    refs["program"] = pl.program_id(1 if plan.emulate else 0)
    run = functools.partial(_run, refs, plan)
    prefetch = functools.partial(_prefetch, refs, plan)
    if plan.emulate:
        phase = pl.program_id(0)
        for number, name in enumerate(("mixer_in", "mixer_out", "glu_in", "glu_out", "head")):
            layer = 0 if name == "head" else phase // 4
            last = phase == 4 * plan.layers
            now = last if name == "head" else (phase % 4 == number) & ~last

            @pl.when(now)
            def _(name=name, layer=layer):
                run(name, layer, prefetch(name, layer), lambda: None, jnp.int32(1))

        return

    def body(layer, carry):
        patience, bundle = carry
        for name, following in (
            ("mixer_in", "mixer_out"),
            ("mixer_out", "glu_in"),
            ("glu_in", "glu_out"),
            ("glu_out", "mixer_in"),
        ):
            at = layer if following != "mixer_in" else jnp.minimum(layer + 1, plan.layers - 1)
            then = functools.partial(prefetch, following, at)
            patience, bundle = run(name, layer, bundle, then, patience)
        return patience, bundle

    patience, _ = jax.lax.fori_loop(
        0, plan.layers, body, (jnp.int32(_MAX_POLLS), prefetch("mixer_in", jnp.int32(0)))
    )
    run("head", 0, prefetch("head", 0), lambda: None, patience)


# --- the shape of a step ---------------------------------------------------------------------


def _tiling(plan: _Plan, step: _Step) -> tuple[int, int]:
    """Rows of a tile, a power of two, and tiles of a program's share."""
    share = pl.cdiv(step.rows, plan.config.programs)
    a_row = pl.next_power_of_2(plane_columns(step.columns) // 4) * len(step.streams)
    rows = pl.next_power_of_2(share)
    while rows > 1 and rows * a_row > plan.config.tile * 32 * plan.config.warps:
        rows //= 2
    return rows, pl.cdiv(share, rows)


def _share(refs: dict[str, Any], plan: _Plan, step: _Step, tile: Any) -> tuple[Any, Any]:
    """The outputs of this program's tile, and which of them exist."""
    p = refs["program"]
    rows, _ = _tiling(plan, step)
    programs = plan.config.programs
    n = p * step.rows // programs + tile * rows + jnp.arange(rows)
    return n, n < (p + 1) * step.rows // programs


def _columns(step: _Step) -> list[tuple[jax.Array, jax.Array | None]]:
    """Column numbers [words, 4] of each plane, and which exist (None: all)."""
    words = plane_columns(step.columns) // 4
    padded = pl.next_power_of_2(words)
    word, byte = jnp.arange(padded)[:, None], jnp.arange(4)[None, :]
    columns = [plane * 4 * words + 4 * word + byte for plane in range(4)]
    if padded == words and 16 * words == step.columns:
        return [(c, None) for c in columns]
    return [(c, (word < words) & (c < step.columns)) for c in columns]


def _load(ref: Any, mask: Any, **options: Any) -> jax.Array:
    other = None if mask is None else 0
    return pltriton.load(ref, mask=mask, other=other, **options)


# --- weights, asked for ahead of time ---------------------------------------------------------


class _Bundle(NamedTuple):
    """What a step reads besides its input."""

    tiles: Any
    outer: Any
    norms: Any


def _prefetch(refs: dict[str, Any], plan: _Plan, name: str, layer: Any) -> _Bundle:
    step = plan.steps[name]
    columns = _columns(step)

    def norm(ref):
        return [_load(ref.at[layer, c], mask) for c, mask in columns]

    depth = min(plan.config.depth, _tiling(plan, step)[1])
    tiles = [_load_tile(refs, plan, step, layer, index) for index in range(depth)]
    matrices = 1 + max(matrix for matrix, _ in step.streams)
    return _Bundle(
        tiles,
        norm(refs[step.norm]) if step.norm else None,
        [norm(refs[f"{name}/norms/{i}"]) for i in range(matrices)],
    )


def _load_tile(refs: dict[str, Any], plan: _Plan, step: _Step, layer: Any, tile: Any) -> Any:
    """Weights of a tile, one tensor a stream, and what its outputs are combined with."""
    n, inside = _share(refs, plan, step, tile)
    words = plane_columns(step.columns) // 4
    place = jnp.arange(pl.next_power_of_2(words))[None, :]
    mask = inside[:, None]
    if place.size > words:
        mask = mask & (place < words)
    weights = [
        pltriton.load(
            refs[f"{step.name}/words/{matrix}"].at[layer, n[:, None] + first_row, place],
            mask=mask,
            other=0,
        )
        for matrix, first_row in step.streams
    ]
    extras = []
    for b in range(plan.batch):
        if step.name == "mixer_in":
            h = _load(refs["h"].at[layer, b, n], inside)
            extras.append((h, _load(refs["lower_bound"].at[layer, n], inside)))
        elif step.name == "mixer_out":
            extras.append((_board(refs, plan, "x", layer, b, n, inside),))
        elif step.name == "glu_out":
            extras.append((_board(refs, plan, "middle", layer, b, n, inside),))
        else:
            extras.append(())
    return weights, extras


# --- the board --------------------------------------------------------------------------------


def _place(plan: _Plan, value: str, layer: Any, b: int, n: Any) -> Any:
    """Where element n of a value stands; "x" is the stream in front of a layer."""
    if value == "x":
        return _place(plan, "out", layer - 1, b, n)
    return ((layer + 1) * plan.batch + b) * plan.board + plan.slots[value] + n


def _board(refs, plan: _Plan, value: str, layer, b: int, n, mask) -> jax.Array:
    """Bits on the board; the value is there already."""
    # Volatile loads go past the L1 cache, which does not see what other programs write.
    return _load(refs["board"].at[_place(plan, value, layer, b, n)], mask, volatile=True)


def _publish(refs, plan: _Plan, value: str, layer, b: int, n, inside, y) -> None:
    bits = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.int32)
    bits = jnp.where(bits == EMPTY, _NAN, bits)
    pltriton.store(refs["board"].at[_place(plan, value, layer, b, n)], bits, mask=inside)


_FEEDS = {
    "mixer_in": ("glu_out", -1),
    "mixer_out": ("mixer_in", 0),
    "glu_in": ("mixer_out", 0),
    "glu_out": ("glu_in", 0),
    "head": ("glu_out", -1),
}


def _wait(refs, plan: _Plan, step: _Step, layer, patience):
    """Until every program has said that it is done with the step before.

    A few hundred bytes to look at again and again, rather than the input itself: all programs
    looking at all of it delays the stores that they are waiting for. What is done may still be
    on its way: the reader checks.
    """
    if plan.emulate:
        return patience
    before, back = _FEEDS[step.name]
    p = jnp.arange(pl.next_power_of_2(plan.config.programs))
    place = _place(plan, f"{before} done", layer + back, 0, p)
    exists = p < plan.config.programs

    # The loops here carry no tensor that one of their two halves leaves unused: Triton's layout
    # propagation dies of it.
    def look(carry):
        patience, _ = carry
        flags = _load(refs["board"].at[place], exists, volatile=True)
        return patience - 1, jnp.max((flags == EMPTY).astype(jnp.int32))

    patience, _ = jax.lax.while_loop(
        lambda carry: (carry[1] > 0) & (carry[0] > 0), look, (patience, jnp.int32(1))
    )
    return patience


def _say_done(refs, plan: _Plan, step: _Step, layer) -> None:
    if step.name == "head":
        return
    if not plan.emulate:
        pltriton.debug_barrier()  # Every thread has stored its values.
    place = _place(plan, f"{step.name} done", layer, 0, refs["program"])
    pltriton.store(refs["board"].at[place], jnp.int32(0))


def _read(refs, plan: _Plan, step: _Step, layer, values: Sequence[str], patience):
    """The step's input, once all of it is on the board: [value][row of the batch][piece].

    Also returns what is left of the patience, looks at the board.
    """
    columns = _columns(step)
    if plan.config.flags:
        patience = _wait(refs, plan, step, layer, patience)
    places = [
        (refs["board"].at[_place(plan, value, layer, b, c)], mask)
        for value in values
        for b in range(plan.batch)
        for c, mask in columns
    ]

    def look(carry):
        patience, found = carry
        # What was found is not loaded again.
        return patience - 1, [
            pltriton.load(ref, mask=bits == EMPTY, other=bits, volatile=True)
            for (ref, _), bits in zip(places, found, strict=True)
        ]

    def waiting(carry):
        patience, found = carry
        empty = [(bits == EMPTY).astype(jnp.int32) for bits in found]
        return (_total(empty, jnp.bitwise_or, jnp.max) > 0) & (patience > 0)

    first = [_load(ref, mask, volatile=True) for ref, mask in places]
    if plan.emulate:
        found = first
    else:
        patience, found = jax.lax.while_loop(waiting, look, (patience, first))
    pieces = iter(jax.lax.bitcast_convert_type(bits, jnp.float32) for bits in found)
    return [[[next(pieces) for _ in columns] for _ in range(plan.batch)] for _ in values], patience


# --- one step ---------------------------------------------------------------------------------


def _run(refs, plan: _Plan, name: str, layer, bundle: _Bundle, then, patience):
    """Waits for a step's input and makes this program's outputs.

    `then` starts the loads of the step that follows; its result is returned.
    """
    step = plan.steps[name]
    source = {"mixer_in": ["x"], "mixer_out": ["g", "h"], "glu_in": ["middle"], "glu_out": ["z"]}
    at = jnp.int32(plan.layers) if name == "head" else layer
    values, patience = _read(refs, plan, step, at, source.get(name, ["x"]), patience)
    inputs = [
        _quantize(plan, step, [value[b] for value in values], bundle) for b in range(plan.batch)
    ]
    _, tiles = _tiling(plan, step)

    def finish(tile, index):
        weights, extras = tile
        n, inside = _share(refs, plan, step, index)
        for b in range(plan.batch):
            results = []
            for (matrix, _), words in zip(step.streams, weights, strict=True):
                planes, absmax = inputs[b][matrix]
                scale = (absmax / 127.0) * refs[f"{name}/scales/{matrix}"][layer, 0, 0]
                y = _product(plan, planes, words).astype(jnp.float32) * scale
                results.append(y.astype(plan.dtype).astype(jnp.float32))
            _finish(refs, plan, step, layer, b, n, inside, results, extras[b])

    def advance(index, queue):
        following = _load_tile(refs, plan, step, layer, index + len(queue))
        finish(queue[0], index)
        return [*queue[1:], following]

    queue = bundle.tiles
    rounds = tiles - len(queue)
    if rounds > 2:
        queue = jax.lax.fori_loop(0, rounds, advance, queue)
    else:
        for index in range(rounds):
            queue = advance(index, queue)
    for ahead, tile in enumerate(queue[:-1]):
        finish(tile, rounds + ahead)
    following = then()
    finish(queue[-1], tiles - 1)
    if plan.config.flags:
        _say_done(refs, plan, step, layer)
    return patience, following


def _total(pieces: Sequence[jax.Array], combine, reduce) -> jax.Array:
    """A reduction over all pieces; elementwise first, because one over threads costs more."""
    return reduce(reduce(functools.reduce(combine, pieces), axis=1))


def _totals(quantities: Sequence[Sequence[jax.Array]], combine, reduce) -> list[jax.Array]:
    """`_total` of up to four quantities, all in one reduction over threads."""
    if len(quantities) == 1:
        return [_total(quantities[0], combine, reduce)]
    column = jnp.arange(4)
    parts = [reduce(functools.reduce(combine, q), axis=1)[:, None] for q in quantities]
    table = jnp.broadcast_to(parts[0], (parts[0].shape[0], 4))
    for number, part in enumerate(parts[1:], start=1):
        table = jnp.where(column[None, :] == number, part, table)
    row = reduce(table, axis=0)
    zero = jnp.zeros_like(row)
    return [jnp.sum(jnp.where(column == number, row, zero)) for number in range(len(parts))]


def _quantize(plan: _Plan, step: _Step, values, bundle: _Bundle):
    """The quantised input of each matrix and its largest magnitude.

    Returns, for each matrix, four planes [words] with four int8 a word, and a scalar.
    """
    f32 = jnp.float32
    (x, *state) = values
    masks = [mask for _, mask in _columns(step)]
    u = x
    if bundle.outer is not None:
        u = [v * w.astype(f32) for v, w in zip(x, bundle.outer, strict=True)]
    if state:
        silus = [_silu(h.astype(plan.dtype).astype(f32)) for h in state[0]]
        u = [v * s for v, s in zip(u, silus, strict=True)]
    # mean((r u)^2) is r^2 mean(u^2): both norms' sums in one pass.
    squares = [[v * v for v in u]]
    if bundle.outer is not None:
        squares.append([v * v for v in x])
    means = [total * (1.0 / step.columns) for total in _totals(squares, jnp.add, jnp.sum)]
    inverse: Any = 1.0
    if bundle.outer is not None:
        inverse = jax.lax.rsqrt(means[1] + plan.outer_eps)
    inverse = inverse * jax.lax.rsqrt(inverse * inverse * means[0] + plan.eps)
    shift = 8 * jnp.arange(4)[None, :]
    weighed = [[v * w.astype(f32) for v, w in zip(u, norm, strict=True)] for norm in bundle.norms]
    sizes = [[jnp.abs(v) for v in n] for n in weighed]
    out = []
    for n, largest in zip(weighed, _totals(sizes, jnp.maximum, jnp.max), strict=True):
        absmax = jnp.maximum(largest * inverse, MIN_ABSMAX)
        factor = inverse * (127.0 / absmax)
        planes = []
        for v, mask in zip(n, masks, strict=True):
            q = round_half_even(v * factor, emulate=plan.emulate).astype(jnp.int32)
            if mask is not None:
                q = jnp.where(mask, q, 0)
            planes.append(jnp.sum((q & 255) << shift, axis=1))
        out.append((planes, absmax))
    return out


def _product(plan: _Plan, planes: Sequence[jax.Array], words: jax.Array) -> jax.Array:
    """The integers of one tile, [rows] int32."""
    own = [x[None, :] for x in planes]
    # The codes are trits plus one: the sum of x is taken off in advance.
    ones = jnp.full(own[0].shape, 0x01010101, jnp.int32)
    start = jnp.zeros(own[0].shape, jnp.int32)
    for x in own:
        start = dot4(x, ones, start, emulate=plan.emulate)
    sums = jnp.broadcast_to(-start, words.shape)
    for plane, x in enumerate(own):
        codes = (words >> (2 * plane)) & 0x03030303
        sums = dot4(jnp.broadcast_to(x, codes.shape), codes, sums, emulate=plan.emulate)
    return jnp.sum(sums, axis=1)


def _silu(x: jax.Array) -> jax.Array:
    return x / (1.0 + jnp.exp(-x))


def _finish(refs, plan: _Plan, step: _Step, layer, b: int, n, inside, results, extras) -> None:
    """What follows the products of one tile."""
    publish = functools.partial(_publish, refs, plan)
    if step.name == "mixer_in":
        i, f, g = results
        before, bound = extras
        forget = bound + (1.0 - bound) / (1.0 + jnp.exp(-f))
        new = _silu(i) * ((1.0 - bound) / (1.0 + jnp.exp(f)))
        publish("g", layer, b, n, inside, g)
        publish("h", layer, b, n, inside, forget * before + new)
    elif step.name == "glu_in":
        gate, up = results
        publish("z", layer, b, n, inside, (_silu(gate) * up).astype(plan.dtype))
    elif step.name == "head":
        pltriton.store(refs["logits"].at[b, n], results[0], mask=inside)
    else:
        (y,) = results
        before = jax.lax.bitcast_convert_type(extras[0], jnp.float32)
        # The stream is rounded once, after the addition, as the model does.
        out = before.astype(plan.residual_dtype) + y.astype(plan.residual_dtype)
        publish("middle" if step.name == "mixer_out" else "out", layer, b, n, inside, out)
