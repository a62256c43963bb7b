"""What a run's rate costs it, and how sure that is: the best rate of a cell from those tried there.

Near its best rate a loss is a parabola in log rate. The best rates of a family's cells follow
lr = c N^a D^b; each draw of the rule says by how much every run's loss lies above that at its
best rate, with the family's mean curvature. Shapes: B draws, n runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError

MOST_APART = np.log(4)
"""Lists of rates were widened until the best one was inside: a rate is no farther off than this."""


@dataclass(frozen=True)
class TriedRates:
    """One cell: a size and a budget at several rates.

    Attributes:
        params, tokens: of the cell.
        log_rates: ascending [k].
        losses: of each rate, in every draw [B, k] (nats a token).
    """

    params: float
    tokens: float
    log_rates: np.ndarray
    losses: np.ndarray


def parabola(cell: TriedRates) -> tuple[np.ndarray, np.ndarray]:
    """Log of the best rate and curvature (nats a squared log) in every draw [B], [B].

    Of the parabola through the best rate of the mean losses and its two neighbours; NaN where it
    opens downwards.

    Raises:
        ScalingError: the best rate is at an end of the list.
    """
    best = int(np.argmin(cell.losses.mean(0)))
    if not 0 < best < len(cell.log_rates) - 1:
        raise ScalingError(f"rates: the best one at {cell.params:.3g} parameters and "
                           f"{cell.tokens:.3g} tokens is at an end of its list")  # fmt: skip
    x, y = cell.log_rates[best - 1 : best + 2], cell.losses[:, best - 1 : best + 2]
    inverse = np.linalg.inv(np.vander(x - x[1], 3))
    a, b, _ = inverse @ y.T
    with np.errstate(all="ignore"):
        place = np.where(a > 0, x[1] - b / (2 * a), np.nan)
    return np.clip(place, x[0], x[2]), np.where(a > 0, 2 * a, np.nan)


@dataclass(frozen=True)
class RuleDraws:
    """A family's rule in every draw: coefficients [B, 3] of 1, log N, log D, and curvatures [B]."""

    coefficients: np.ndarray
    curvature: np.ndarray

    def excess(self, params: np.ndarray, tokens: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """By how much losses at these rates lie above those at the best one (nats) [B, n]."""
        x = np.stack([np.ones(len(params)), np.log(params), np.log(tokens)])
        apart = np.log(rates) - self.coefficients @ x
        return self.curvature[:, None] / 2 * np.clip(apart, -MOST_APART, MOST_APART) ** 2


def draw_rule(cells: Sequence[TriedRates], rng: np.random.Generator) -> RuleDraws:
    """The rule of a family in every draw, by the winners inside their lists.

    A draw has its own losses, and errors of the winners about the rule as large as those seen.

    Raises:
        ScalingError: fewer than four cells have their best rate inside.
    """
    inside = []
    for cell in cells:
        try:
            inside.append((cell, *parabola(cell)))
        except ScalingError:
            continue
    if len(inside) < 4:
        raise ScalingError(f"rates: {len(inside)} cells have their best rate inside the list; a "
                           "rule over N and D with an error takes four")  # fmt: skip
    x = np.stack([[1.0, np.log(c.params), np.log(c.tokens)] for c, _, _ in inside])
    if np.linalg.matrix_rank(x) < 3:
        raise ScalingError("rates: N and D do not vary apart among the cells that were tuned")
    places = np.stack([place for _, place, _ in inside], axis=1)  # [B, cells]
    places = np.where(np.isfinite(places), places, np.nanmedian(places, axis=0))
    solve = np.linalg.pinv(x)
    left = places.mean(0) - x @ (solve @ places.mean(0))
    spread = np.sqrt(left @ left / (len(inside) - 3))
    noisy = places + spread * rng.standard_normal(places.shape)
    curvature = np.nanmean(np.stack([bend for _, _, bend in inside], axis=1), axis=1)
    return RuleDraws(noisy @ solve.T, np.nan_to_num(curvature))
