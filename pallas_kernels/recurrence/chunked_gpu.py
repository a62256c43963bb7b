"""One pass over memory for s_t = a_t s_{t-1} + b_t on a GPU: chunks of time with look-back.

Program (k, lane) owns chunk k of time for one row of the batch and `block_d` channels:

1. it reduces its chunk to a pair (A, S): product of the a_t, and state from a zero start;
2. it publishes the pair, and waits for the pairs of the chunks before it in its group and for
   the state at the start of the group, which the last chunk of the group before publishes;
3. it combines them into its own starting state, walks the chunk again from there, in registers
   or out of the cache, and writes the outputs.

Memory thus sees one read of the inputs and one write of the outputs. Programs wait only on
programs with smaller indices, which the hardware starts earlier (CUB's single-pass scan relies
on the same order); groups bound both the pairs that a program reads (< group) and the length of
the chain of waits (T / (chunk * group)). A wait that never ends writes NaN rather than hang.
The result does not depend on timing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from .. import triton as pltriton
from ..refs import Ref
from .steps import Row, Steps

_CARRY_READY = 30  # bit of a group's flag word: the state at the group's start is published
_MAX_POLLS = 1 << 24  # seconds of polling, far beyond any real wait
_WORD_BITS = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel cuts its work.

    Attributes:
      unroll: time steps in straight-line code, a power of two.
      blocks: unrolled blocks in a chunk; more than one needs reload.
      block_d: channels of a program, a power of two.
      num_warps: warps of a program.
      group: chunks in a group, at most 30.
      reload: whether step 3 reads the inputs again (from the cache) or keeps them in registers.
    """

    unroll: int = 32
    blocks: int = 1
    block_d: int = 64
    num_warps: int = 1
    group: int = 16
    reload: bool = False

    def __post_init__(self) -> None:
        for name in ("unroll", "block_d"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")
        if not 1 <= self.group <= 30:
            raise ValueError(f"group={self.group} must be between 1 and 30")
        if self.blocks > 1 and not self.reload:
            raise ValueError(f"blocks={self.blocks} needs reload=True")


def pack_bits(steps_BT: jax.Array) -> jax.Array:
    """[B, T] bool -> [B, ceil(T / 32)] int32, step t in bit t % 32 of word t // 32."""
    B, T = steps_BT.shape
    bits = jnp.pad(steps_BT, ((0, 0), (0, -T % _WORD_BITS))).reshape(B, -1, _WORD_BITS)
    words = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(_WORD_BITS, dtype=jnp.uint32), axis=2)
    return jax.lax.bitcast_convert_type(words.astype(jnp.uint32), jnp.int32)


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
    """Runs `steps` over time; see steps.py for arguments and results."""
    B, T, D = next(iter(rows.values())).shape
    chunks = pl.cdiv(T, config.unroll * config.blocks)
    groups = pl.cdiv(chunks, config.group)
    lane_programs = B * pl.cdiv(D, config.block_d)
    flags = jnp.zeros((lane_programs, groups), jnp.int32)

    inputs = {f"row:{name}": value for name, value in rows.items()}
    inputs |= {f"lane:{name}": value for name, value in (lanes or {}).items()}
    optional = {"previous": previous_BTD, "start": start_BD, "initial": initial_BD}
    inputs |= {name: value for name, value in optional.items() if value is not None}
    if reset_BT is not None:
        inputs["resets"] = pack_bits(reset_BT)
    if held_BT is not None:
        inputs["helds"] = pack_bits(held_BT)

    f32 = jnp.float32
    shapes: dict[str, tuple[tuple[int, ...], Any]]
    shapes = {f"out:{i}": ((B, T, D), dtype) for i, dtype in enumerate(steps.outputs)}
    shapes["last"] = ((B, D), f32)
    shapes |= {f"sum:{i}": ((chunks, B, D), f32) for i in range(steps.sums)}
    if chunks > 1:
        inputs["flags_in"] = flags
        shapes |= dict.fromkeys(("products", "states"), ((chunks, B, D), f32))
        shapes["carries"] = ((groups, B, D), f32)
        shapes["flags"] = (flags.shape, flags.dtype)

    names_in, names_out = list(inputs), list(shapes)
    aliases = {}
    if chunks > 1:
        aliases[names_in.index("flags_in")] = names_out.index("flags")

    def kernel(*refs: Ref) -> None:
        named = dict(zip(names_in + names_out, refs, strict=True))
        _kernel(named, steps, config, (B, T, D), interpret)

    results = pl.pallas_call(
        kernel,
        grid=(chunks * lane_programs,),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes.values()],
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(num_warps=config.num_warps, num_stages=1),
        interpret=interpret,
        name="linear_recurrence_reversed" if steps.reverse else "linear_recurrence",
    )(*inputs.values())
    by_name = dict(zip(names_out, results, strict=True))
    outputs = [by_name[f"out:{i}"] for i in range(len(steps.outputs))]
    sums = [jnp.sum(by_name[f"sum:{i}"], axis=(0, 1)) for i in range(steps.sums)]
    return outputs, by_name["last"], sums


