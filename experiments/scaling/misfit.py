"""What a law misses: departures from it, as large as residuals show beyond the noise.

Intervals from resampled noise say how well a law's parameters are known if the law is true. Here
log loss is the law plus a departure of each family, a Gaussian process over (log N, log D) with
covariance t^2 exp(-d^2 / 2 l^2), d in e-folds, of which families share a part (they read the same
text): the model discrepancy of Kennedy and O'Hagan (2001). How large t is, how smooth and how much
shared is weighed by the restricted likelihood of the residuals (Patterson and Thompson 1971),
linear in the law's parameters at the fit, under a flat prior over a grid; t = 0, no departure, is
on it. What the parameters can take up is no evidence.

What residuals say of the departure at a place is added to the law there (kriging), so that a run
which the law misses still counts for its own surroundings. Every refit gets a departure of its own
beside its noise and is treated like the fit; what then is wrong about it is the error of the whole
estimate. Far outside the runs the law stands alone, and a departure stays as large as within:
residuals cannot say how it grows there.

Shapes: n runs, P parameters, R refits, F features, G points of the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

LENGTHS = (0.7, 1.4, 2.8)
"""e-folds of N and D over which departures stay alike: about one, two and four doublings."""
SHARED = (0.0, 0.5, 0.9)
"""Shares of a departure's variance that families have in common."""
_STEPS = 25
_WIDEST = 3.0
"""The largest departure on the grid: what it leaves beside the law, in that of the residuals."""
_FEATURES = 256
_LIGHT = 1e-3
"""Points of the grid that weigh less are left out of what residuals tell."""
_RIDGE = 1e-9


@dataclass(frozen=True)
class Places:
    """Where losses are: log N and log D [n, 2], and the number of each one's family [n]."""

    logs: np.ndarray
    family: np.ndarray

    @staticmethod
    def of(params: np.ndarray, tokens: np.ndarray, family: np.ndarray) -> "Places":
        """Sizes, tokens and families [n]."""
        return Places(np.log(np.stack([params, tokens], axis=1)), np.asarray(family))


def likeness(a: Places, b: Places, length: float, shared: float) -> np.ndarray:
    """Correlation of departures between places [a, b]."""
    distance = ((a.logs[:, None] - b.logs[None]) ** 2).sum(2)
    alike = np.where(a.family[:, None] == b.family[None], 1.0, shared)
    return alike * np.exp(-distance / (2 * length**2))


