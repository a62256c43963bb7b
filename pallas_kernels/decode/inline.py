"""Machine instructions that Pallas has no name for, on places of an array in global memory.

Inline assembly in Pallas takes values only. Here one operand is an address: the place of each
element in an array. This file and `triton.py` are the ones that reach into Pallas's own modules;
the calls are the same from jax 0.10.2 to 0.12.0, and tests lower them. A kernel under the
interpreter must not get here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import core as jax_core
from jax._src import state
from jax._src.lib.mlir import ir
from jax.interpreters import mlir

from .. import triton as pltriton
from ..refs import Ref

# Bits of a place where nothing has been written, in words and in each half of a word. A NaN
# that arithmetic never makes.
EMPTY = -1
EMPTY_HALF = 0xFFFF


_asm_p: Any = jax_core.Primitive("assembly_at")
_asm_p.multiple_results = True


@_asm_p.def_effectful_abstract_eval
def _(
    ref: Ref,
    first: Any,
    *args: Any,
    asm: str,
    constraints: str,
    count: int,
    results: int,
    writes: bool,
) -> tuple[list[Any], set[Any]]:
    del ref, args, asm, constraints, count
    effect = state.WriteEffect(0) if writes else state.ReadEffect(0)
    return [jax_core.ShapedArray(first.shape, jnp.dtype("int32"))] * results, {effect}


@pltriton.register_lowering(_asm_p)
def _(
    ctx: Any,
    pointer: Any,
    *args: Any,
    asm: str,
    constraints: str,
    count: int,
    results: int,
    writes: bool,
) -> list[Any]:
    del results, writes
    lowering, triton_dialect = pltriton.internals()
    shape = ctx.avals_in[1].shape
    address = ir.RankedTensorType.get(shape, ir.IntegerType.get_signless(64))
    pointers = [lowering._add(lowering._bcast_to(pointer, shape), x) for x in args[:count]]
    out: Any = triton_dialect.elementwise_inline_asm(
        [ir.RankedTensorType.get(a.shape, mlir.dtype_to_ir_type(a.dtype)) for a in ctx.avals_out],
        asm,
        constraints=constraints,
        pure=False,  # Stays where it is: loads ahead of time are not to sink to their use.
        packed_element=1,
        args=[*(triton_dialect.ptr_to_int(address, x) for x in pointers), *args[count:]],
    )
    return [out] if isinstance(out, ir.Value) else list(out)


def _at(
    ref: Any, places: Sequence[jax.Array], *args: jax.Array, asm: str, constraints: str,
    results: int, writes: bool = False,
) -> list[jax.Array]:  # fmt: skip
    """The int32 results of `asm` for each element; its first operands are the places' addresses.

    All operands have one shape. `results` is how many there are.
    """
    return _asm_p.bind(
        ref, *places, *args, asm=asm, constraints=constraints, count=len(places),
        results=results, writes=writes,
    )  # fmt: skip


class Group(NamedTuple):
    """Words that a thread reads together.

    Attributes:
      place: int32, an element of the array.
      offsets: bytes from there, of each run of neighbouring words.
      count: words of a run, 2 or 4; a run is aligned to its length.
      halves: a word holds two values.
    """

    place: jax.Array
    offsets: Sequence[int]
    count: int
    halves: bool = False

    @property
    def words(self) -> int:
        """All its words."""
        return self.count * len(self.offsets)


def _loads(group: Group, first: int, address: str, kind: str, predicate: str = "") -> str:
    """Loads a group into the operands from number `first` on."""
    lines = []
    for run, offset in enumerate(group.offsets):
        start = first + run * group.count
        names = ", ".join(f"${start + i}" for i in range(group.count))
        lines.append(
            f"{predicate} ld.{kind}.v{group.count}.b32 {{{names}}}, [{address} + {offset}];"
        )
    return " ".join(lines)


def load_words(ref: Any, group: Group, *, shared: bool) -> list[jax.Array]:
    """Starts to load a group of words; waits for nothing.

    Args:
      ref: an array, places in which are counted flat.
      group: the words.
      shared: other programs may be writing it now.

    Returns:
      int32 arrays of the shape of the group's place.
    """
    kind = "relaxed.gpu.global" if shared else "global.nc"
    return _at(
        ref, [group.place],
        asm=_loads(group, 0, f"${group.words}", kind),
        constraints=",".join(["=r"] * group.words + ["l"]),
        results=group.words,
    )  # fmt: skip


def settle(
    ref: Any, groups: Sequence[Group], found: Sequence[Sequence[jax.Array]], patience: jax.Array
) -> tuple[list[list[jax.Array]], jax.Array]:
    """Looks at groups of words again and again, until nothing in them is empty.

    Each thread waits for its own words only, without a word to the others.

    Args:
      ref: as given to `load_words`.
      groups: as given to it.
      found: what it found.
      patience: int32, looks that are left; at 0 what is found is taken as it is.

    Returns:
      The words, and what is left of the patience.
    """
    total = sum(group.words for group in groups)
    left = f"${total}"
    body, first = ["mov.pred again, 0;"], 0
    for number, group in enumerate(groups):
        names = [f"${first + i}" for i in range(group.words)]
        if group.halves:
            # Halves of v are zero where (v - 0x00010001) & ~v has their top bit; v = ~word.
            body.append("mov.b32 seen, 0;")
            for name in names:
                body.append(f"sub.u32 part, 0xFFFEFFFE, {name};")
                body.append(f"lop3.b32 seen, part, {name}, seen, 0xEA;")  # (part & word) | seen
            body.append("and.b32 seen, seen, 0x80008000; setp.ne.u32 empty, seen, 0;")
        else:
            body.append(f"max.u32 seen, {names[0]}, {names[1]};")
            body += [f"max.u32 seen, seen, {name};" for name in names[2:]]
            body.append("setp.eq.u32 empty, seen, 0xFFFFFFFF;")
        body.append(f"setp.gt.and.s32 empty, {left}, 0, empty;")
        address = f"${total + 1 + number}"
        body.append(_loads(group, first, address, "relaxed.gpu.global", "@empty"))
        body.append("or.pred again, again, empty;")
        first += group.words
    asm = (
        "{ .reg .pred again, empty; .reg .b32 seen, part; LOOK: "
        + " ".join(body)
        + f" @!again bra SETTLED; sub.s32 {left}, {left}, 1; bra LOOK; SETTLED: }}"
    )
    tied = [str(i) for i in range(total + 1)]
    *words, patience = _at(
        ref, [group.place for group in groups], *(x for xs in found for x in xs), patience,
        asm=asm,
        constraints=",".join(["=r"] * (total + 1) + ["l"] * len(groups) + tied),
        results=total + 1,
    )  # fmt: skip
    pieces = iter(words)
    return [[next(pieces) for _ in range(group.words)] for group in groups], patience


def load(
    ref: Any, place: jax.Array, inside: jax.Array | None, *, size: int, shared: bool = False
) -> jax.Array:
    """Elements of an array as int32, their bits at the low end; 0 where not inside.

    Args:
      ref: an array, places in which are counted flat.
      place: int32.
      inside: bool, or None for all.
      size: bytes of an element, 1 (signed), 2 or 4.
      shared: the kernel writes it.
    """
    kind = "relaxed.gpu.global" if shared else "global.nc.L1::no_allocate"
    predicate = "" if inside is None else "@yes"
    body = f"{predicate} ld.{kind}.b32 $0, [$1];"
    if size == 2:
        body = f"mov.b16 half, 0; {predicate} ld.{kind}.b16 half, [$1]; cvt.u32.u16 $0, half;"
    if size == 1:
        body = f"{predicate} ld.{kind}.s8 $0, [$1];"
    if inside is not None:
        body = "setp.ne.u32 yes, $2, 0; mov.b32 $0, 0; " + body
    (bits,) = _at(
        ref, [place], *([] if inside is None else [inside.astype(jnp.int32)]),
        asm="{ .reg .pred yes; .reg .b16 half; " + body + " }",
        constraints="=&r,l" + (",r" if inside is not None else ""),
        results=1,
    )  # fmt: skip
    return bits


def store(ref: Any, place: jax.Array, bits: jax.Array, inside: jax.Array) -> None:
    """Writes words to an array of elements of four bytes, where inside.

    Args:
      ref: the array, places in which are counted flat.
      place, bits: int32.
      inside: bool.
    """
    _at(
        ref, [place], bits, inside.astype(jnp.int32),
        asm=(
            "{ .reg .pred yes; setp.ne.u32 yes, $3, 0;"
            " @yes st.relaxed.gpu.global.b32 [$1], $2; mov.b32 $0, 0; }"
        ),
        constraints="=r,l,r,r",
        results=1,
        writes=True,
    )  # fmt: skip


def store_half(ref: Any, element: jax.Array, bits: jax.Array, inside: jax.Array) -> None:
    """Writes the low 16 bits of each element of `bits` to a half of a word.

    Args:
      ref: int32, of one dimension.
      element: int32, halves from its start.
      bits: int32.
      inside: bool, which are written.
    """
    _at(
        ref, [element >> 1], element & 1, bits, inside.astype(jnp.int32),
        asm=(
            "{ .reg .pred yes; .reg .b64 at; .reg .b16 half; mad.wide.u32 at, $2, 2, $1;"
            " cvt.u16.u32 half, $3; setp.ne.u32 yes, $4, 0;"
            " @yes st.relaxed.gpu.global.b16 [at], half; mov.b32 $0, 0; }"
        ),
        constraints="=r,l,r,r,r",
        results=1,
        writes=True,
    )  # fmt: skip


# Named barrier of the exchanges between warps: the compiler's own barriers use number 0.
_BARRIER = 1


def exchange(
    ref: Any, values: Sequence[jax.Array], wanted: Sequence[jax.Array] | None, count: int,
    phase: jax.Array | int = 0,
) -> list[list[jax.Array]]:  # fmt: skip
    """What other warps of a program hold: one write, one barrier, one read.

    The memory of each call is its own. A loop that holds a single call must alternate `phase`,
    or a fast warp would overwrite what a slow one has not read.

    Args:
      ref: any array; the call is ordered among the accesses to it.
      values: int32 [warps, 32].
      wanted: for each result, the place of its first share in [values, warps, 32] counted flat,
        int32 [warps, 32]; None: a result for each value, its shares in the warps' first lanes.
      count: shares of a result, from as many neighbouring warps.
      phase: int32, even or odd.

    Returns:
      The shares of each result, [warps, 32] each.
    """
    warps, lanes = shape = values[0].shape
    places = [] if wanted is None else list(wanted)
    results = len(values) if wanted is None else len(places)
    total, row = results * count, warps if wanted is None else warps * lanes
    size = 4 * len(values) * row
    operands = iter(range(total, total + len(values) + len(places) + 1))
    inputs = [f"${next(operands)}" for _ in values]
    body = [
        f".shared .align 16 .b8 table[{2 * size}];",
        ".reg .pred first; .reg .b32 base, own, place;",
        "mov.u32 own, %tid.x; mov.u32 place, table;",
    ]
    if wanted is None:
        body.append("and.b32 base, own, 31; setp.eq.u32 first, base, 0; shr.u32 own, own, 5;")
    starts = [f"${next(operands)}" for _ in places]
    body.append(f"and.b32 base, ${next(operands)}, 1; mad.lo.u32 base, base, {size}, place;")
    body.append("mad.lo.u32 own, own, 4, base;")
    guard = "@first " if wanted is None else ""
    body += [f"{guard}st.shared.b32 [own + {4 * row * i}], {x};" for i, x in enumerate(inputs)]
    body.append(f"bar.sync {_BARRIER}, {warps * lanes};")
    for result in range(results):
        names = [f"${result * count + share}" for share in range(count)]
        if wanted is None:
            width = min(4, count)
            for first in range(0, count, width):
                group = ", ".join(names[first : first + width])
                at = f"base + {4 * (result * row + first)}"
                body.append(
                    f"ld.shared.v{width}.b32 {{{group}}}, [{at}];"
                    if width > 1
                    else f"ld.shared.b32 {group}, [{at}];"
                )
            continue
        body.append(f"mad.lo.u32 place, {starts[result]}, 4, base;")
        body += [f"ld.shared.b32 {x}, [place + {4 * lanes * i}];" for i, x in enumerate(names)]
    phases = jnp.broadcast_to(jnp.asarray(phase, jnp.int32), shape)
    found = _at(
        ref, [], *values, *places, phases,
        asm="{ " + " ".join(body) + " }",
        constraints=",".join(["=&r"] * total + ["r"] * (len(values) + len(places) + 1)),
        results=total,
    )  # fmt: skip
    return [found[i : i + count] for i in range(0, total, count)]


def fence(ref: Any, patience: jax.Array) -> jax.Array:
    """What a thread has read and written comes before what it reads and writes from here on.

    Args:
      ref: any array; the call is ordered among the accesses to it.
      patience: returned; the call stands in its chain.
    """
    (patience,) = _at(
        ref, [], patience, asm="fence.acq_rel.gpu;", constraints="=r,0", results=1, writes=True
    )
    return patience


def fetch(ref: Any, place: jax.Array, size: jax.Array, patience: jax.Array) -> jax.Array:
    """Asks for memory to come to the L2 cache; waits for nothing. From compute capability 9.0.

    Args:
      ref: an array of one dimension, or the first element's place in it counted flat.
      place: int32, elements from its start, aligned to 16 bytes.
      size: int32, bytes, a multiple of 16; where it is 0 nothing happens.
      patience: returned; the call stands in its chain.
    """
    (patience,) = _at(
        ref, [place], size, patience,
        asm=(
            "{ .reg .pred yes; setp.gt.s32 yes, $2, 0;"
            " @yes cp.async.bulk.prefetch.L2.global [$1], $2; }"
        ),
        constraints="=r,l,r,0",
        results=1,
    )  # fmt: skip
    return patience
