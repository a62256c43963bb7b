"""A family of models in a sweep: a base, what differs from it, and the rates to try."""

import re
from dataclasses import dataclass, field
from typing import Literal

from mmfree_jax.config_io import underscored
from mmfree_jax.experiments.sweep.rate_rule import RateRuleConfig
from mmfree_jax.ranges import AboveZero, check_numbers, require, require_distinct

Base = Literal["matmulfree", "transformer"]
_WORD = re.compile(r"[A-Za-z0-9_.+]+(-[A-Za-z0-9_.+]+)*")


def _positive(name: str, values: tuple) -> None:
    require(all(0 < v < float("inf") for v in values), name, list(values), "use values above 0")
    require_distinct(name, values)


@dataclass(frozen=True)
class FamilyConfig:
    """One family of models: a base, what differs from it, and the rates to try."""

    name: str = ""
    """Name in the table and in the names of runs; empty: the base's."""
    base: Base = "matmulfree"
    """Whose presets the sizes are taken from."""
    learning_rates: tuple[AboveZero, ...] = ()
    """Peak learning rates to try; empty: the preset's own."""
    learning_rates_at: dict = field(default_factory=dict)
    """Rates to try at some sizes in place of those: {size: [rate, ...]}."""
    rate_rule: RateRuleConfig = field(default_factory=RateRuleConfig)
    """Rates by size and budget, in place of learning_rates."""
    train: dict = field(default_factory=dict)
    """Settings of this family alone, over the sweep's `train` (such as model.head_linear)."""

    @property
    def label(self) -> str:
        """Name of the family."""
        return self.name or self.base

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", underscored(self.train, f"families.{self.label}.train"))
        require(_WORD.fullmatch(self.label) is not None, "families.name", self.name,
                "use letters, digits, '_', '.', '+' and single '-'")  # fmt: skip
        check_numbers(self, "families.")
        require_distinct("families.learning_rates", self.learning_rates)
        require(not (self.rate_rule.is_on and self.learning_rates), "families.learning_rates",
                list(self.learning_rates), "leave it out, or families.rate_rule")  # fmt: skip
        for size, rates in self.learning_rates_at.items():
            name = f"families.learning_rates_at.{size}"
            numbers = isinstance(rates, list) and all(type(r) in (int, float) for r in rates)
            require(numbers and bool(rates), name, rates, "give a list of rates")
            _positive(name, tuple(rates))

    @property
    def has_rates(self) -> bool:
        """Whether the rates are the config's, and not the preset's."""
        return bool(self.learning_rates) or self.rate_rule.is_on

    def rates_at(self, size: str) -> tuple[float, ...]:
        """Rates listed for a size; empty: by the rule, or the preset's own."""
        return tuple(map(float, self.learning_rates_at.get(size, self.learning_rates)))
