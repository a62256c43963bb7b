"""Latency, tokens a second, power and energy a token of any model on the modelled machine."""

import dataclasses
from dataclasses import dataclass

from mmfree_jax.experiments.accelerator.compile import fitting, shape_program
from mmfree_jax.experiments.accelerator.machine import Machine, timeline
from mmfree_jax.experiments.accelerator.paper import (
    BURST_FACTOR,
    Laws,
    arbitration,
    card_power,
    clock,
)
from mmfree_jax.model_config import ModelConfig


@dataclass(frozen=True)
class Estimate:
    """One model on one machine. Simulated cycles; clock and power follow the paper's Table 5.

    Attributes:
      machine: what it ran on, in words.
      cores: each with a token stream of its own.
      clock_mhz: clock.
      block_ms: latency of one block.
      blocks_ms: of all blocks, as the paper estimates a model.
      ends_ms: of embedding, final norm and head, which the paper leaves out.
      ddr_ms: added where cores share a channel, by Table 4.
      power_w: of the card.
    """

    machine: str
    cores: int
    clock_mhz: float
    block_ms: float
    blocks_ms: float
    ends_ms: float
    ddr_ms: float
    power_w: float

    @property
    def token_ms(self) -> float:
        """Latency of a token, everything included."""
        return self.blocks_ms + self.ends_ms + self.ddr_ms

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together."""
        return 1e3 * self.cores / self.token_ms

    @property
    def mj_per_token(self) -> float:
        """Energy a token (mJ)."""
        return 1e3 * self.power_w / self.tokens_per_s


def _cycles(config: ModelConfig, machine: Machine) -> tuple[int, int]:
    """Cycles of one middle block (without its x and y in memory), and of the whole token."""
    machine = fitting(machine, config)
    single = dataclasses.replace(config, num_layers=1)
    double = dataclasses.replace(config, num_layers=3)
    # Bounded blocks are those from the second on; their cycles are the difference.
    one, three, whole = (
        timeline(shape_program(c, machine).program, machine).cycles
        for c in (single, double, config)
    )
    return (three - one) // 2, whole


def estimate(
    config: ModelConfig,
    machine: Machine,
    laws: Laws,
    *,
    name: str,
    cores: int = 1,
    clock_mhz: float | None = None,
) -> Estimate:
    """A model's figures on a machine.

    Args:
      config: of the model; its weights are not needed.
      machine: its clock is ignored, and its registers fitted to the model.
      laws: of the paper's tables.
      name: of the machine, for tables.
      cores: on four memory channels.
      clock_mhz: None: by Table 5.
    """
    mhz = clock(config.hidden_size) if clock_mhz is None else clock_mhz
    block, whole = _cycles(config, machine)
    to_ms = 1 / mhz / 1e3
    blocks = block * config.num_layers
    shared = laws.ddr_ms * (arbitration(cores) - 1) * config.num_layers
    power = card_power(laws, config.hidden_size)
    power += laws.dynamic_w * cores * arbitration(cores)
    if cores > 1:  # Table 4's scaling by resources, which Table 5 does not support
        extra = laws.alm_per_channel * config.hidden_size * (cores - 1)
        power += laws.idle_w_per_alm * extra
    return Estimate(
        name, cores, mhz, block * to_ms, blocks * to_ms, (whole - blocks) * to_ms, shared, power
    )


def machines(laws: Laws) -> list[tuple[str, Machine]]:
    """The paper's core as built, and two readings of its projection."""
    built = Machine(lanes=4, cycles_per_beat=laws.cycles_per_beat)
    return [
        ("as built: 8-bit reads", built),
        (
            "512-bit bus, reads as slow",
            Machine(lanes=4 * BURST_FACTOR, cycles_per_beat=laws.cycles_per_beat),
        ),
        ("512-bit bus, bursts", Machine(lanes=4 * BURST_FACTOR)),
    ]
