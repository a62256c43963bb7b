"""The board on which the programs of a token's kernel (`token_gpu.py`) pass on their values.

It starts as `EMPTY`; a reader looks again until nothing that it needs is empty, so that the
data is its own flag and one trip through the L2 cache passes it on. A value that is a bfloat16
anyway is two to a word.

What a thread reads of a row is a list over its words of a list over the four planes of the four
columns that a word holds of a plane, each [warps, 32].
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import triton as pltriton
from ..packed_matmul.words import plane_columns
from . import inline
from .inline import EMPTY, EMPTY_HALF
from .token_plan import Plan, groups, places, word_numbers

Refs = dict[str, Any]
Row = list[list[list[jax.Array]]]

_NAN, _NAN_HALF = 0x7FC00000, 0x7FC0


def board_size(plan: Plan) -> int:
    """Words of all boards and their copies."""
    return plan.boards * plan.cut.copies * (plan.layers + 1) * plan.board


def load(
    plan: Plan, ref: Any, index: tuple[Any, ...], inside: jax.Array | None, *, written: bool = False
) -> jax.Array:
    """Elements of an array, int32 or float32; 0 where not inside (None: all are).

    The last of the indices is of the shape of `places`, the others are numbers. `written`: the
    kernel writes the array.
    """
    if plan.emulate:
        found = pltriton.load(ref.at[index], mask=inside, other=None if inside is None else 0)
        return found if found.dtype == jnp.int32 else found.astype(jnp.float32)
    size = jnp.dtype(ref.dtype).itemsize
    bits = inline.load(ref, _flat(ref, index), inside, size=size, shared=written)
    if ref.dtype == jnp.int32:
        return bits
    if ref.dtype == jnp.int8:
        return bits.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(bits << 16 if size == 2 else bits, jnp.float32)


def store(plan: Plan, ref: Any, index: tuple[Any, ...], y: jax.Array, inside: jax.Array) -> None:
    """Writes elements of four bytes, float32 or int32, where inside."""
    if plan.emulate:
        pltriton.store(ref.at[index], y, mask=inside)
    else:
        bits = jax.lax.bitcast_convert_type(y, jnp.int32)
        inline.store(ref, _flat(ref, index), bits, inside)


def _flat(ref: Any, index: tuple[Any, ...]) -> jax.Array:
    place = index[0]
    for size, i in zip(ref.shape[1:], index[1:], strict=True):
        place = place * size + i
    return place


def _start(
    refs: Refs, plan: Plan, value: str, layer: Any, copy: Any, other: bool = False
) -> tuple[Any, int]:
    """The word at which a value begins, and the bytes of an element; "x" is a layer's input.

    On the board of the token that is worked on, or on the other one.
    """
    if value == "x":
        value, layer = "out", layer - 1
    if plan.boards > 1:
        number = refs["step"] % 2
        copy = copy + plan.cut.copies * (1 - number if other else number)
    layer = copy * (plan.layers + 1) + layer + 1
    return layer * plan.board + plan.slots[value], plan.bytes[value]


def _own_copy(refs: Refs, plan: Plan) -> Any:
    """The copy that this program reads."""
    return refs["program"] % plan.cut.copies if plan.cut.copies > 1 else 0


def publish(
    refs: Refs, plan: Plan, value: str, layer: Any, n: jax.Array, inside: jax.Array, y: jax.Array
) -> None:
    """Writes elements n of a value for all to read; `y` is of the value's dtype, or int32 bits."""
    bits = y
    size = plan.bytes["out" if value == "x" else value]
    if y.dtype != jnp.int32:
        bits = jax.lax.bitcast_convert_type(y.astype(jnp.float32), jnp.int32)
    if size == 2:
        bits = jax.lax.shift_right_logical(bits, jnp.int32(16))
        bits = jnp.where(bits == EMPTY_HALF, _NAN_HALF, bits)
    else:
        bits = jnp.where(bits == EMPTY, _NAN, bits)
    _write(refs, plan, value, layer, n, inside, bits, other=False)


def take_off(
    refs: Refs, plan: Plan, value: str, layer: Any, n: jax.Array, inside: jax.Array
) -> None:
    """Empties the places of elements n of a value on the other board.

    Whoever writes a place is the one who empties it, so that the two are in order.
    """
    if plan.boards > 1:
        _write(refs, plan, value, layer, n, inside, jnp.full(n.shape, EMPTY), other=True)


def _write(
    refs: Refs, plan: Plan, value: str, layer: Any, n: jax.Array, inside: jax.Array,
    bits: jax.Array, other: bool,
) -> None:  # fmt: skip
    for copy in range(plan.cut.copies):
        start, size = _start(refs, plan, value, layer, copy, other)
        if size == 2:
            inline.store_half(refs["board"], 2 * start + n, bits, inside)
        elif plan.emulate:
            pltriton.store(refs["board"].at[start + n], bits, mask=inside)
        else:
            inline.store(refs["board"], start + n, bits, inside)


