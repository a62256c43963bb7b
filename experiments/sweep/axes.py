"""Settings of training that a sweep tries beside the learning rate, each with each."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from mmfree_jax.config import TrainConfig
from mmfree_jax.ranges import Count, NotNegative, ShareBelowOne, check_numbers, require_distinct


@dataclass(frozen=True)
class AxesConfig:
    """Values to try; an axis without any stays as `train` has it."""

    batch_size: tuple[Count, ...] = ()
    """Rows in one optimiser step. Budgets are rounded so that all see the same tokens."""
    b2: tuple[ShareBelowOne, ...] = ()
    """Decay of AdamW's second moment."""
    weight_decay: tuple[NotNegative, ...] = ()
    """Decoupled weight decay."""
    warmup_fraction: tuple[ShareBelowOne, ...] = ()
    """Share of the steps that warm up."""

    def __post_init__(self) -> None:
        check_numbers(self, "axes.")
        for name, values in self.given.items():
            require_distinct(f"axes.{name}", values)

    @property
    def given(self) -> dict[str, tuple[Any, ...]]:
        """The axes that have values, by name."""
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: values for name, values in every.items() if values}

    def settings(self) -> list["Setting"]:
        """Every combination, in the order of the lists; one that sets nothing without axes."""
        names, values = tuple(self.given), self.given.values()
        return [
            Setting(**dict(zip(names, each, strict=True))) for each in itertools.product(*values)
        ]

    def rows(self, batch_size: int) -> int:
        """Rows that are whole steps at every batch size; at `batch_size` without that axis."""
        return math.lcm(*self.batch_size) if self.batch_size else batch_size


@dataclass(frozen=True)
class Setting:
    """One value of each axis that a sweep has; None where it has not."""

    batch_size: int | None = None
    b2: float | None = None
    weight_decay: float | None = None
    warmup_fraction: float | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The values that are set, as names of runs have them."""
        named = (("b", self.batch_size), ("b2_", self.b2), ("wd", self.weight_decay),
                 ("warm", self.warmup_fraction))  # fmt: skip
        return tuple(f"{name}{value:g}" for name, value in named if value is not None)

    @property
    def program(self) -> "Setting":
        """The part that a compiled training step depends on."""
        return dataclasses.replace(self, warmup_fraction=None)

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` under these values, but for the warm-up, which is of a number of steps."""
        given = {"b2": self.b2, "weight_decay": self.weight_decay}
        changes = {name: value for name, value in given.items() if value is not None}
        optimizer = dataclasses.replace(config.optimizer, **changes)
        batch_size = self.batch_size or config.batch_size
        return dataclasses.replace(config, batch_size=batch_size, optimizer=optimizer)


AS_GIVEN = Setting()
"""Of a sweep without axes: nothing beside the config."""
