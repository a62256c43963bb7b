"""The arithmetic of `fixed.py` as combinational logic.

Each function takes Amaranth values and returns a value; `m` is the module that receives the
intermediate signals.
"""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

import itertools
from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed, unsigned

from mmfree_jax.experiments.accelerator import fixed

Value = Any
WORD = fixed.WORD_BITS


def named(m: Module, value: Value, name: str) -> Signal:
    """A signal of the value's own shape, so that the Verilog can be read."""
    s = Signal(value.shape(), name=name)
    m.d.comb += s.eq(value)
    return s


def constants(values: Sequence[int], width: int) -> Array:
    """A table to index."""
    return Array(Const(v, unsigned(width)) for v in values)


def _steps(table: Sequence[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(table)]


def saturate(m: Module, x: Value, bits: Value) -> Signal:
    """`fixed.saturate` to a 16-bit word; `bits` is a 5-bit value from 2 to 16."""
    high = Signal(signed(WORD + 2), name="high")
    low = Signal(signed(WORD + 2), name="low")
    m.d.comb += [high.eq((Const(1, 1) << (bits - 1)[:4]) - 1), low.eq(-high - 1)]
    out = Signal(signed(WORD), name="saturated")
    m.d.comb += out.eq(Mux(x > high, high, Mux(x < low, low, x)))
    return out


def round_shift(m: Module, x: Value, shift: Value) -> Signal:
    """`fixed.round_shift` for a 5-bit shift."""
    half = Signal(unsigned(31), name="half")
    m.d.comb += half.eq((Const(1, 1) << shift) >> 1)
    return named(m, (x + half) >> shift, "rounded")


def sigmoid(m: Module, x: Signal, frac: Value, entries: int) -> Signal:
    """`fixed.sig`: a 16-bit word with 14 fraction bits."""
    point = 6 + (entries // fixed.SIGMOID_ENTRIES).bit_length() - 1
    table = fixed.sigmoid_table(entries)
    size = Signal(15, name="size")
    m.d.comb += size.eq(Mux(x == -(1 << 15), (1 << 15) - 1, Mux(x < 0, -x, x)))
    up, down = Signal(4, name="up"), Signal(4, name="down")
    m.d.comb += [
        up.eq(Mux(frac < point, point - frac, 0)),
        down.eq(Mux(frac > point, frac - point, 0)),
    ]
    scaled = named(m, (size << up) >> down, "scaled")
    u = named(m, Mux(scaled > 64 * entries, 64 * entries, scaled)[: 7 + entries.bit_length()], "u")
    k = named(m, Mux((u >> 6) >= entries, entries - 1, (u >> 6)[: entries.bit_length()]), "k")
    t = named(m, (u - (k << 6))[:7], "t")
    base = named(m, constants(table[:-1], 15)[k], "base")
    slope = named(m, constants(_steps(table), 12)[k], "slope")
    y = named(m, (base + ((slope * t + 32) >> 6))[:15], "y")
    out = Signal(signed(WORD), name="sigmoid")
    m.d.comb += out.eq(Mux(x < 0, fixed.ONE - y, y))
    return out


def exponential(m: Module, x: Signal, frac: Value) -> Signal:
    """`fixed.exp`: a 16-bit word with 14 fraction bits."""
    table = fixed.exp_table()
    product = Signal(signed(32), name="product")
    m.d.comb += product.eq(x * Const(fixed._LOG2E, signed(16)))
    z = named(m, product >> (frac + 4)[:5], "z")
    whole = named(m, z >> 10, "whole")
    u = named(m, z[:10], "u")
    k, t = u[6:], u[:6]
    slope = constants(_steps(table), 12)[k]
    mantissa = named(m, (constants(table[:-1], 15)[k] + ((slope * t + 32) >> 6))[:16], "mantissa")
    down = named(m, -whole, "down")
    count = named(m, Mux(down < 0, 0, Mux(down > 30, 30, down))[:5], "count")
    y = round_shift(m, mantissa, count)
    out = Signal(signed(WORD), name="exp")
    largest = (1 << (WORD - 1)) - 1
    m.d.comb += out.eq(Mux((whole > 0) | (y > largest), largest, y))
    return out


def lanes_of(value: Value, lanes: int) -> list[Value]:
    """A vector word as signed lanes."""
    return [value.word_select(k, WORD).as_signed() for k in range(lanes)]


def masked(values: Sequence[Value], keep: Value) -> Value:
    """A vector word of lanes, those not kept as zero."""
    return Cat(Mux(keep[k], v, Const(0, signed(WORD)))[:WORD] for k, v in enumerate(values))


def tree_sum(m: Module, values: Sequence[Value], name: str) -> Value:
    """The sum, by a balanced tree of adders."""
    level = list(values)
    depth = 0
    while len(level) > 1:
        depth += 1
        pairs = [a + b for a, b in zip(level[::2], level[1::2], strict=False)]
        if len(level) % 2:
            pairs.append(level[-1])
        level = [named(m, x, f"{name}_{depth}_{k}") for k, x in enumerate(pairs)]
    return level[0]