def _kernel(
    refs: dict[str, Ref], steps: Steps, config: Config, shape: tuple[int, int, int], interpret: bool
) -> None:
    B, T, D = shape
    block_d, unroll = config.block_d, config.unroll
    chunk = unroll * config.blocks
    chunks = pl.cdiv(T, chunk)
    d_programs = pl.cdiv(D, block_d)
    k, lane = pl.program_id(0) // (B * d_programs), pl.program_id(0) % (B * d_programs)
    b, d0 = lane // d_programs, (lane % d_programs) * block_d
    t0 = (chunks - 1 - k if steps.reverse else k) * chunk
    d = d0 + jnp.arange(block_d)  # Numbers, as a slice must not end beyond the array.
    in_d = None if D % block_d == 0 else d < D

    def both(mask: Any) -> jax.Array | None:
        """`mask`, a scalar or None, and in_d, as one vector or None."""
        if mask is None:
            return in_d
        mask = jnp.broadcast_to(mask, (block_d,))
        return mask if in_d is None else mask & in_d

    def load(
        ref: Ref, *index: Any, mask: Any = None, other: float = 0.0, **options: Any
    ) -> jax.Array:
        mask = both(mask)
        instead = None if mask is None else other
        value = pltriton.load(ref.at[(*index, d)], mask=mask, other=instead, **options)
        return value.astype(jnp.float32)

    def store(ref: Ref, value: jax.Array, *index: Any, mask: Any = None) -> None:
        pltriton.store(ref.at[(*index, d)], value.astype(ref.dtype), mask=both(mask))

    lanes = {
        name.removeprefix("lane:"): load(ref)
        for name, ref in refs.items()
        if name.startswith("lane:")
    }

    def load_block(block: Any) -> list[Row]:
        """The rows of one unrolled block in the order in which they are walked."""
        position = config.blocks - 1 - block if steps.reverse else block
        first = t0 + position * unroll
        words = {}
        rows = []
        for u in reversed(range(unroll)) if steps.reverse else range(unroll):
            t = first + u
            inside = None if T % chunk == 0 else t < T
            row: Row = {"t": t, "inside": inside, "reset": None, "held": None, **lanes}
            for name, ref in refs.items():
                if name.startswith("row:"):
                    row[name.removeprefix("row:")] = load(ref, b, t, mask=inside)
            if "previous" in refs:
                exists = t > 0 if inside is None else (t > 0) & inside
                row["previous"] = load(refs["previous"], b, t - 1, mask=exists)
                if "start" in refs and u == 0:
                    row["previous"] += load(refs["start"], b, mask=t == 0)
            for name in ("reset", "held"):
                if f"{name}s" in refs:
                    word = name, u // _WORD_BITS
                    if word not in words:
                        words[word] = refs[f"{name}s"][b, t // _WORD_BITS]
                    row[name] = ((words[word] >> (t % _WORD_BITS)) & 1) == 1
            if row["reset"] is not None and "previous" in refs:
                row["previous"] = jnp.where(row["reset"], 0.0, row["previous"])
            rows.append(row)
        return rows

    def coefficients(row: Row) -> tuple[jax.Array, jax.Array]:
        a, s = steps.coefficients(row)
        if row["held"] is not None:
            a, s = jnp.where(row["held"], 1.0, a), jnp.where(row["held"], 0.0, s)
        if row["reset"] is not None:
            a = jnp.where(row["reset"], 0.0, a)
            if steps.reverse:  # the whole state crosses the boundary, not only its past
                s = jnp.where(row["reset"], 0.0, s)
        if row["inside"] is not None:  # steps beyond T leave the state alone
            a, s = jnp.where(row["inside"], a, 1.0), jnp.where(row["inside"], s, 0.0)
        return a, s

    def for_each_block(body: Callable[[Any, Any], Any], carry: Any) -> Any:
        if config.blocks == 1:
            return body(0, carry)
        return jax.lax.fori_loop(0, config.blocks, body, carry)

    kept = None if config.reload else load_block(0)

    def reduce_block(block: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product, state = carry
        for row in load_block(block) if kept is None else kept:
            a, s = coefficients(row)
            product, state = product * a, a * state + s
        return product, state

    initial = load(refs["initial"], b, mask=k < config.group) if "initial" in refs else None
    if chunks == 1:
        carry = jnp.zeros((block_d,), jnp.float32) if initial is None else initial
    else:
        zero, one = jnp.zeros((block_d,), jnp.float32), jnp.ones((block_d,), jnp.float32)
        product, state = for_each_block(reduce_block, (one, zero))
        where, reduced = (k, lane, b), (product, state)
        carry = _look_back(refs, config, chunks, where, reduced, initial, load, store, interpret)

    def walk_block(block: Any, carry: Any) -> Any:
        state, sums = carry
        for row in load_block(block) if kept is None else kept:
            a, s = coefficients(row)
            before, state = state, a * state + s
            emitted = steps.emit(row, before, state)
            for i in range(len(steps.outputs)):
                store(refs[f"out:{i}"], emitted[i], b, row["t"], mask=row["inside"])
            terms = emitted[len(steps.outputs) :]
            if row["inside"] is not None:
                terms = [jnp.where(row["inside"], term, 0.0) for term in terms]
            sums = tuple(total + term for total, term in zip(sums, terms, strict=True))
        return state, sums

    zeros = tuple(jnp.zeros((block_d,), jnp.float32) for _ in range(steps.sums))
    state, sums = for_each_block(walk_block, (carry, zeros))
    store(refs["last"], state, b, mask=k == chunks - 1)
    for i, total in enumerate(sums):
        store(refs[f"sum:{i}"], total, k, b)


def _look_back(
    refs: dict[str, Ref],
    config: Config,
    chunks: int,
    where: tuple[jax.Array, jax.Array, jax.Array],
    reduced: tuple[jax.Array, jax.Array],
    initial: jax.Array | None,
    load: Callable[..., jax.Array],
    store: Callable[..., None],
    interpret: bool,
) -> jax.Array:
    """Publishes (product, state) of this chunk; returns the state at its start."""
    k, lane, b = where
    product, state = reduced
    group = config.group
    g, j = k // group, k % group
    flags = refs["flags"]

    def publish(word: Any, bit: Any) -> None:
        if not interpret:  # the interpreter is sequential and does not know barriers
            pltriton.debug_barrier()  # every thread's stores come before the flag
        pltriton.atomic_add(flags, (lane, word), jnp.int32(1) << bit)  # each bit is added once

    store(refs["products"], product, k, b)
    store(refs["states"], state, k, b)
    publish(g, j)

    needed = (jnp.int32(1) << j) - 1
    needed = jnp.where(g > 0, needed | (1 << _CARRY_READY), needed)

    def poll() -> jax.Array:
        return pltriton.atomic_add(flags, (lane, g), jnp.zeros((), jnp.int32))

    def waiting(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        seen, polls = carry
        return ((seen & needed) != needed) & (polls < _MAX_POLLS)

    if interpret:  # programs run in order, so one look must be enough
        seen = poll()
    else:
        start = (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
        seen, _ = jax.lax.while_loop(waiting, lambda carry: (poll(), carry[1] + 1), start)
        pltriton.debug_barrier()

    chunk_of = functools.partial(load, volatile=True)  # L1 is not coherent
    carry = chunk_of(refs["carries"], g, b, mask=g > 0)
    if initial is not None:
        carry += initial
    for i in range(min(group, chunks) - 1):
        valid = i < j
        a = chunk_of(refs["products"], g * group + i, b, mask=valid, other=1.0)
        carry = a * carry + chunk_of(refs["states"], g * group + i, b, mask=valid)
    carry = jnp.where((seen & needed) == needed, carry, jnp.nan)

    @pl.when((j == group - 1) & (k < chunks - 1))
    def _publish_carry() -> None:
        store(refs["carries"], product * carry + state, g + 1, b)
        publish(g + 1, _CARRY_READY)

    return carry