def read_some(
    refs: Refs, plan: Plan, value: str, layer: Any, n: jax.Array, inside: jax.Array
) -> jax.Array:
    """Elements n of a value, float32; they are there already."""
    start, size = _start(refs, plan, value, layer, _own_copy(refs, plan))
    place = start + (n if size == 4 else n >> 1)
    if plan.emulate:
        bits = pltriton.load(refs["board"].at[place], mask=inside, other=0)
    else:
        bits = inline.load(refs["board"], place, inside, size=4, shared=True)
    if size == 2:
        bits = jnp.where((n & 1) == 1, bits & ~0xFFFF, bits << 16)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def read(
    refs: Refs, plan: Plan, values: Sequence[str], layer: Any, columns: int, patience: jax.Array
) -> tuple[list[Row], jax.Array]:
    """The rows of some values, once they are there, and what is left of the patience."""
    numbers = word_numbers(plan, columns)
    copy = _own_copy(refs, plan)
    if plan.emulate:
        rows = []
        for value in values:
            start, _ = _start(refs, plan, value, layer, copy)
            rows.append(_emulated(refs["board"], plan, columns, lambda c, s=start: (s + c,)))
        return _as_floats(rows), patience
    masks, groups = [], []
    for value in values:
        start, size = _start(refs, plan, value, layer, copy)
        offsets = _planes(columns, size)
        for word, mask in numbers:
            masks.append(mask)
            groups.append(inline.Group(start + size * word, offsets, size, halves=size == 2))
    found = [inline.load_words(refs["board"], group, shared=True) for group in groups]
    found, patience = inline.settle(refs["board"], groups, found, patience)
    pieces = []
    for group, words, mask in zip(groups, found, masks, strict=True):
        piece = _unpack(words, group.count)
        if mask is not None:
            piece = [[jnp.where(mask, x, 0.0) for x in plane] for plane in piece]
        pieces.append(piece)
    count = len(numbers)
    return [pieces[count * i : count * (i + 1)] for i in range(len(values))], patience


def read_pairs(
    refs: Refs, plan: Plan, value: str, layer: Any, pairs: Sequence[jax.Array], patience: jax.Array
) -> tuple[list[list[jax.Array]], jax.Array]:
    """Pairs of words of a value, by number, once they are there: int32 bits."""
    start, _ = _start(refs, plan, value, layer, _own_copy(refs, plan))
    if plan.emulate:
        board = refs["board"]
        words = [[pltriton.load(board.at[start + 2 * n + i]) for i in range(2)] for n in pairs]
        return words, patience
    groups = [inline.Group(start + 2 * n, [0], 2) for n in pairs]
    found = [inline.load_words(refs["board"], group, shared=True) for group in groups]
    return inline.settle(refs["board"], groups, found, patience)


def _planes(columns: int, size: int) -> list[int]:
    """Bytes from a row's start to each plane, of elements of `size` bytes."""
    return [plane * plane_columns(columns) * size for plane in range(4)]


def shares_of_warps(
    refs: Refs, plan: Plan, values: list[jax.Array], count: int
) -> list[list[jax.Array]]:
    """What the first `count` warps hold of values that are the same in all threads of a warp."""
    if plan.cut.warps == 1:
        return [[x] for x in values]
    if plan.emulate:
        shape = places(plan).shape
        return [[jnp.broadcast_to(x[warp, 0], shape) for warp in range(count)] for x in values]
    return inline.exchange(refs["board"], values, None, count)


def ask_for_norm(refs: Refs, plan: Plan, name: str, layer: Any, columns: int) -> Any:
    """Starts to load a norm's weights, which are [L, columns]."""
    ref = refs[name]
    if plan.emulate:
        return _emulated(ref, plan, columns, lambda c: (layer, c))
    # Four elements are as many words as one has bytes.
    size = jnp.dtype(ref.dtype).itemsize
    offsets = _planes(columns, size)
    return [
        inline.load_words(
            ref, inline.Group(layer * columns + 4 * word, offsets, size), shared=False
        )
        for word, _ in word_numbers(plan, columns)
    ]


def norm_weights(refs: Refs, plan: Plan, name: str, asked: Any) -> Row:
    """What `ask_for_norm` found, float32."""
    if plan.emulate:
        return [[[x.astype(jnp.float32) for x in plane] for plane in piece] for piece in asked]
    size = jnp.dtype(refs[name].dtype).itemsize
    return [_unpack(words, size) for words in asked]


def _unpack(words: Sequence[jax.Array], size: int) -> list[list[jax.Array]]:
    """[plane][column] float32 of words that hold elements of `size` bytes."""
    bits = list(words)
    if size == 2:
        bits = [half for word in words for half in (word << 16, word & ~0xFFFF)]
    floats = [jax.lax.bitcast_convert_type(x, jnp.float32) for x in bits]
    return [floats[4 * plane : 4 * (plane + 1)] for plane in range(4)]


def _emulated(ref: Any, plan: Plan, columns: int, place: Any) -> Row:
    """The same elements by plain loads, 0 where there is no column."""
    size = plane_columns(columns)
    threads = places(plan).size // groups(plan, columns)
    row = []
    for number, _ in enumerate(word_numbers(plan, columns)):
        word = number * threads + places(plan) % threads
        piece = []
        for plane in range(4):
            c = [plane * size + 4 * word + byte for byte in range(4)]
            exists = [(4 * word < size) & (column < columns) for column in c]
            piece.append(
                [
                    pltriton.load(ref.at[place(column)], mask=mask, other=0)
                    for column, mask in zip(c, exists, strict=True)
                ]
            )
        row.append(piece)
    return row


def _as_floats(rows: list[Row]) -> list[Row]:
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.float32), rows)
