"""Which sizes a sweep has, and where they have budgets and seeds of their own."""

import re
from dataclasses import dataclass

from mmfree_jax.presets import PRESETS
from mmfree_jax.ranges import (
    AboveZero,
    Seed,
    check_numbers,
    require,
    require_distinct,
)

SHAPE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@dataclass(frozen=True)
class ReplicateConfig:
    """Further seeds at some of the sizes, for the spread between seeds."""

    sizes: tuple[str, ...] = ()
    """Sizes to repeat."""
    seeds: tuple[Seed, ...] = ()
    """Seeds beyond the sweep's `seeds`."""

    def __post_init__(self) -> None:
        check_numbers(self, "replicates.")
        require_distinct("replicates.sizes", self.sizes)
        require_distinct("replicates.seeds", self.seeds)
        require(bool(self.sizes) == bool(self.seeds), "replicates.seeds", list(self.seeds),
                "give both replicates.sizes and replicates.seeds, or neither")  # fmt: skip


@dataclass(frozen=True)
class CellConfig:
    """One size with budgets of its own, where not every size has all of them."""

    size: str
    """Preset or shape."""
    tokens: tuple[AboveZero, ...]
    """Token budgets."""
    families: tuple[str, ...] = ()
    """Names of the families that have it; empty: all."""
    seeds: tuple[Seed, ...] = ()
    """Seeds in place of the sweep's `seeds`, whose first is among them; empty: those."""

    def __post_init__(self) -> None:
        check_numbers(self, "cells.")
        check_size(self.size)
        require(bool(self.tokens), "cells.tokens", [], "give at least one budget")
        for name in ("tokens", "families", "seeds"):
            require_distinct(f"cells.{name}", getattr(self, name))


def check_size(size: str) -> None:
    """Refuses what is neither a preset nor a shape.

    Raises:
      ConfigError: names the size.
    """
    if SHAPE.fullmatch(size):
        return
    known = [name for name in PRESETS if not name.endswith(("-transformer", "-float-head"))]
    require(size in known, "sizes", size,
            f"give LAYERSxWIDTH, such as 8x256, or one of {', '.join(known)}")  # fmt: skip