@dataclass(frozen=True)
class Departures:
    """One family's departures of log losses from a law, as functions of size and tokens.

    Random Fourier features of the process (Rahimi and Recht 2007), so that one draw can be asked
    at the runs and, later, on a path.

    Attributes:
        waves, phases: of the features [F, 2], [F].
        sizes: of the features in each refit [R, F].
        lengths: in each refit [R].
    """

    waves: np.ndarray
    phases: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray

    def of(self, rows: np.ndarray) -> "Departures":
        """Those of some refits, by number."""
        return replace(self, sizes=self.sizes[rows], lengths=self.lengths[rows])

    def at(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Departures of log loss [R, m] at sizes and tokens [m]."""
        place = np.log(np.stack([params, tokens], axis=1))
        out = np.empty((len(self.sizes), len(place)))
        for length in np.unique(self.lengths):
            rows = self.lengths == length
            waves = np.cos(place @ self.waves.T / length + self.phases)  # [m, F]
            out[rows] = self.sizes[rows] @ waves.T * np.sqrt(2 / len(self.phases))
        return out


@dataclass(frozen=True)
class Misfit:
    """How large departures are: weights over a grid.

    Attributes:
        places: of the runs [n].
        noise: covariance of their log losses [n, n].
        deviations: t, of log losses [G].
        lengths: l in e-folds [G].
        shared: share of the variance that families have in common [G].
        weights: of each, sum 1 [G].
        visible: what is left of t beside the law, root mean square over the runs [G].
    """

    places: Places
    noise: np.ndarray
    deviations: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray
    weights: np.ndarray
    visible: np.ndarray

    def text(self) -> str:
        """What was found, in words."""
        order = np.argsort(self.visible, kind="stable")
        reached = np.minimum(np.cumsum(self.weights[order]), 1)
        middle, high = (self.visible[order][np.searchsorted(reached, share)]
                        for share in (0.5, 0.95))  # fmt: skip
        return (f"beyond the noise the law misses log losses by {middle:.4f} (root mean square; "
                f"below {high:.4f} with 95%): it is in the gaps and intervals")  # fmt: skip

    def draw(
        self, count: int, families: Sequence[str], rng: np.random.Generator
    ) -> dict[str, Departures]:
        """Departures of each family in `count` refits."""
        at = rng.choice(len(self.weights), size=count, p=self.weights)
        waves = rng.standard_normal((_FEATURES, 2))
        phases = rng.uniform(0, 2 * np.pi, _FEATURES)
        common, own = np.sqrt(self.shared[at]), np.sqrt(1 - self.shared[at])
        of_all = common[:, None] * rng.standard_normal((count, _FEATURES))
        found = {}
        for name in families:
            sizes = of_all + own[:, None] * rng.standard_normal((count, _FEATURES))
            found[name] = Departures(waves, phases, self.deviations[at, None] * sizes,
                                     self.lengths[at])  # fmt: skip
        return found

    def inverses(self) -> "Inverses":
        """Of the covariances of departures and noise, at the points of the grid that weigh."""
        heavy = np.flatnonzero(self.weights > _LIGHT)
        found = np.empty((len(heavy), *self.noise.shape))
        for k, g in enumerate(heavy):
            kernel = likeness(self.places, self.places, self.lengths[g], self.shared[g])
            found[k] = np.linalg.inv(self.noise + self.deviations[g] ** 2 * kernel)
        return Inverses(self, heavy, found)


@dataclass(frozen=True)
class Inverses:
    """Inverse covariances of departures and noise.

    Attributes:
        misfit: the grid.
        heavy: its points that weigh, by number [H].
        inverse: at each [H, n, n].
    """

    misfit: Misfit
    heavy: np.ndarray
    inverse: np.ndarray

    def least_squares(self, gradient: np.ndarray) -> np.ndarray:
        """Residuals [n] to the step of a law's coordinates by generalised least squares [P, n].

        Args:
            gradient: of the law's log losses in its coordinates [n, P].
        """
        solved = gradient.T @ self.inverse  # [H, P, n]
        steps = np.linalg.pinv(solved @ gradient, rcond=1e-9, hermitian=True) @ solved
        return np.tensordot(self.misfit.weights[self.heavy], steps, 1)

    def telling(self) -> "Telling":
        """What residuals say of departures."""
        parts: dict[tuple[float, float], np.ndarray] = {}
        misfit = self.misfit
        for g, inverse in zip(self.heavy, self.inverse, strict=True):
            key = (float(misfit.lengths[g]), float(misfit.shared[g]))
            share = misfit.weights[g] * misfit.deviations[g] ** 2
            parts[key] = parts.get(key, 0.0) + share * inverse
        return Telling(misfit.places, parts)


@dataclass(frozen=True)
class Telling:
    """How residuals tell departures (kriging).

    Attributes:
        places: of the runs [n].
        parts: (length, shared) -> residuals to weights of the runs' surroundings [n, n].
    """

    places: Places
    parts: dict[tuple[float, float], np.ndarray]

    def at(self, places: Places, residuals: np.ndarray) -> np.ndarray:
        """Departures of log loss [R, m] by residuals [R, n]."""
        out = np.zeros((len(residuals), len(places.logs)))
        for (length, shared), part in self.parts.items():
            out += residuals @ (part @ likeness(self.places, places, length, shared))
        return out


@dataclass(frozen=True)
class Beside:
    """What stands beside the law: in the fit, and in each refit.

    Attributes:
        families: names, in the order of their numbers in `Places`.
        fitted: family -> parameters of the fit's law once generalised least squares moved it [P].
        telling: how residuals tell departures.
        fit: residuals of the moved fit [1, n].
        refits: of each moved refit [R, n].
        departures: family -> those that the losses of each refit were given [R].
    """

    families: tuple[str, ...]
    fitted: dict[str, np.ndarray]
    telling: Telling
    fit: np.ndarray
    refits: np.ndarray
    departures: dict[str, Departures]

    def of_fit(self, name: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """To be added to the log losses of the fitted law [1, m]."""
        return self.telling.at(self._places(name, params, tokens), self.fit)

    def of_refits(self, name: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """To be added to those of the refits' laws [R, m]: told, less what was there to tell."""
        told = self.telling.at(self._places(name, params, tokens), self.refits)
        return told - self.departures[name].at(params, tokens)

    def _places(self, name: str, params: np.ndarray, tokens: np.ndarray) -> Places:
        return Places.of(params, tokens, np.full(len(params), self.families.index(name)))


def estimate_misfit(
    residuals: np.ndarray,
    gradient: np.ndarray,
    noise: np.ndarray,
    places: Places,
    lengths: Sequence[float] = LENGTHS,
    shared: Sequence[float] = SHARED,
) -> Misfit:
    """Weighs how large departures from a law are.

    Args:
        residuals: log losses less the fit's [n].
        gradient: of the law's log losses in its parameters, at the fit [n, P].
        noise: covariance of the log losses' noise [n, n], positive definite.
        places: of the runs [n].
        lengths, shared: the grid; a length far below the runs' distances gives every cell a
            departure of its own.
    """
    basis, spread, _ = np.linalg.svd(gradient, full_matrices=True)
    rank = int((spread > spread.max() * 1e-10).sum())
    free = basis[:, rank:]  # contrasts that no parameter moves [n, n - rank]
    base = free.T @ noise @ free
    base += _RIDGE * np.trace(base) / len(base) * np.eye(len(base))
    white = np.linalg.solve(np.linalg.cholesky(base), free.T)  # [n - rank, n]
    left = white @ residuals
    visible = np.linspace(0, _WIDEST, _STEPS) * np.sqrt(np.mean((free.T @ residuals) ** 2))
    rows = []
    for length, share in product(lengths, shared):
        kernel = likeness(places, places, length, share)
        seen = np.sqrt(np.trace(free.T @ kernel @ free) / free.shape[1])
        values, axes = np.linalg.eigh(white @ kernel @ white.T)
        squares = (axes.T @ left) ** 2
        for deviation, part in zip(visible / seen, visible, strict=True):
            variance = 1 + deviation**2 * np.maximum(values, 0)
            log_likelihood = -0.5 * (squares / variance + np.log(variance)).sum()
            rows.append((deviation, length, share, log_likelihood, part))
    deviations, all_lengths, shares, logs, parts = np.array(rows).T
    weights = np.exp(logs - logs.max())
    return Misfit(places, noise, deviations, all_lengths, shares, weights / weights.sum(), parts)
