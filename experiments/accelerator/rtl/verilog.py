"""The core as Verilog: emitted by Yosys, run by Icarus Verilog, counted in cells by Yosys."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from amaranth.back import rtlil
from amaranth.hdl import Value

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator.isa import REGISTERS, Instruction
from mmfree_jax.experiments.accelerator.machine import Machine
from mmfree_jax.experiments.accelerator.rtl.arithmetic import WORD
from mmfree_jax.experiments.accelerator.rtl.core import Core
from mmfree_jax.experiments.accelerator.rtl.loadstore import LoadStore
from mmfree_jax.experiments.accelerator.rtl.norm import Norm
from mmfree_jax.experiments.accelerator.rtl.rowwise import RowWise
from mmfree_jax.experiments.accelerator.rtl.simulation import Trace
from mmfree_jax.experiments.accelerator.rtl.ternary import Ternary
from mmfree_jax.experiments.accelerator.rtl.tools import (
    ToolError,
    icarus_commands,
    run_tool,
    yosys_command,
)

_BENCH = """`timescale 1ns/1ps
module bench;
  reg clk = 0, rst = 0, start = 0;
  reg [31:0] token_offset = 0;
  wire running, issue, request, store;
  wire [31:0] cycles, address, count;
  wire [{bus}:0] data;
  wire [{index}:0] issue_index;
  reg [{bus}:0] cells [0:{last}];
  reg [31:0] left = 0, wait_for = 0, where = 0;
  reg storing = 0;
  wire valid = left != 0 && wait_for == 0;
  core dut (.clk(clk), .rst(rst), .start(start), .token_offset(token_offset),
    .running(running), .cycles(cycles), .issue(issue), .issue_index(issue_index),
    .memory_request(request), .memory_address(address), .memory_count(count),
    .memory_store(store), .memory_valid(valid), .memory_read(cells[where]),
    .memory_data(data));
  always #5 clk = ~clk;
  integer cycle = 0, token = 0;
  reg [31:0] offsets [0:{last_token}];
  always @(posedge clk) begin
    if (valid && storing) cells[where] <= data;
    if (request) begin
      left <= count; where <= address; storing <= store; wait_for <= {latency} - 1;
    end else if (valid) begin
      left <= left - 1; where <= where + 1; wait_for <= {per_beat} - 1;
    end else if (left != 0) wait_for <= wait_for - 1;
    if (running) begin
      if (issue) $display("issue %0d %0d %0d", token, issue_index, cycle);
      cycle <= cycle + 1;
    end
  end
  initial begin
    $readmemh("memory.hex", cells);
    $readmemh("offsets.hex", offsets);
    for (token = 0; token <= {last_token}; token = token + 1) begin
      @(negedge clk); token_offset = offsets[token]; start = 1;
      @(negedge clk); start = 0; cycle = 0;
      while (running) @(negedge clk);
      $display("cycles %0d %0d", token, cycles);
    end
    $writememh("after.hex", cells);
    $finish;
  end
endmodule
"""


def emit(program: Sequence[Instruction], machine: Machine, folder: Path) -> Path:
    """Writes `core.v`, the core with this program in its ROM.

    Raises:
      ConfigError: Yosys is not installed.
      ToolError: it failed.
    """
    (folder / "core.il").write_text(_rtlil(program, machine), encoding="utf-8")
    script = "read_rtlil core.il; proc; write_verilog -noattr core.v"
    run_tool([*yosys_command(), "-q", "-p", script], folder)
    return folder / "core.v"


def _rtlil(program: Sequence[Instruction], machine: Machine) -> str:
    core = Core(program, machine)
    mem = core.memory
    ports = [core.start, core.token_offset, core.running, core.cycles, core.issue]
    ports += [core.issue_index, mem.request, mem.address, mem.count, mem.store]
    ports += [mem.valid, mem.read, mem.data]
    return rtlil.convert(core, name="core", ports=ports)


def _unit_rtlil(name: str, machine: Machine) -> str:
    kinds = {"rowwise": RowWise, "norm": Norm, "loadstore": LoadStore, "ternary": Ternary}
    if name not in kinds:
        raise ConfigError(f"unit is {name!r}: choose one of {', '.join(kinds)}")
    unit = kinds[name](machine, machine.words(machine.vector_length).bit_length())
    ports = [Value.cast(signal) for signal in vars(unit.ports).values()]
    if hasattr(unit, "memory"):
        ports += vars(unit.memory).values()
    return rtlil.convert(unit, name=name, ports=ports)


def run_icarus(
    program: Sequence[Instruction],
    memory: np.ndarray,
    machine: Machine,
    folder: Path,
    *,
    token_offsets: Sequence[int] = (0,),
) -> list[Trace]:
    """Emits the Verilog and runs it; `memory` is changed in place. Files stay in `folder`.

    Raises:
      ConfigError: a tool is not installed, or cycles_per_beat is not whole.
      ToolError: a tool failed.
    """
    compiler, simulator = icarus_commands()
    if machine.cycles_per_beat != int(machine.cycles_per_beat):
        raise ConfigError(f"cycles_per_beat is {machine.cycles_per_beat}: set a whole number")
    emit(program, machine, folder)
    size = machine.lanes // 4
    beats = memory.reshape(-1, size)[:, ::-1]
    _write(folder / "memory.hex", "".join(f"{row.tobytes().hex()}\n" for row in beats))
    _write(folder / "offsets.hex", "".join(f"{offset:x}\n" for offset in token_offsets))
    bench = _BENCH
    for name, value in {
        "bus": machine.bus_bits - 1,
        "index": len(program).bit_length() - 1,
        "last": len(beats) - 1,
        "last_token": len(token_offsets) - 1,
        "latency": machine.memory_latency,
        "per_beat": int(machine.cycles_per_beat),
    }.items():
        bench = bench.replace(f"{{{name}}}", str(value))
    _write(folder / "bench.v", bench)
    run_tool([compiler, "-g2005", "-o", "bench.vvp", "bench.v", "core.v"], folder)
    printed = run_tool([simulator, "bench.vvp"], folder)
    issued: list[list[int]] = [[] for _ in token_offsets]
    for token, _, cycle in re.findall(r"^issue (\d+) (\d+) (\d+)$", printed, re.M):
        issued[int(token)].append(int(cycle))
    cycles = [int(n) for _, n in re.findall(r"^cycles (\d+) (\d+)$", printed, re.M)]
    if len(cycles) != len(token_offsets):
        raise ToolError(f"vvp in {folder} ended after {len(cycles)} of {len(token_offsets)} tokens")
    words = re.findall(r"^[0-9a-fA-F]+$", (folder / "after.hex").read_text(), re.M)
    after = np.frombuffer(bytes.fromhex("".join(words)), np.uint8).reshape(-1, size)[:, ::-1]
    memory[:] = after.reshape(-1)
    return [Trace(c, tuple(i)) for c, i in zip(cycles, issued, strict=True)]


@dataclass(frozen=True)
class Cells:
    """What synthesis needs: 6-input look-up tables, flip-flops, multipliers, bits of SRAM."""

    luts: int
    flip_flops: int
    multipliers: int
    memory_bits: int


# Carry chains become look-up tables too, so that LUTs are more than a vendor's tool would need;
# multipliers and memories stay whole, as DSP blocks and block RAM would.
_SYNTHESIS = """read_rtlil core.il
hierarchy -top {top}
proc
opt_expr
opt_clean
wreduce
peepopt
opt
memory -nomap
opt_clean
techmap t:* t:$mul %d t:$mem_v2 %d
opt -fast
abc -lut 6
opt_clean
tee -q -o stat.txt stat
"""


def cell_counts(machine: Machine, folder: Path, *, unit: str | None = None) -> dict[str, Cells]:
    """Cells of a core, or of one of its units, by Yosys for a generic FPGA of 6-input LUTs.

    The program is one instruction, so that the ROM does not count.

    Args:
      machine: lanes and registers' length.
      folder: for files.
      unit: "rowwise", "norm", "loadstore" or "ternary"; None: the whole core.

    Returns:
      Cells of each module by its name ("core.ternary", or "ternary" alone; "core" itself has the
      scoreboard and the registers), and their sum as "total".

    Raises:
      ConfigError: Yosys is not installed.
      ToolError: it failed.
    """
    if unit is None:
        _write(folder / "core.il", _rtlil([Instruction("ADD", 0, 0, 0)], machine))
    else:
        _write(folder / "core.il", _unit_rtlil(unit, machine))
    _write(folder / "synthesis.ys", _SYNTHESIS.replace("{top}", unit or "core"))
    run_tool([*yosys_command(), "-q", "synthesis.ys"], folder)
    modules = {}
    text = (folder / "stat.txt").read_text(encoding="utf-8")
    for name, body in re.findall(r"=== (\S+) ===\n(.*?)(?=\n===|\Z)", text, re.S):
        if name == "design":
            continue
        counts = {kind: int(n) for kind, n in re.findall(r"^\s+(\$\S+)\s+(\d+)$", body, re.M)}
        counts |= {kind: int(n) for n, kind in re.findall(r"^\s+(\d+)\s+(\$\S+)$", body, re.M)}
        flip_flops = sum(n for kind, n in counts.items() if "DFF" in kind or kind == "$_FF_")
        # The registers are whole memories in the netlist: their size is their definition's.
        bits = REGISTERS * WORD * machine.lanes * machine.words(machine.vector_length)
        modules[name.lstrip("\\")] = Cells(
            counts.get("$lut", 0), flip_flops, counts.get("$mul", 0), bits if name == "core" else 0
        )
    if not modules:
        raise ToolError(f"yosys in {folder} gave no statistics: see stat.txt")
    columns = zip(*(vars(cells).values() for cells in modules.values()), strict=True)
    return modules | {"total": Cells(*(sum(column) for column in columns))}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
