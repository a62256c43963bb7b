"""The paper's FPGA tables (arXiv 2406.02528v7, appendix A), laws that give their rows, and what
does not agree.

A law is fitted to as few rows as it has parameters; the other rows are held out and predicted.
Everything here is about published numbers: nothing was measured by us on a board.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from mmfree_jax.experiments.accelerator.compile import fitting, shape_program
from mmfree_jax.experiments.accelerator.machine import Machine, timeline
from mmfree_jax.model_config import ModelConfig

CHANNELS = 4
BURST_FACTOR = 64  # 512 bits for 8
DEVICE_M20K = 11_721  # Intel's Stratix 10 SX 2800, the D5005's device


@dataclass(frozen=True)
class CoresRow:
    """A row of Table 4 (d = 512, one block). Power as printed: "Core Active", "Core Idle"."""

    cores: int
    alm_core: float
    alm_total: float
    m20k_core: float
    m20k_total: float
    power_active: float
    power_idle: float
    core_ms: float
    ddr_ms: float


@dataclass(frozen=True)
class WidthRow:
    """A row of Table 5 (one core, one block)."""

    width: int
    block_ms: float
    burst_ms: float
    power_idle: float
    power_active: float
    alm_core: float
    alm_total: float
    clock_mhz: float


TABLE_4 = (
    CoresRow(1, 2.9, 9.0, 0.01, 2.87, 13.67, 13.68, 46.36, 0.09),
    CoresRow(8, 23.21, 26.9, 0.08, 3.06, 39.78, 39.94, 46.36, 0.18),
    CoresRow(16, 46.43, 50.1, 0.15, 5.13, 75.25, 73.97, 46.36, 0.72),
    CoresRow(26, 75.45, 100.0, 0.25, 22.64, 166.30, 149.66, 46.36, 5.76),
)
TABLE_5 = (
    WidthRow(512, 43.0, 0.67, 13.36, 13.39, 2.8, 9.0, 60.0),
    WidthRow(1024, 112.0, 1.75, 13.64, 13.65, 5.7, 11.0, 54.0),
    WidthRow(2048, 456.0, 7.13, 13.92, 13.93, 11.0, 16.0, 52.0),
)


@dataclass(frozen=True)
class Prediction:
    """A published value beside ours.

    Attributes:
      table: "4" or "5".
      row: which row.
      quantity: what, with its unit.
      published: value printed.
      predicted: by the law.
      fitted: the law's parameters come from this row; otherwise it was held out.
    """

    table: str
    row: str
    quantity: str
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Relative error."""
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class Laws:
    """The fitted parameters, all of them.

    Attributes:
      cycles_per_beat: cycles for each 8-bit read, from Table 5's d = 2048.
      ddr_ms: memory latency of one core on a channel, from Table 4's first row.
      dynamic_w: power by which active and idle differ for one core on a channel, from the same.
      idle_w, idle_w_per_alm: idle power, linear in the share of ALMs (%), from Table 4's rows of
        1 and 8 cores.
      alm_per_core: ALMs of one core (%), from the row of 8 cores.
      shell_alm: ALMs outside the cores (%), from the row of 8 cores.
      m20k_per_core: SRAM blocks of one core (%), from the row of 26 cores, the least rounded.
      core_ms: latency of a core, whatever their number, from Table 4's first row.
      alm_per_channel: ALMs of one core for each of its d (%), from Table 5's d = 512.
      card_w, card_w_per_doubling: idle power by d, from Table 5's d = 512 and 1024.
    """

    cycles_per_beat: float
    ddr_ms: float
    dynamic_w: float
    idle_w: float
    idle_w_per_alm: float
    alm_per_core: float
    shell_alm: float
    m20k_per_core: float
    core_ms: float
    alm_per_channel: float
    card_w: float
    card_w_per_doubling: float


def arbitration(cores: int) -> int:
    """Cost of sharing the four channels: each further core on one doubles it."""
    return 2 ** (math.ceil(cores / CHANNELS) - 1)


def block_config(width: int) -> ModelConfig:
    """A model of blocks as the paper's, `width` wide."""
    return ModelConfig(hidden_size=width, num_layers=2)


def block_cycles(width: int, cycles_per_beat: float) -> int:
    """Cycles of one block on the paper's core: 8-bit reads."""
    config = block_config(width)
    machine = fitting(Machine(lanes=4, cycles_per_beat=cycles_per_beat), config)
    return timeline(shape_program(config, machine, block_only=True).program, machine).cycles


