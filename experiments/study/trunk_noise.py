"""How much runs differ by their seed: what branches of a trunk share, and what each has of its own.

A trunk is one draw of initialisation and order of the data for all budgets of a size, so that its
branches err together. With few trunks a resampling of them would drop whole sizes; what seeds show
is drawn instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.sweep.table import Row


@dataclass(frozen=True)
class TrunkNoise:
    """Standard deviations of log loss over seeds, and how many degrees of freedom they rest on."""

    trunk: float = 0.0015
    branch: float = 0.0008
    freedom: int = 0

    def covariance(self, rows: Sequence[Row]) -> np.ndarray:
        """Of the errors of runs' log losses [n, n]."""
        trunk = trunks_of(rows)
        return self.trunk**2 * (trunk[:, None] == trunk) + self.branch**2 * np.eye(len(rows))

    def draw(self, rows: Sequence[Row], count: int, rng: np.random.Generator) -> np.ndarray:
        """Errors of log losses [count, n]: one for each trunk, and one for each run."""
        trunk = trunks_of(rows)
        shared = self.trunk * rng.standard_normal((count, int(trunk.max()) + 1))
        return shared[:, trunk] + self.branch * rng.standard_normal((count, len(rows)))

    def text(self) -> str:
        """What the noise rests on."""
        source = f"{self.freedom} repeated runs" if self.freedom else "assumed: no seeds yet"
        return (f"noise of log losses: {self.trunk:.4f} a trunk, {self.branch:.4f} a run besides "
                f"({source})")  # fmt: skip


def trunks_of(rows: Sequence[Row]) -> np.ndarray:
    """Number of each run's trunk [n]; a run without one has its own."""
    names = [row["trunk"] or row["run"] for row in rows]
    return np.unique(names, return_inverse=True)[1]


def trunk_noise(rows: Sequence[Row]) -> TrunkNoise:
    """The noise that seeds show, by the budgets of each size that all its seeds have.

    Within a size the mean of each budget is taken away; what the budgets of one seed then have in
    common is the trunk's, what is left a run's own. Without two seeds and two budgets anywhere,
    what the first study saw is assumed.
    """
    sizes: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        by_seed = sizes.setdefault((row["family"], row["size"]), {})
        by_seed.setdefault(row["seed"], {})[row["tokens"]] = float(np.log(float(row["loss"])))
    between, within, free_between, free_within = 0.0, 0.0, 0, 0
    budgets = []
    for by_seed in sizes.values():
        common = sorted(set.intersection(*(set(found) for found in by_seed.values())))
        if len(by_seed) < 2 or len(common) < 2:
            continue
        left = np.array([[found[tokens] for tokens in common] for found in by_seed.values()])
        left -= left.mean(0)
        seeds, count = left.shape
        shared = left.mean(1)
        between += float(shared @ shared)
        within += float(((left - shared[:, None]) ** 2).sum())
        free_between += seeds - 1
        free_within += (seeds - 1) * (count - 1)
        budgets.append(count)
    if not free_between:
        return TrunkNoise()
    own = within / free_within
    trunk = max(0.0, between / free_between - own / float(np.mean(budgets)))
    return TrunkNoise(float(np.sqrt(trunk)), float(np.sqrt(own)), free_between)
