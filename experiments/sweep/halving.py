"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): most tuning runs end early.

The runs of a size (every rate at every setting) are paused after a share of their steps; the best
1 / eta of them go on from their checkpoints to the next pause, at eta times the steps, and at last
to their end. A run that goes on is the run that it would be without pauses, bit for bit.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from mmfree_jax.errors import ConfigError
from mmfree_jax.ranges import Range, check_numbers


@dataclass(frozen=True)
class HalvingConfig:
    """When the worse of a size's tuning runs end; off without `eta`."""

    eta: Annotated[int, Range(2, 1000)] | None = None
    """At each pause the best 1 / eta of a size's tuning runs go on."""
    fraction: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None
    """Share of the steps before the first pause; each further pause comes after eta times as
    many. None: 1 / eta."""

    @property
    def is_on(self) -> bool:
        """Whether runs are paused."""
        return self.eta is not None

    def __post_init__(self) -> None:
        check_numbers(self, "halving.")
        if self.fraction is not None and self.eta is None:
            raise ConfigError(f"halving.fraction is {self.fraction!r}: give halving.eta as well")

    @property
    def pauses(self) -> tuple[float, ...]:
        """Shares of the steps after which runs are paused, in order."""
        if self.eta is None:
            return ()
        shares = [self.fraction or 1 / self.eta]
        while shares[-1] * self.eta < 1 - 1e-9:
            shares.append(shares[-1] * self.eta)
        return tuple(shares)

    def survivors(self, runs: int) -> int:
        """How many of so many runs go on from a pause."""
        assert self.eta is not None
        return math.ceil(runs / self.eta)