def fit() -> Laws:
    """The laws' parameters from the rows named in `Laws`."""
    one, eight = TABLE_4[0], TABLE_4[1]
    small, middle, large = TABLE_5
    slope = (eight.power_active - one.power_active) / (eight.alm_total - one.alm_total)
    # Linear in the parameter but for rounding: two evaluations give it.
    goal = large.block_ms * large.clock_mhz * 1e3
    low, high = block_cycles(large.width, 1.0), block_cycles(large.width, 2.0)
    return Laws(
        cycles_per_beat=1 + (goal - low) / (high - low),
        ddr_ms=one.ddr_ms,
        dynamic_w=abs(one.power_active - one.power_idle),
        idle_w=one.power_active - slope * one.alm_total,
        idle_w_per_alm=slope,
        alm_per_core=eight.alm_core / eight.cores,
        shell_alm=eight.alm_total - eight.alm_core,
        m20k_per_core=TABLE_4[-1].m20k_core / TABLE_4[-1].cores,
        core_ms=one.core_ms,
        alm_per_channel=small.alm_core / small.width,
        card_w=small.power_idle,
        card_w_per_doubling=middle.power_idle - small.power_idle,
    )


def predictions(laws: Laws) -> list[Prediction]:
    """Every row that a law speaks about.

    None speaks about clocks, which estimates take as printed, nor about what is outside the cores
    in Table 5 (ALMs) and Table 4 (M20Ks).
    """

    def milliseconds(r: WidthRow) -> float:
        return block_cycles(r.width, laws.cycles_per_beat) / r.clock_mhz / 1e3

    # Quantity, as published, by the law, and the rows that the law was fitted to.
    by_width: list[tuple[str, Callable[[WidthRow], float], Callable[[WidthRow], float], set]] = [
        ("block latency, ms", lambda r: r.block_ms, milliseconds, {2048}),
        ("with bursts, ms", lambda r: r.burst_ms, lambda r: r.block_ms / BURST_FACTOR, set()),
        ("ALM of the core, %", lambda r: r.alm_core, lambda r: laws.alm_per_channel * r.width,
         {512}),
        ("idle power, W", lambda r: r.power_idle, lambda r: card_power(laws, r.width),
         {512, 1024}),
        ("active power, W", lambda r: r.power_active,
         lambda r: card_power(laws, r.width) + laws.dynamic_w, set()),
    ]  # fmt: skip
    by_cores: list[tuple[str, Callable[[CoresRow], float], Callable[[CoresRow], float], set]] = [
        ("latency of a core, ms", lambda r: r.core_ms, lambda r: laws.core_ms, {1}),
        ("M20K of the cores, %", lambda r: r.m20k_core, lambda r: laws.m20k_per_core * r.cores,
         {26}),
        ("ALM of all, %", lambda r: r.alm_total,
         lambda r: laws.shell_alm + laws.alm_per_core * r.cores, {8}),
        ("ALM of the cores, %", lambda r: r.alm_core, lambda r: laws.alm_per_core * r.cores, {8}),
        ("DDR4 latency, ms", lambda r: r.ddr_ms, lambda r: laws.ddr_ms * arbitration(r.cores),
         {1}),
        ("|active - idle|, W", lambda r: abs(r.power_active - r.power_idle),
         lambda r: laws.dynamic_w * r.cores * arbitration(r.cores), {1}),
        ("idle power (the lower), W", lambda r: min(r.power_active, r.power_idle),
         lambda r: laws.idle_w + laws.idle_w_per_alm * r.alm_total, {1, 8}),
    ]  # fmt: skip
    return [
        Prediction("5", f"d = {r.width}", quantity, published(r), law(r), r.width in fitted)
        for quantity, published, law, fitted in by_width
        for r in TABLE_5
    ] + [
        Prediction("4", f"{r.cores} cores", quantity, published(r), law(r), r.cores in fitted)
        for quantity, published, law, fitted in by_cores
        for r in TABLE_4
    ]


def card_power(laws: Laws, width: int) -> float:
    """Idle power of the card with one core for this d (W), by Table 5."""
    return laws.card_w + laws.card_w_per_doubling * math.log2(width / TABLE_5[0].width)


