"""What every unit does alike: keep its operands, hold its registers, count and mask words."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal

from mmfree_jax.experiments.accelerator.rtl.interface import Ports, operands_layout


def latch_operands(m: Module, p: Ports, *, reads: Sequence[str]) -> Any:
    """Keeps the operands from `start` on, and drives busy, held and the sources of a unit."""
    kept = Signal(operands_layout(), name="kept")
    with m.If(p.start):
        m.d.sync += [kept.eq(p.operands), p.busy.eq(1)]
        held: Any = Const(1, 1) << p.operands.dst
        for name in reads:
            held = held | (Const(1, 1) << p.operands[name])
        m.d.sync += p.held.eq(held)
    with m.Elif(p.done):
        m.d.sync += [p.busy.eq(0), p.held.eq(0)]
    m.d.comb += [p.source_a.eq(kept.a), p.source_b.eq(kept.b)]
    return kept


def word_count(m: Module, n: Any, lanes: int) -> Signal:
    """Vector words of n elements."""
    words = Signal(17, name="words")
    m.d.comb += words.eq((n + (lanes - 1)) // lanes)
    return words


def last_word_mask(m: Module, n: Any, lanes: int) -> Signal:
    """The lanes of the last word that hold elements."""
    keep = Signal(lanes, name="keep")
    rest = Signal(range(lanes), name="rest_of_n")
    m.d.comb += [
        rest.eq(n % lanes),
        keep.eq(Cat(Mux(rest == 0, 1, k < rest) for k in range(lanes))),
    ]
    return keep
