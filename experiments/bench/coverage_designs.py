"""What the coverage of intervals is measured on: runs whose truth and noise are known."""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.frame import RunFrame, make_frame
from mmfree_jax.experiments.scaling.gap import Pairs
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.objectives import Objective

LAW = get_law("chinchilla")
TRUTH = np.array([1.75, 420.0, 1900.0, 0.34, 0.36])
"""Of the first family (E, A, B, alpha, beta)."""
OTHER = np.array([1.70, 470.0, 2100.0, 0.34, 0.36])
"""Of the second, which is better beyond 10^21.3 FLOPs."""
PLANE = np.array([0.2, -0.08, 0.15])
"""A gap's centre (nats), and what a decade of size and one of tokens add."""


@dataclass(frozen=True)
class Noise:
    """Of the log loss of a run, or in nats of a gap.

    Attributes:
        sd: standard deviation at the least and at the greatest compute, linear in log compute.
        freedom: of Student's t; infinite: normal.
    """

    sd: tuple[float, float]
    freedom: float = np.inf

    def draw(self, compute: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One value for each compute [n]."""
        place = np.log(compute / compute.min()) / np.log(compute.max() / compute.min())
        sd = self.sd[0] + place * (self.sd[1] - self.sd[0])
        if np.isinf(self.freedom):
            return sd * rng.standard_normal(len(sd))
        unit = np.sqrt(self.freedom / (self.freedom - 2))
        return sd * rng.standard_t(self.freedom, len(sd)) / unit


@dataclass(frozen=True)
class Design:
    """Runs of two families, and cells in which both were paired.

    Attributes:
        name, about: of the design; in words.
        params, tokens: of each family's runs, raw counts [n].
        noise: of each run.
        objective: of the fits.
        cells: size and tokens of the cells of a gap [c, 2]; seeds: pairs in each [c].
        gap_noise: of a cell, and as much again of each pair in it.
    """

    name: str
    about: str
    params: np.ndarray
    tokens: np.ndarray
    noise: Noise
    objective: Objective
    cells: np.ndarray
    seeds: np.ndarray
    gap_noise: Noise

    def runs(self, truth: np.ndarray, rng: np.random.Generator) -> RunFrame:
        """One family's runs of a repetition."""
        x = {"params": self.params, "tokens": self.tokens}
        noise = self.noise.draw(self.params * self.tokens, rng)
        return make_frame(
            params=self.params, tokens=self.tokens, loss=LAW.loss(truth, x) * np.exp(noise)
        )

    def pairs(self, rng: np.random.Generator) -> Pairs:
        """The pairs of a repetition."""
        own = np.repeat(np.arange(len(self.cells)), self.seeds)
        size = self.cells.prod(1)
        plane = np.column_stack([np.ones(len(own)), self.decades()[own]]) @ PLANE
        noise = self.gap_noise.draw(size, rng)[own] + self.gap_noise.draw(size[own], rng)
        seed = np.concatenate([np.arange(count) for count in self.seeds]).astype(str)
        params, tokens = self.cells[own].T
        return Pairs(params, tokens, seed, plane + noise, 0)

    def decades(self) -> np.ndarray:
        """log10 of the cells' size and tokens less their means [c, 2]."""
        logs = np.log10(self.cells)
        return logs - logs.mean(0)


def _product(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(first, len(second)), np.tile(second, len(first))


def _isoflop() -> tuple[np.ndarray, np.ndarray]:
    """Six budgets, 10^17.5 to 10^20, eight sizes each about 20 tokens a parameter."""
    budget, factor = _product(10 ** np.linspace(17.5, 20, 6), np.geomspace(1 / 8, 8, 8))
    params = np.sqrt(budget / 120) * factor
    return params, budget / 6 / params


DESIGNS = {
    d.name: d
    for d in (
        Design(
            "isoflop-48", "48 runs, 6 budgets x 8 sizes; normal noise, 0.5%; Huber, delta 1e-3. "
            "Gap: 10 cells, a pair each; normal noise",
            *_isoflop(), Noise((0.005, 0.005)), Objective("huber", 1e-3),
            np.column_stack(_product(np.array([1e6, 3e6, 7e6, 2e7, 6e7]), np.array([1e7, 2e7]))),
            np.ones(10, int), Noise((0.01, 0.01)),
        ),
        Design(
            "grid-24", "24 runs, 6 sizes x 4 budgets of tokens; normal noise, 0.8% at the least "
            "compute to 0.3% at the greatest; Huber, delta 1e-3. Gap: 12 cells, 1 to 3 pairs each; "
            "Student's t with 5 degrees of freedom, four times as wide at the least cell",
            *_product(10 ** np.linspace(7, 9.5, 6), 10 ** np.linspace(9, 11, 4)),
            Noise((0.008, 0.003)), Objective("huber", 1e-3),
            np.column_stack(_product(np.array([1e6, 3e6, 1e7, 6e7]), np.array([4e6, 1e7, 4e7]))),
            np.tile([1, 2, 3], 4), Noise((0.02, 0.005), 5),
        ),
        Design(
            "grid-20", "20 runs, 5 sizes x 4 budgets of tokens; normal noise, 0.5%; least squares "
            "of log losses. Gap: 6 cells, a pair each; normal noise",
            *_product(10 ** np.linspace(7, 9.3, 5), 10 ** np.linspace(8.7, 10.5, 4)),
            Noise((0.005, 0.005)), Objective("log-lsq"),
            np.column_stack(_product(np.array([1e6, 3e6, 1e7]), np.array([4e6, 1e7]))),
            np.ones(6, int), Noise((0.01, 0.01)),
        ),
    )
}  # fmt: skip
"""The designs by name."""
