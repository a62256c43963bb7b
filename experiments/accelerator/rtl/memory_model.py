"""A memory that answers as the timing model says; for simulation, not for synthesis."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

import numpy as np
from amaranth.hdl import Elaboratable, Module, Signal, unsigned
from amaranth.lib.memory import Memory

from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.interface import MemoryPorts


class MemoryModel(Elaboratable):
    """Bytes behind a `MemoryPorts`: latency, then a beat every `cycles_per_beat` cycles."""

    def __init__(self, image: np.ndarray, machine: Machine) -> None:
        self.machine = machine
        self.port = MemoryPorts(machine.bus_bits, "model")
        beats = image.reshape(-1, machine.lanes // 4)
        init = [int.from_bytes(row.tobytes(), "little") for row in beats]
        self.cells = Memory(shape=unsigned(machine.bus_bits), depth=len(init), init=init)

    def elaborate(self, platform: object) -> Module:
        """A counter of beats and one of cycles."""
        del platform
        m, p = Module(), self.port
        m.submodules.cells = self.cells
        reader, writer = self.cells.read_port(domain="comb"), self.cells.write_port()
        left, wait = Signal(32), Signal(32)
        where, store = Signal(32), Signal()
        m.d.comb += [
            p.valid.eq((left != 0) & (wait == 0)),
            reader.addr.eq(where),
            p.read.eq(reader.data),
            writer.addr.eq(where),
            writer.data.eq(p.data),
            writer.en.eq(p.valid & store),
        ]
        with m.If(p.request):
            m.d.sync += [
                left.eq(p.count),
                where.eq(p.address),
                store.eq(p.store),
                wait.eq(self.machine.memory_latency - 1),
            ]
        with m.Elif(p.valid):
            m.d.sync += [
                left.eq(left - 1),
                where.eq(where + 1),
                wait.eq(int(self.machine.cycles_per_beat) - 1),
            ]
        with m.Elif(left != 0):
            m.d.sync += wait.eq(wait - 1)
        return m
