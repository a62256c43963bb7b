"""The norm unit: squares, their sum, an inverse root, and a second pass that multiplies."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from amaranth.hdl import Const, Elaboratable, Module, Mux, Signal, signed

from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import (
    WORD,
    constants,
    lanes_of,
    masked,
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
from mmfree_jax.experiments.accelerator.rtl.interface import Ports

_SUM_BITS = 46


class Norm(Elaboratable):
    """NORM; see `fixed.norm` for what it computes."""

    def __init__(self, machine: Machine, address_bits: int) -> None:
        self.machine = machine
        self.ports = Ports(machine.lanes, address_bits, "norm")

    def elaborate(self, platform: object) -> Module:
        """Two passes over the vector around a scalar sequence."""
        del platform
        m, p, lanes = Module(), self.ports, self.machine.lanes
        o = latch_operands(m, p, reads=("a",))
        words = word_count(m, o.n, lanes)
        keep = last_word_mask(m, o.n, lanes)
        index = Signal.like(p.address, name="index")
        reading, second = Signal(), Signal()
        loaded, loaded_at = Signal(), Signal.like(p.address, name="loaded_at")
        later, later_at = Signal(), Signal.like(p.address, name="later_at")
        last_read = named(m, index == words - 1, "last_read")
        m.d.comb += p.address.eq(index)
        m.d.sync += [
            loaded.eq(reading),
            loaded_at.eq(index),
            later.eq(loaded),
            later_at.eq(loaded_at),
        ]
        with m.If(reading):
            m.d.sync += index.eq(index + 1)
            with m.If(last_read):
                m.d.sync += reading.eq(0)
        final = named(m, loaded_at == words - 1, "final")
        keep_now = named(m, Mux(final, keep, ~Const(0, lanes)), "keep_now")
        x = [named(m, v, f"x{k}") for k, v in enumerate(lanes_of(p.a, lanes))]

        # First pass: the sum of squares.
        squares = [
            named(m, Mux(keep_now[k], (v * v)[:31], 0), f"square{k}") for k, v in enumerate(x)
        ]
        partial, total = Signal(_SUM_BITS), Signal(_SUM_BITS)
        m.d.sync += partial.eq(tree_sum(m, squares, "tree"))
        with m.If(p.start):
            m.d.sync += [total.eq(p.operands.extra), index.eq(0), reading.eq(1), second.eq(0)]
        with m.Elif(later & ~second):
            m.d.sync += total.eq(total + partial)

        # The scalar sequence starts when the last partial sum is in.
        stage = Signal(range(3 * self.machine.newton_steps + 4), name="stage")
        summed = Signal()
        m.d.sync += summed.eq(later & ~second & (later_at == words - 1))
        mantissa, half = Signal(16), Signal(5)
        found, found_half = Signal(16, name="found"), Signal(5, name="found_half")
        for e in range(1, _SUM_BITS // 2 + 1):  # the highest pair that is not zero decides
            with m.If(total[2 * e - 2 : 2 * e] != 0):
                shifted = total >> (2 * e - 16) if e > 8 else total << (16 - 2 * e)
                m.d.comb += [found.eq(shifted[:16]), found_half.eq(e)]
        y, square, correction = Signal(16), Signal(17), Signal(17)
        gain, count = Signal(15), Signal(5)
        with m.If(summed):
            m.d.sync += [mantissa.eq(found), half.eq(found_half), stage.eq(1)]
        with m.If(stage == 1):
            seed = constants(fixed.rsqrt_table(), 16)[(mantissa - (1 << 14))[11:16]]
            m.d.sync += [y.eq(seed), stage.eq(2)]
        for step in range(self.machine.newton_steps):
            with m.If(stage == 2 + 3 * step):
                m.d.sync += [square.eq((y * y) >> 15), stage.eq(stage + 1)]
            with m.If(stage == 3 + 3 * step):
                product = named(m, (mantissa * square) >> 14, f"product{step}")
                m.d.sync += [correction.eq(((3 << 15) - product) >> 1), stage.eq(stage + 1)]
            with m.If(stage == 4 + 3 * step):
                better = named(m, (y * correction) >> 15, f"better{step}")
                m.d.sync += [y.eq(Mux(better > 32_767, 32_767, better)), stage.eq(stage + 1)]
        with m.If(stage == 2 + 3 * self.machine.newton_steps):
            total_shift = Signal(signed(8), name="total_shift")
            m.d.comb += total_shift.eq(o.shift + half)
            m.d.sync += [
                gain.eq((y * o.root) >> 15),
                count.eq(Mux(total_shift < 0, 0, Mux(total_shift > 30, 30, total_shift))),
                stage.eq(0),
                index.eq(0),
                reading.eq(1),
                second.eq(1),
            ]

        # Second pass: the product with the gain.
        result = Signal(WORD * lanes)
        scaled = []
        for k, v in enumerate(x):
            product = Signal(signed(33), name=f"scaled{k}")
            m.d.comb += product.eq(v * gain)
            scaled.append(saturate(m, round_shift(m, product, count), o.bits))
        m.d.sync += result.eq(masked(scaled, keep_now))
        m.d.comb += [
            p.write.eq(later & second),
            p.write_register.eq(o.dst),
            p.write_address.eq(later_at),
            p.write_data.eq(result),
            p.done.eq(p.write & (later_at == words - 1)),
        ]
        return m
