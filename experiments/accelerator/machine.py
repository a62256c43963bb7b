"""The machine and its timing model: how many cycles each instruction takes, and when it starts.

One instruction is issued a cycle, in order. It waits while its unit works, while a register that
it names is held by a unit, and, if it needs the memory, while the load-store or the ternary
unit works: they share one port. Otherwise instructions overlap. The RTL in `rtl/` takes the
same cycles, which its tests compare one by one.

The memory answers a request after `memory_latency` cycles and then moves one beat of `bus_bits`
every `cycles_per_beat` cycles: 1 with bursts; more where each beat is a request of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.isa import ROW_WISE, Instruction

UNITS = ("row-wise", "norm", "load-store", "ternary")
BITS_PER_TRIT = 2
# Beats of a vector word: 16 bits a lane over a bus of 2 bits a lane.
BEATS_PER_WORD = fixed.WORD_BITS // BITS_PER_TRIT
DIV_CYCLES = 34  # a word: read, load, 31 steps, write


@dataclass(frozen=True)
class Machine:
    """One core and its memory.

    Raises:
      ConfigError: a field that the hardware cannot have.
    """

    lanes: int = 4
    """Elements that every unit handles in one cycle: a multiple of 4. The bus has two bits, one
    trit, for each: 4 lanes are the paper's 8-bit reads, 256 its projected 512-bit bus."""
    vector_length: int = 4096
    """Elements of a vector register; at least the widest vector of the model."""
    memory_latency: int = 8
    """Cycles from a request to its first beat, at least 1."""
    cycles_per_beat: float = 1.0
    """Cycles between beats; the RTL takes whole numbers."""
    clock_mhz: float = 60.0
    """Clock (MHz)."""
    sigmoid_entries: int = fixed.SIGMOID_ENTRIES
    """Of the sigmoid's table."""
    newton_steps: int = fixed.NEWTON_STEPS
    """Of the inverse square root."""

    def __post_init__(self) -> None:
        for name, least in (("lanes", 4), ("vector_length", 1), ("memory_latency", 1)):
            value = getattr(self, name)
            if value < least:
                raise ConfigError(f"{name} is {value}: set {least} or more")
        if self.lanes % 4:
            raise ConfigError(f"lanes is {self.lanes}: choose a multiple of 4, for whole bytes")
        if self.sigmoid_entries not in (0, 8, 16, 32, 64) or not -1 <= self.newton_steps <= 5:
            raise ConfigError(
                f"sigmoid_entries is {self.sigmoid_entries} and newton_steps {self.newton_steps}: "
                "set 8, 16, 32 or 64, and 0 to 5"
            )
        if self.cycles_per_beat < 1 or self.clock_mhz <= 0:
            raise ConfigError(
                f"cycles_per_beat is {self.cycles_per_beat} and clock_mhz {self.clock_mhz}: set at "
                "least 1 and more than 0"
            )

    @property
    def bus_bits(self) -> int:
        """Width of the memory bus."""
        return BITS_PER_TRIT * self.lanes

    def words(self, elements: int) -> int:
        """Vector words that hold `elements`."""
        return -(-elements // self.lanes)


def unit_of(i: Instruction) -> str:
    """The unit that executes an instruction."""
    if i.op in ROW_WISE:
        return "row-wise"
    return {"NORM": "norm", "TMATMUL": "ternary"}.get(i.op, "load-store")


def beats_of(i: Instruction, machine: Machine) -> int:
    """Beats that it moves over the memory bus."""
    if i.op in ("LDV", "SV"):
        return BEATS_PER_WORD * machine.words(i.n)
    return i.n * machine.words(i.k) if i.op == "TMATMUL" else 0


def cycles_of(i: Instruction, machine: Machine) -> int:
    """Cycles from its issue until another may use its unit and registers."""
    words = machine.words(i.n)
    if i.op == "DIV":
        return DIV_CYCLES * words + 1
    if i.op in ROW_WISE:
        return words + 3
    if i.op == "NORM":
        return 2 * words + 8 + 3 * machine.newton_steps
    transfer = machine.memory_latency + math.ceil(
        (beats_of(i, machine) - 1) * machine.cycles_per_beat
    )
    return transfer + {"LDV": 3, "SV": 2, "TMATMUL": 6}[i.op]


@dataclass(frozen=True)
class Timeline:
    """When a program's instructions run.

    Attributes:
      issued: cycle of each instruction's issue; the first is 0.
      finished: cycle from which its unit and registers are free.
      busy: cycles that each unit works.
      beats: beats moved over the memory bus.
    """

    issued: tuple[int, ...]
    finished: tuple[int, ...]
    busy: dict[str, int]
    beats: int

    @property
    def cycles(self) -> int:
        """Of the whole program."""
        return max(self.finished, default=0)

    @property
    def stalled(self) -> int:
        """Cycles in which nothing was issued while instructions were left."""
        return (self.issued[-1] + 1 - len(self.issued)) if self.issued else 0


def timeline(program: Sequence[Instruction], machine: Machine) -> Timeline:
    """Issues a program on the scoreboard; needs no data."""
    unit_free: dict[str, int] = dict.fromkeys(UNITS, 0)
    register_free = [0] * 8
    busy: dict[str, int] = dict.fromkeys(UNITS, 0)
    issued, finished, beats, now = [], [], 0, 0
    for i in program:
        unit = unit_of(i)
        free = [unit_free[unit], *(register_free[r] for r in i.registers())]
        if unit in ("load-store", "ternary"):
            free += [unit_free["load-store"], unit_free["ternary"]]
        start = max(now, *free)
        end = start + cycles_of(i, machine)
        unit_free[unit] = end
        for r in i.registers():
            register_free[r] = end
        busy[unit] += end - start
        beats += beats_of(i, machine)
        issued.append(start)
        finished.append(end)
        now = start + 1
    return Timeline(tuple(issued), tuple(finished), busy, beats)
