"""The learning rate of each family at each size, by one rule for all families.

Rule: at each tuning size every rate of the family's list is tried with the same data, seed and
number of tokens. The rate of lowest held-out loss wins (`grid`; the smaller of two equal ones);
`parabola` refines it to the lowest point of the parabola in log rate through the winner and
its two neighbours. A run that diverged counts as infinitely bad. A winner at an end of the list
is kept, and flagged: the best rate may lie beyond. A size that was not tuned takes its rate
from a power law in parameters, fitted by least squares in logs through the tuned sizes (those
without a flag where there are two or more); with one size, that size's rate. Where there are
other axes (`axes`), every rate is tried at every setting of them, and the rate is that of the
setting which reached the lowest loss.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.sweep.axes import AS_GIVEN, Setting


@dataclass(frozen=True)
class Choice:
    """The learning rate of one family at one size, and where it comes from."""

    family: str
    size: str
    params: float
    """Non-embedding parameters."""
    rate: float
    loss: float | None
    """Held-out loss (nats a token) of the best run tried; None for a transferred rate."""
    at_edge: bool
    """The best rate tried is the lowest or the highest of them."""
    tried: tuple[tuple[float, float], ...] = ()
    """(rate, loss) of the runs behind it, at its setting; infinite loss: diverged."""
    setting: Setting = AS_GIVEN
    """The best values of the other axes; of a transferred rate, those of the nearest size."""
    tokens: int | None = None
    """Training tokens of the runs behind it; None for a transferred rate."""
    dropped: tuple[float, ...] = ()
    """Of the rates tried those that successive halving ended early; their loss is infinite."""

    @property
    def is_transferred(self) -> bool:
        """Whether the rate follows from other sizes."""
        return not self.tried


def round_rate(rate: float) -> float:
    """Three significant digits, so that a rate is the same wherever it is computed."""
    return float(f"{rate:.3g}")


def best_rate(losses: Mapping[float, float], rule: str) -> tuple[float, float, bool]:
    """The best rate of one size, its loss, and whether it is the first or last tried.

    Args:
      losses: rate -> held-out loss; infinite where the run diverged.
      rule: "grid" or "parabola".

    Raises:
      ValueError: every run diverged.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda r: (losses[r], r))
    if not math.isfinite(losses[best]):
        raise ValueError("every rate diverged")
    i = rates.index(best)
    at_edge = len(rates) > 1 and i in (0, len(rates) - 1)
    if rule == "parabola" and 0 < i < len(rates) - 1:
        x = np.log([rates[i - 1], best, rates[i + 1]])
        y = [losses[r] for r in (rates[i - 1], best, rates[i + 1])]
        if all(map(math.isfinite, y)):
            curvature, slope, _ = np.polyfit(x - x[1], y, 2)
            if curvature > 0:
                at = np.clip(x[1] - slope / (2 * curvature), x[0], x[2])
                return round_rate(float(np.exp(at))), losses[best], at_edge
    return best, losses[best], at_edge


def tried_rates(
    rows: Iterable[Mapping[str, str]], tokens: int, seed: str = "0"
) -> dict[tuple[str, str], dict[float, float]]:
    """(family, size) -> rate -> held-out loss, of a results table's runs of `tokens` and `seed`.

    Cells of one rate alone are left out; sizes are in order of parameters.
    """
    found: dict[tuple[str, str], dict[float, float]] = {}
    for row in sorted(rows, key=lambda r: (r["family"], float(r["params_non_embedding"]))):
        if int(row["tokens"]) == tokens and row["seed"] == seed:
            cell = found.setdefault((row["family"], row["size"]), {})
            cell[float(row["learning_rate"])] = float(row["loss"])
    return {key: dict(sorted(cell.items())) for key, cell in found.items() if len(cell) > 1}


def transfer(tuned: Sequence[Choice], params: float) -> float:
    """The rate at another size, by the power law through the tuned ones."""
    solid = [c for c in tuned if not c.at_edge]
    points = solid if len(solid) >= 2 else list(tuned)
    if len({c.params for c in points}) < 2:
        return points[0].rate
    slope, intercept = np.polyfit(
        np.log([c.params for c in points]), np.log([c.rate for c in points]), 1
    )
    return round_rate(float(np.exp(intercept + slope * math.log(params))))


def best_setting(tried: Mapping[Setting, Mapping[float, float]]) -> Setting:
    """The setting of the lowest loss at any of its rates; of equal ones the first."""
    return min(tried, key=lambda setting: min(tried[setting].values()))


def choose_rates(
    tried: Mapping[tuple[str, str], Mapping[Setting, Mapping[float, float]]],
    params: Mapping[tuple[str, str], float],
    rule: str,
) -> dict[tuple[str, str], Choice]:
    """The rate of every (family, size).

    Args:
      tried: (family, size) -> setting of the other axes -> rate -> held-out loss, at the tuned
        sizes.
      params: (family, size) -> non-embedding parameters, at all sizes that need a rate.
      rule: "grid" or "parabola".

    Returns:
      A choice for each key of `params` and of `tried`; families of which every tuning run
      diverged have none.
    """
    chosen: dict[tuple[str, str], Choice] = {}
    for key, by_setting in tried.items():
        setting = best_setting(by_setting)
        losses = by_setting[setting]
        if any(map(math.isfinite, losses.values())):
            rate, loss, at_edge = best_rate(losses, rule)
            chosen[key] = Choice(*key, params[key], rate, loss, at_edge,
                                 tuple(sorted(losses.items())), setting)  # fmt: skip
    for key in params:
        tuned = [c for c in chosen.values() if c.family == key[0] and not c.is_transferred]
        if key not in chosen and tuned:
            near = min(tuned, key=lambda c: abs(math.log(c.params / params[key])))
            rate = transfer(tuned, params[key])
            chosen[key] = Choice(*key, params[key], rate, None, False, setting=near.setting)
    return chosen