def clock(width: int) -> float:
    """Clock (MHz) by Table 5: linear in log d between its rows, the nearest row beyond them."""
    if width <= TABLE_5[0].width:
        return TABLE_5[0].clock_mhz
    for a, b in itertools.pairwise(TABLE_5):
        if width <= b.width:
            share = math.log2(width / a.width) / math.log2(b.width / a.width)
            return a.clock_mhz + share * (b.clock_mhz - a.clock_mhz)
    return TABLE_5[-1].clock_mhz


def inconsistencies(laws: Laws) -> list[str]:
    """What in the published numbers does not agree, each with the numbers that show it."""
    one, eight, sixteen, most = TABLE_4
    small, middle, large = TABLE_5
    cycles = [r.block_ms * r.clock_mhz * 1e3 for r in TABLE_5]
    beats = [block_beats(r.width) for r in TABLE_5]
    per_beat = [c / b for c, b in zip(cycles, beats, strict=True)]
    rest = [r.alm_total - r.alm_core for r in TABLE_4]
    measured = card_power(laws, 2048)
    table_4_law = laws.idle_w + laws.idle_w_per_alm * large.alm_total
    alm_26 = (most.power_idle - laws.idle_w) / laws.idle_w_per_alm
    return [
        f"1.3B: 23.8 tokens/s is 24 blocks of d = 1024 ({24 * middle.burst_ms:.0f} ms), but the "
        f"model has d = 2048: {24 * large.burst_ms:.0f} ms, "
        f"{1e3 / (24 * large.burst_ms):.1f} tokens/s",
        f"370M: 62 tokens/s is 24 blocks of d = 512 ({24 * small.burst_ms:.2f} ms), but the model "
        f"has d = 1024: {24 * middle.burst_ms:.0f} ms, {1e3 / (24 * middle.burst_ms):.1f} tokens/s",
        "embedding and head are in no estimate",
        f"d = 512 takes {small.block_ms} ms in Table 5 and {one.core_ms} ms in Table 4",
        f"the same core draws {small.power_idle}/{small.power_active} W in Table 5 and "
        f"{one.power_active}/{one.power_idle} W in Table 4, and takes {small.alm_core} % and "
        f"{one.alm_core} % of the ALMs",
        f"cycles for each 8-bit read: {per_beat[0]:.2f}, {per_beat[1]:.2f}, {per_beat[2]:.2f} for "
        f"d = 512, 1024, 2048: the smallest block is {per_beat[0] / per_beat[2]:.1f} times slower "
        "than the other two say; weights grow 4 times with each doubling, its time 2.6 times",
        f"Table 4 prints active below idle for 1 and 8 cores and above it for 16 and 26; in size "
        f"the difference is 0.01 W x cores x 2^(cores a channel - 1) in all four rows "
        f"({sixteen.power_active - sixteen.power_idle:.2f} and "
        f"{most.power_active - most.power_idle:.2f} W for the last two): two rows have the columns "
        "exchanged",
        f"ALMs outside the cores are {rest[0]:.1f}, {rest[1]:.1f}, {rest[2]:.1f} and "
        f"{rest[3]:.1f} % for 1, 8, 16 and 26 cores; 26 cores add up to "
        f"{most.alm_core + rest[2]:.0f} % with the shell of 16, and 100 % is printed; by the "
        f"power of that row it is {alm_26:.0f} %; M20Ks outside the cores likewise are "
        f"{', '.join(f'{r.m20k_total - r.m20k_core:.1f}' for r in TABLE_4)} %",
        f"a core has {one.m20k_core} % of the M20Ks: {one.m20k_core / 100 * DEVICE_M20K:.1f} of "
        f"the device's {DEVICE_M20K:,}, but eight registers of one SRAM each need eight: they are "
        "not in M20Ks, or the share is not a core's",
        f"power of more cores is scaled by resources, {laws.idle_w_per_alm:.2f} W for each % of "
        f"ALMs; measured (Table 5), 16 % of the ALMs draw {measured:.2f} W where that scaling "
        f"gives {table_4_law:.1f} W, so that {eight.power_active}, {sixteen.power_idle} and "
        f"{most.power_idle} W are not supported by the measured rows",
        "the paper's 13 W is the whole card, nearly all of it idle power: energy a token is idle "
        "power times latency",
    ]


def block_beats(width: int) -> int:
    """8-bit reads of one block, by Table 5's core."""
    config = block_config(width)
    machine = fitting(Machine(lanes=4), config)
    return timeline(shape_program(config, machine, block_only=True).program, machine).beats
