"""Runs the RTL in Amaranth's own simulator."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false, reportCallIssue=false

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from amaranth.hdl import Module
from amaranth.sim import Simulator, SimulatorContext

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator.isa import Instruction
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.core import Core
from mmfree_jax.experiments.accelerator.rtl.memory_model import MemoryModel


@dataclass(frozen=True)
class Trace:
    """What one run of the program showed.

    Attributes:
      cycles: that it took.
      issued: cycle of each instruction's issue.
    """

    cycles: int
    issued: tuple[int, ...]


def simulate(
    program: Sequence[Instruction],
    memory: np.ndarray,
    machine: Machine,
    *,
    token_offsets: Sequence[int] = (0,),
) -> list[Trace]:
    """Runs the program on the RTL, once for each token; `memory` is changed in place.

    Raises:
      ConfigError: cycles_per_beat is not whole.
    """
    if machine.cycles_per_beat != int(machine.cycles_per_beat):
        raise ConfigError(
            f"cycles_per_beat is {machine.cycles_per_beat}: the RTL's memory takes whole numbers"
        )
    core, model = Core(program, machine), MemoryModel(memory, machine)
    top = Module()
    top.submodules.core, top.submodules.memory = core, model
    a, b = core.memory, model.port
    top.d.comb += [
        b.request.eq(a.request),
        b.address.eq(a.address),
        b.count.eq(a.count),
        b.store.eq(a.store),
        b.data.eq(a.data),
        a.valid.eq(b.valid),
        a.read.eq(b.read),
    ]
    traces: list[Trace] = []

    async def bench(ctx: SimulatorContext) -> None:
        for offset in token_offsets:
            ctx.set(core.token_offset, offset)
            ctx.set(core.start, 1)
            await ctx.tick()
            ctx.set(core.start, 0)
            issued, cycle = [], 0
            while ctx.get(core.running):
                if ctx.get(core.issue):
                    issued.append(cycle)
                cycle += 1
                await ctx.tick()
            traces.append(Trace(ctx.get(core.cycles), tuple(issued)))
        size = machine.lanes // 4
        for k in range(len(memory) // size):
            word = ctx.get(model.cells.data[k])
            memory[k * size : (k + 1) * size] = np.frombuffer(
                word.to_bytes(size, "little"), np.uint8
            )

    simulator = Simulator(top)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return traces
