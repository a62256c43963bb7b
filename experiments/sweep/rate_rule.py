"""Learning rates by a rule for any size and budget: lr = c N^a D^b.

N counts parameters without embedding and head, D training tokens. The coefficients are in the
config, or in the `rate_rule.json` that another sweep's report fitted (`rate_fit`).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.rates import round_rate
from mmfree_jax.json_shape import fault
from mmfree_jax.places import Place
from mmfree_jax.ranges import AboveZero, Range, check_numbers
from mmfree_jax.text_files import read_json

RULE = "rate_rule.json"
Exponent = Annotated[float, Range(-10, 10)]
_WHERE = "families.rate_rule"
_NUMBERS = ("coefficient", "params_exponent", "tokens_exponent")
_RANGES = ("params_range", "tokens_range")


@dataclass(frozen=True)
class RateRule:
    """lr = coefficient * N^params_exponent * D^tokens_exponent."""

    coefficient: AboveZero
    params_exponent: Exponent
    tokens_exponent: Exponent
    params_range: tuple[float, float] | None = None
    """Least and largest N that it was fitted to; None: not known."""
    tokens_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, f"{_WHERE}.")

    def rate(self, params: float, tokens: float) -> float:
        """At one size and budget."""
        a, b = self.params_exponent, self.tokens_exponent
        log = math.log(self.coefficient) + a * math.log(params) + b * math.log(tokens)
        return math.exp(log) if log < 100 else math.inf


@dataclass(frozen=True)
class RateRuleConfig:
    """Rates of a family by a rule, at every size and budget; off without coefficient and file."""

    coefficient: AboveZero | None = None
    """c of lr = c N^a D^b, N without embedding and head."""
    params_exponent: Exponent = 0.0
    """a."""
    tokens_exponent: Exponent = 0.0
    """b."""
    file: Place | None = None
    """A rate_rule.json, which the report of another sweep wrote, in place of the three."""
    family: str = ""
    """Whose rule of that file; empty: that of this family's name."""
    tokens_per_parameter: AboveZero | None = None
    """D / N to take the rule at, whatever the budget, so that the budgets of a size have one rate
    and may share a trunk; None: at each budget."""
    around: tuple[AboveZero, ...] = (1.0,)
    """Rates to try, as multiples of the rule's."""

    @property
    def is_on(self) -> bool:
        """Whether rates follow from a rule."""
        return self.coefficient is not None or self.file is not None

    def __post_init__(self) -> None:
        check_numbers(self, f"{_WHERE}.")
        exponents = self.params_exponent, self.tokens_exponent
        if self.file is not None and (self.coefficient is not None or any(exponents)):
            raise ConfigError(f"{_WHERE}.file is {self.file!r}: leave it out, or coefficient and "
                              "exponents")  # fmt: skip
        if self.coefficient is None and any(exponents):
            raise ConfigError(f"{_WHERE}.coefficient is None: give it with the exponents")
        if self.tokens_per_parameter is not None and not self.is_on:
            raise ConfigError(f"{_WHERE}.tokens_per_parameter is {self.tokens_per_parameter:g}: "
                              "give a file or a coefficient as well")  # fmt: skip
        if self.family and self.file is None:
            raise ConfigError(f"{_WHERE}.family is {self.family!r}: give a file as well")
        if not self.around or len(set(self.around)) != len(self.around):
            raise ConfigError(f"{_WHERE}.around is {list(self.around)!r}: give each factor once")

    def rule(self, label: str) -> RateRule:
        """The rule of the family of that name.

        Raises:
          ConfigError: the file cannot be read, or has no rule of that family.
        """
        if self.file is not None:
            return read_rule(self.file, self.family or label)
        assert self.coefficient is not None  # is_on
        return RateRule(self.coefficient, self.params_exponent, self.tokens_exponent)

    def rates(self, label: str, params: float, tokens: float) -> tuple[float, ...]:
        """The rates to try at one size and budget, to three digits.

        Args:
          label: the family's name.
          params: non-embedding parameters.
          tokens: training tokens.

        Raises:
          ConfigError: as `rule`.
        """
        if self.tokens_per_parameter is not None:
            tokens = self.tokens_per_parameter * params
        rate = self.rule(label).rate(params, tokens)
        rates = tuple(round_rate(factor * rate) for factor in self.around)
        where = f"{_WHERE} of {label} at {params:.4g} parameters and {tokens:.4g} tokens"
        if not all(Range(0, open_low=True).holds(rate) for rate in rates):
            raise ConfigError(f"{where} gives the rate {rates[0]:g}: use other coefficients")
        if len(set(rates)) < len(rates):
            raise ConfigError(f"{where} gives the rates {list(rates)}: use values of around that "
                              "differ in their first three digits")  # fmt: skip
        return rates


def read_rule(file: str, family: str) -> RateRule:
    """A family's rule in a file.

    Raises:
      ConfigError: the file is not such a file, or has no rule of that family.
    """
    name, way_out = f"{_WHERE}.file {file}", f"give a {RULE}, which `mmfree sweep report` writes"
    try:
        values = read_json(Path(file))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{name} cannot be read ({e}): {way_out}") from e
    number = (int, float)
    fields = dict.fromkeys(_NUMBERS, number) | {key: [number] for key in _RANGES}
    shape = {"families": [{"family": str, **fields}]}
    if wrong := fault(values, shape):
        raise ConfigError(f"{name} is no rate rule ({wrong}): {way_out}")
    rules = {rule["family"]: rule for rule in values["families"]}
    if family not in rules:
        raise ConfigError(f"{name} has no rule of {family!r}: set {_WHERE}.family to one of "
                          f"{', '.join(rules) or 'none that it has'}")  # fmt: skip
    rule = rules[family]
    coefficient, a, b = (float(rule[key]) for key in _NUMBERS)
    params, tokens = ((min(rule[key]), max(rule[key])) if rule[key] else None for key in _RANGES)
    try:
        return RateRule(coefficient, a, b, params, tokens)
    except ConfigError as e:
        raise ConfigError(f"{name}: {e}") from e
