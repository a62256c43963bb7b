"""How a sweep is run, and what one call of it did."""

from dataclasses import dataclass, field
from typing import Literal

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.order import ORDERS


@dataclass(frozen=True)
class Options:
    """How to run, as against what."""

    parallel: int = 1
    """Small runs at a time on each device."""
    gpus: tuple[str, ...] = ()
    """GPUs to spread runs over, one run on one GPU; empty: each run sees all devices."""
    shard: tuple[int, int] = (0, 1)
    """Which runs are this process's: index (from 0) and count."""
    stage: Literal["tuning", "main", "all"] = "all"
    """Which runs; trunks are of the main stage."""
    order: str = "cheapest"
    """"cheapest" or "longest" first (see `in_order`)."""
    max_minutes: float | None = None
    """Stop after this much time: runs under way save a checkpoint."""
    retry_failed: bool = False
    """Try failed runs again."""
    grace_seconds: float = 300.0
    """How long runs that are told to stop may take to save."""

    def __post_init__(self) -> None:
        if self.parallel < 1:
            raise ConfigError(f"parallel is {self.parallel}: set 1 or more")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ConfigError(f"max_minutes is {self.max_minutes}: set a value above 0")
        if len(set(self.gpus)) != len(self.gpus):
            raise ConfigError(f"gpus is {list(self.gpus)}: name each once")
        if self.order not in ORDERS:
            raise ConfigError(f"order is {self.order!r}: choose {' or '.join(ORDERS)}")

    @property
    def stages(self) -> tuple[Literal["tuning", "main"], ...]:
        """Names of the stages to run."""
        return ("tuning", "main") if self.stage == "all" else (self.stage,)


@dataclass
class Tally:
    """What one call did."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    standing: dict[str, str] = field(default_factory=dict)
    """The same of runs that failed in an earlier call and were not tried again."""
    paused: list[str] = field(default_factory=list)
    """Came to a pause of successive halving."""
    stopped: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    """Under way in another process."""
    waiting: int = 0
    """Main runs whose rate awaits tuning runs, or that await a trunk."""
    signal: int | None = None
    """The signal that ended the call early."""
