"""The ternary matrix unit: a beat of trits a cycle selects, negates or drops as many inputs.

There is no multiplier in it. The memory streams the matrix row by row; the unit never makes it
wait, so that it needs no queue.
"""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, signed

from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import (
    WORD,
    lanes_of,
    named,
    round_shift,
    saturate,
    tree_sum,
)
from mmfree_jax.experiments.accelerator.rtl.control import (
    last_word_mask,
    latch_operands,
    word_count,
)
from mmfree_jax.experiments.accelerator.rtl.interface import MemoryPorts, Ports


class Ternary(Elaboratable):
    """TMATMUL: n outputs of k inputs; see `fixed.tmatmul`."""

    def __init__(self, machine: Machine, address_bits: int) -> None:
        self.machine = machine
        self.ports = Ports(machine.lanes, address_bits, "ternary")
        self.memory = MemoryPorts(machine.bus_bits, "ternary_memory")

    def elaborate(self, platform: object) -> Module:
        """Beat, sum of lanes, accumulator, output word: a cycle each."""
        del platform
        m, p, mem, lanes = Module(), self.ports, self.memory, self.machine.lanes
        o = latch_operands(m, p, reads=("a",))
        words = word_count(m, o.k, lanes)
        keep = last_word_mask(m, o.k, lanes)
        request = Signal()
        m.d.sync += request.eq(p.start)
        m.d.comb += [
            mem.request.eq(request),
            mem.address.eq(o.extra),
            mem.count.eq(o.n * words),
        ]
        # Beat: its trits are kept while the register file reads the inputs.
        column, row = Signal.like(p.address, name="column"), Signal(16)
        trits = Signal(self.machine.bus_bits)
        beat, first, last = Signal(), Signal(), Signal()
        end_of_row = named(m, column == words - 1, "end_of_row")
        m.d.comb += p.address.eq(column)
        with m.If(p.start):
            m.d.sync += [column.eq(0), row.eq(0)]
        m.d.sync += [
            beat.eq(mem.valid),
            trits.eq(mem.read),
            first.eq(column == 0),
            last.eq(end_of_row),
        ]
        with m.If(mem.valid):
            m.d.sync += column.eq(Mux(end_of_row, 0, column + 1))
        # Sum of the lanes; those behind the last column do not count.
        terms = []
        keep_now = named(m, Mux(last, keep, ~Const(0, lanes)), "keep_now")
        for k, x in enumerate(lanes_of(p.a, lanes)):
            plus = trits[2 * k] & ~trits[2 * k + 1] & keep_now[k]
            minus = trits[2 * k] & trits[2 * k + 1] & keep_now[k]
            term = Mux(plus, x, Mux(minus, -x, Const(0, signed(WORD + 1))))
            terms.append(named(m, term, f"term{k}"))
        partial, summed = Signal(signed(32)), Signal()
        first_sum, last_sum = Signal(), Signal()
        m.d.sync += [
            partial.eq(tree_sum(m, terms, "tree")),
            summed.eq(beat),
            first_sum.eq(first),
            last_sum.eq(last),
        ]
        # Accumulator.
        total, complete = Signal(signed(32)), Signal()
        with m.If(summed):
            m.d.sync += total.eq(Mux(first_sum, 0, total) + partial)
        m.d.sync += complete.eq(summed & last_sum)
        # Output word.
        rounded = Signal(signed(32), name="rounded")
        m.d.comb += rounded.eq(round_shift(m, total, o.shift[:5]))
        y = saturate(m, rounded, o.bits)
        lane, word = Signal(range(lanes)), Signal.like(p.address, name="word")
        out = Signal(WORD * lanes)
        write, write_last = Signal(), Signal()
        last_row = named(m, row == o.n - 1, "last_row")
        full = named(m, (lane == lanes - 1) | last_row, "full")
        m.d.sync += write.eq(complete & full)
        with m.If(p.start):
            m.d.sync += [lane.eq(0), word.eq(0)]
        with m.Elif(complete):
            others = Mux(lane == 0, 0, out)
            m.d.sync += [
                out.eq(
                    Cat(
                        Mux(lane == k, y, others[WORD * k : WORD * (k + 1)])[:WORD]
                        for k in range(lanes)
                    )
                ),
                lane.eq(Mux(full, 0, lane + 1)),
                row.eq(row + 1),
                write_last.eq(last_row),
            ]
        with m.If(write & ~p.start):
            m.d.sync += word.eq(word + 1)
        m.d.comb += [
            p.write.eq(write),
            p.write_register.eq(o.dst),
            p.write_address.eq(word),
            p.write_data.eq(out),
            p.done.eq(write & write_last),
        ]
        return m
