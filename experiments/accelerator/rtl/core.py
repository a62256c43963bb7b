"""The core: program counter, instruction memory, scoreboard, eight registers, four units."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from collections.abc import Sequence

from amaranth.hdl import Elaboratable, Module, Mux, Signal, unsigned
from amaranth.lib.memory import Memory

from mmfree_jax.experiments.accelerator.isa import (
    FIELDS,
    OPS,
    REGISTERS,
    ROW_WISE,
    Instruction,
    encode,
)
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import named
from mmfree_jax.experiments.accelerator.rtl.interface import MemoryPorts, operands_layout
from mmfree_jax.experiments.accelerator.rtl.loadstore import LoadStore
from mmfree_jax.experiments.accelerator.rtl.norm import Norm
from mmfree_jax.experiments.accelerator.rtl.rowwise import RowWise
from mmfree_jax.experiments.accelerator.rtl.ternary import Ternary


class Core(Elaboratable):
    """One core with its program in ROM.

    Attributes:
      start: runs the program once (one cycle).
      token_offset: added to indexed addresses (beats); held while running.
      running: from the cycle after `start` to the program's end.
      cycles: that the program took, as `machine.timeline` counts them.
      issue, issue_index: an instruction is issued in this cycle, and which.
      memory: the one memory port.
    """

    def __init__(self, program: Sequence[Instruction], machine: Machine) -> None:
        self.program, self.machine = list(program), machine
        self.depth = machine.words(machine.vector_length)
        self.start, self.running = Signal(name="start"), Signal(name="running")
        self.token_offset = Signal(32, name="token_offset")
        self.cycles = Signal(32, name="cycles")
        self.issue = Signal(name="issue")
        self.issue_index = Signal(range(len(self.program) + 1), name="issue_index")
        self.memory = MemoryPorts(machine.bus_bits, "memory")

    def elaborate(self, platform: object) -> Module:
        """Wires the units to the registers and the memory, and issues."""
        del platform
        m, machine = Module(), self.machine
        address_bits = max(1, self.depth.bit_length())
        m.submodules.rowwise = rowwise = RowWise(machine, address_bits)
        m.submodules.norm = norm = Norm(machine, address_bits)
        m.submodules.loadstore = loadstore = LoadStore(machine, address_bits)
        m.submodules.ternary = ternary = Ternary(machine, address_bits)
        units = [rowwise, norm, loadstore, ternary]
        ports = [unit.ports for unit in units]

        # Instruction memory: read without a clock, as look-up tables.
        words = [encode(i) for i in self.program]
        m.submodules.rom = rom = Memory(shape=unsigned(128), depth=max(2, len(words)), init=words)
        fetch = rom.read_port(domain="comb")
        at = self.issue_index
        m.d.comb += fetch.addr.eq(at)
        operands = Signal(operands_layout(), name="fetched")
        m.d.comb += operands.as_value().eq(0)
        for name, (first, width) in FIELDS.items():
            m.d.comb += operands[name].eq(fetch.data[first : first + width])

        # Scoreboard.
        held = named(m, ports[0].held | ports[1].held | ports[2].held | ports[3].held, "held")
        wanted = Signal(REGISTERS, name="wanted")
        m.d.comb += wanted.eq((1 << operands.dst) | (1 << operands.a) | (1 << operands.b))
        op = operands.op
        is_row = Signal(name="is_row")
        m.d.comb += is_row.eq(op < len(ROW_WISE))
        chosen = [
            is_row,
            op == OPS.index("NORM"),
            (op == OPS.index("LDV")) | (op == OPS.index("SV")),
            op == OPS.index("TMATMUL"),
        ]
        memory_busy = named(m, loadstore.ports.busy | ternary.ports.busy, "memory_busy")
        waits = (
            (chosen[0] & rowwise.ports.busy)
            | (chosen[1] & norm.ports.busy)
            | ((chosen[2] | chosen[3]) & memory_busy)
            | (held & wanted).any()
        )
        ended = named(m, at == len(self.program), "ended")
        m.d.comb += self.issue.eq(self.running & ~ended & ~waits)
        with m.If(self.start & ~self.running):
            m.d.sync += [at.eq(0), self.running.eq(1), self.cycles.eq(0)]
        with m.Elif(self.issue):
            m.d.sync += at.eq(at + 1)
        for unit, choice in zip(ports, chosen, strict=True):
            m.d.comb += [unit.start.eq(self.issue & choice), unit.operands.eq(operands)]
        any_busy = named(m, ports[0].busy | ports[1].busy | memory_busy, "any_busy")
        with m.If(self.running):
            with m.If(ended & ~any_busy):
                m.d.sync += self.running.eq(0)
            with m.Else():
                m.d.sync += self.cycles.eq(self.cycles + 1)

        # Registers: one read and one write port each, owned by the unit that holds it.
        read = []
        for r in range(REGISTERS):
            bank = Memory(shape=unsigned(16 * machine.lanes), depth=self.depth, init=[])
            m.submodules[f"v{r}"] = bank
            reader, writer = bank.read_port(), bank.write_port()
            address, write, where, data = 0, 0, 0, 0
            for unit in ports:
                hit = unit.write & (unit.write_register == r)
                address = address | Mux(unit.held[r], unit.address, 0)
                write = write | hit
                where = where | Mux(hit, unit.write_address, 0)
                data = data | Mux(hit, unit.write_data, 0)
            m.d.comb += [
                reader.addr.eq(address),
                writer.en.eq(write),
                writer.addr.eq(where),
                writer.data.eq(data),
            ]
            read.append(reader.data)
        for unit in ports:
            for source, word in ((unit.source_a, unit.a), (unit.source_b, unit.b)):
                with m.Switch(source):
                    for r in range(REGISTERS):
                        with m.Case(r):
                            m.d.comb += word.eq(read[r])

        # Memory: the unit that is busy has the port.
        mem, load, stream = self.memory, loadstore.memory, ternary.memory
        m.d.comb += [
            mem.request.eq(load.request | stream.request),
            mem.address.eq(Mux(stream.request, stream.address, load.address)),
            mem.count.eq(Mux(stream.request, stream.count, load.count)),
            mem.store.eq(load.request & load.store),
            mem.data.eq(load.data),
            load.valid.eq(mem.valid & loadstore.ports.busy),
            stream.valid.eq(mem.valid & ternary.ports.busy),
            load.read.eq(mem.read),
            stream.read.eq(mem.read),
            loadstore.token_offset.eq(self.token_offset),
        ]
        return m
