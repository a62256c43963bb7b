"""The load-store unit: vectors between memory and registers, eight beats a word."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from amaranth.hdl import Cat, Elaboratable, Module, Mux, Signal

from mmfree_jax.experiments.accelerator.isa import OPS
from mmfree_jax.experiments.accelerator.machine import BEATS_PER_WORD, Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import lanes_of, masked, named
from mmfree_jax.experiments.accelerator.rtl.control import (
    last_word_mask,
    latch_operands,
    word_count,
)
from mmfree_jax.experiments.accelerator.rtl.interface import MemoryPorts, Ports


class LoadStore(Elaboratable):
    """LDV and SV."""

    def __init__(self, machine: Machine, address_bits: int) -> None:
        self.machine = machine
        self.ports = Ports(machine.lanes, address_bits, "loadstore")
        self.memory = MemoryPorts(machine.bus_bits, "loadstore_memory")
        self.token_offset = Signal(32)

    def elaborate(self, platform: object) -> Module:
        """Collects beats into words, or cuts words into beats."""
        del platform
        m, p, mem, lanes = Module(), self.ports, self.memory, self.machine.lanes
        o = latch_operands(m, p, reads=())
        words = word_count(m, o.n, lanes)
        keep = last_word_mask(m, o.n, lanes)
        request = Signal()
        m.d.sync += request.eq(p.start)
        store = named(m, o.op == OPS.index("SV"), "store")
        m.d.comb += [
            mem.request.eq(request),
            mem.address.eq(o.extra + Mux(o.indexed, self.token_offset, 0)),
            mem.count.eq(words * BEATS_PER_WORD),
            mem.store.eq(store),
        ]
        index, part = Signal.like(p.address, name="index"), Signal(range(BEATS_PER_WORD))
        word_ends = named(m, mem.valid & (part == BEATS_PER_WORD - 1), "word_ends")
        # The next word is read while the last beat of this one goes out.
        m.d.comb += p.address.eq(Mux(word_ends, index + 1, index))
        with m.If(p.start):
            m.d.sync += [index.eq(0), part.eq(0)]
        with m.Elif(mem.valid):
            m.d.sync += part.eq(part + 1)
            with m.If(word_ends):
                m.d.sync += index.eq(index + 1)
        m.d.comb += mem.data.eq(p.a.word_select(part, self.machine.bus_bits))
        collected = Signal(16 * lanes)
        write, write_at = Signal(), Signal.like(p.address, name="write_at")
        with m.If(mem.valid):
            m.d.sync += collected.eq(Cat(collected[self.machine.bus_bits :], mem.read))
        m.d.sync += [write.eq(word_ends & ~store), write_at.eq(index)]
        last = named(m, write_at == words - 1, "last")
        values = lanes_of(collected, lanes)
        m.d.comb += [
            p.write.eq(write),
            p.write_register.eq(o.dst),
            p.write_address.eq(write_at),
            p.write_data.eq(masked(values, Mux(last, keep, (1 << lanes) - 1))),
            p.done.eq(Mux(store, word_ends & (index == words - 1), write & last)),
        ]
        return m
