"""The row-wise unit: ADD, SUB, MUL, SIG and EXP at a word a cycle, DIV at 34 cycles a word."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from amaranth.hdl import Cat, Const, Elaboratable, Module, Mux, Signal, signed

from mmfree_jax.experiments.accelerator.isa import OPS
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import (
    WORD,
    exponential,
    lanes_of,
    masked,
    named,
    round_shift,
    saturate,
    sigmoid,
)
from mmfree_jax.experiments.accelerator.rtl.control import (
    last_word_mask,
    latch_operands,
    word_count,
)
from mmfree_jax.experiments.accelerator.rtl.interface import Ports


class RowWise(Elaboratable):
    """Element-wise instructions; see `machine.cycles_of` for their cycles."""

    def __init__(self, machine: Machine, address_bits: int) -> None:
        self.machine = machine
        self.ports = Ports(machine.lanes, address_bits, "rowwise")

    def elaborate(self, platform: object) -> Module:
        """The pipeline: read, compute, write; and the serial divider."""
        del platform
        m, p, lanes = Module(), self.ports, self.machine.lanes
        o = latch_operands(m, p, reads=("a", "b"))
        words = word_count(m, o.n, lanes)
        keep = last_word_mask(m, o.n, lanes)
        index = Signal.like(p.address, name="index")
        reading, dividing = Signal(), Signal()
        step = Signal(6)
        computed, computed_at = Signal(), Signal.like(p.address, name="computed_at")
        loaded, loaded_at = Signal(), Signal.like(p.address, name="loaded_at")
        last_read = named(m, index == words - 1, "last_read")
        is_div = named(m, o.op == OPS.index("DIV"), "is_div")
        m.d.comb += p.address.eq(index)

        with m.If(p.start):
            m.d.sync += [index.eq(0), step.eq(0)]
            with m.If(p.operands.op == OPS.index("DIV")):
                m.d.sync += dividing.eq(1)
            with m.Else():
                m.d.sync += reading.eq(1)
        m.d.sync += [
            loaded.eq(reading),
            loaded_at.eq(index),
            computed.eq(loaded),
            computed_at.eq(loaded_at),
        ]
        with m.If(reading):
            m.d.sync += index.eq(index + 1)
            with m.If(last_read):
                m.d.sync += reading.eq(0)

        result = Signal(WORD * lanes)
        a_words, b_words = lanes_of(p.a, lanes), lanes_of(p.b, lanes)
        quotients = []
        shift = named(m, o.shift[:5], "shift")
        results = []
        for k in range(lanes):
            lane = Module()
            a, b = Signal(signed(WORD), name="a"), Signal(signed(WORD), name="b")
            lane.d.comb += [a.eq(Mux(o.has_number, o.number, a_words[k])), b.eq(b_words[k])]
            aligned = round_shift(lane, a, shift)
            total = named(lane, aligned + b, "sum")
            difference = named(lane, aligned - b, "difference")
            product = round_shift(lane, named(lane, a * b, "product"), shift)
            chosen = Signal(signed(33), name="chosen")
            with lane.Switch(o.op):
                for name, value in (("ADD", total), ("SUB", difference), ("MUL", product)):
                    with lane.Case(OPS.index(name)):
                        lane.d.comb += chosen.eq(value)
            y = Signal(signed(WORD), name="y")
            lane.d.comb += y.eq(saturate(lane, chosen, o.bits))
            with lane.Switch(o.op):
                with lane.Case(OPS.index("SIG")):
                    entries = self.machine.sigmoid_entries
                    lane.d.comb += y.eq(sigmoid(lane, a, o.shift[:4], entries))
                with lane.Case(OPS.index("EXP")):
                    lane.d.comb += y.eq(exponential(lane, a, o.shift[:4]))
            results.append(y)
            quotients.append(self._divider(lane, a, b, o, step))
            m.submodules[f"lane{k}"] = lane
        keep_now = named(m, Mux(loaded_at == words - 1, keep, ~Const(0, lanes)), "keep_now")
        m.d.sync += result.eq(masked(results, keep_now))
        keep_div = named(m, Mux(last_read, keep, ~Const(0, lanes)), "keep_div")

        # A word of DIV: 0 read, 1 load, 2 to 32 steps, 33 write.
        with m.If(dividing):
            m.d.sync += step.eq(step + 1)
            with m.If(step == 33):
                m.d.sync += [step.eq(0), index.eq(index + 1)]
                with m.If(last_read):
                    m.d.sync += dividing.eq(0)
        m.d.comb += [
            p.write.eq(computed | (dividing & (step == 33))),
            p.write_register.eq(o.dst),
            p.write_address.eq(Mux(is_div, index, computed_at)),
            p.write_data.eq(Mux(is_div, masked(quotients, keep_div), result)),
            p.done.eq(p.write & (p.write_address == words - 1)),
        ]
        return m

    @staticmethod
    def _divider(lane: Module, a: Signal, b: Signal, o: object, step: Signal) -> Signal:
        """|a| 2^shift / |b| by restoring division, a bit a step."""
        size_a, size_b = Signal(16, name="size_a"), Signal(16, name="size_b")
        lane.d.comb += [size_a.eq(Mux(a < 0, -a, a)), size_b.eq(Mux(b < 0, -b, b))]
        numerator, rest = Signal(31, name="numerator"), Signal(17, name="rest")
        divisor = Signal(16, name="divisor")
        negative, zero, nothing = Signal(name="neg"), Signal(name="zero"), Signal(name="nothing")
        quotient = Signal(31, name="quotient")
        shift: Signal = o.shift  # type: ignore[attr-defined]
        bits: Signal = o.bits  # type: ignore[attr-defined]
        following = named(lane, Cat(numerator[30], rest[:16]), "following")
        fits = named(lane, following >= divisor, "fits")
        with lane.If(step == 1):
            lane.d.sync += [
                numerator.eq(size_a << shift[:4]),
                divisor.eq(size_b),
                rest.eq(0),
                quotient.eq(0),
                negative.eq((a < 0) ^ (b < 0)),
                zero.eq(b == 0),
                nothing.eq(a == 0),
            ]
        with lane.Elif((step >= 2) & (step <= 32)):
            lane.d.sync += [
                numerator.eq(numerator << 1),
                rest.eq(Mux(fits, following - divisor, following)),
                quotient.eq(Cat(fits, quotient[:30])),
            ]
        size = named(lane, Mux(zero, Mux(nothing, 0, 1 << 30), quotient), "size_q")
        return saturate(lane, named(lane, Mux(negative, -size, size), "signed_q"), bits)
