"""What the core and its units say to each other."""

# Amaranth's declared types do not cover what it makes at run time; and it is an extra.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportMissingImports=false

from amaranth.hdl import Signal, signed, unsigned
from amaranth.lib import data

from mmfree_jax.experiments.accelerator.isa import FIELDS, REGISTERS

_SIGNED = {"number": signed(16), "shift": signed(6)}


def operands_layout() -> data.StructLayout:
    """The fields of an instruction word that units read; `isa.FIELDS` says where they lie."""
    return data.StructLayout(
        {name: _SIGNED.get(name, unsigned(width)) for name, (_, width) in FIELDS.items()}
    )


class Ports:
    """Signals of one unit.

    Attributes:
      start: the instruction on `operands` begins (one cycle).
      operands: its fields; valid with `start`.
      busy: from the next cycle on, until the cycle after `done`.
      done: last cycle of the instruction.
      held: registers that it holds, a bit each.
      address: word of every register held that is read.
      a, b: the word of the source registers, a cycle after `address`.
      write, write_address, write_data: to the result register.
      write_register: that register.
    """

    def __init__(self, lanes: int, address_bits: int, prefix: str) -> None:
        word = 16 * lanes
        self.start = Signal(name=f"{prefix}_start")
        self.operands = Signal(operands_layout(), name=f"{prefix}_operands")
        self.busy = Signal(name=f"{prefix}_busy")
        self.done = Signal(name=f"{prefix}_done")
        self.held = Signal(REGISTERS, name=f"{prefix}_held")
        self.address = Signal(address_bits, name=f"{prefix}_address")
        self.source_a = Signal(3, name=f"{prefix}_source_a")
        self.source_b = Signal(3, name=f"{prefix}_source_b")
        self.a = Signal(word, name=f"{prefix}_a")
        self.b = Signal(word, name=f"{prefix}_b")
        self.write = Signal(name=f"{prefix}_write")
        self.write_register = Signal(3, name=f"{prefix}_write_register")
        self.write_address = Signal(address_bits, name=f"{prefix}_write_address")
        self.write_data = Signal(word, name=f"{prefix}_write_data")


class MemoryPorts:
    """A request for a run of beats, and the beats.

    Attributes:
      request: one cycle; with address, count and write.
      address: first beat.
      count: beats.
      store: the beats go to the memory.
      valid: a beat moves in this cycle.
      read: its data, from the memory.
      data: its data, to the memory.
    """

    def __init__(self, bus_bits: int, prefix: str) -> None:
        self.request = Signal(name=f"{prefix}_request")
        self.address = Signal(32, name=f"{prefix}_address")
        self.count = Signal(32, name=f"{prefix}_count")
        self.store = Signal(name=f"{prefix}_store")
        self.valid = Signal(name=f"{prefix}_valid")
        self.read = Signal(bus_bits, name=f"{prefix}_read")
        self.data = Signal(bus_bits, name=f"{prefix}_data")
