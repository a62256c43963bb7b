"""What runs would tell about a law: Fisher information, before any of them is run.

For the law L = E + A / N^alpha + B / D^beta of one family or of several, at parameters that are
assumed. The noise is normal with one standard deviation in log loss, independent between runs.
Coordinates are (log E, log A, log B, alpha, beta) of the first family, then of the next, and so
on; families that share their floor have one log E, the first coordinate.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import root_scalar

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.isoflop import optimal_allocation
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.objectives import Objective

_LAW = get_law("chinchilla")
_HORIZON = (10.0, 40.0)
"""Where a crossing is looked for (log10 FLOPs)."""


@dataclass(frozen=True)
class AssumedLaws:
    """The laws that the families are taken to follow.

    Attributes:
        families: their names [F].
        parameters: E, A, B, alpha, beta of each [F, 5], all above 0.
        shares_floor: whether a fit will estimate one E for all of them.
    """

    families: tuple[str, ...]
    parameters: np.ndarray
    shares_floor: bool = False

    def __post_init__(self) -> None:
        for family, values in zip(self.families, self.parameters, strict=True):
            for name, value in zip(_LAW.parameters, values, strict=True):
                if not (value > 0 and math.isfinite(value)):
                    raise ScalingError(f"{name} of {family} is {value:g}: assume a number above 0")
        if self.shares_floor and np.ptp(self.parameters[:, 0]) > 0:
            raise ScalingError(f"E is {', '.join(f'{e:g}' for e in self.parameters[:, 0])}: assume "
                               "one floor where the families share it")  # fmt: skip

    @property
    def size(self) -> int:
        """Number of coordinates P."""
        return 4 * len(self.families) + (1 if self.shares_floor else len(self.families))

    def columns(self, family: str) -> np.ndarray:
        """Where a family's log E, log A, log B, alpha and beta stand among the coordinates [5]."""
        k = self.families.index(family)
        if not self.shares_floor:
            return 5 * k + np.arange(5)
        return np.array([0, *(1 + 4 * k + np.arange(4))])

    def of(self, family: str) -> np.ndarray:
        """A family's E, A, B, alpha and beta [5]."""
        return self.parameters[self.families.index(family)]

    def gradient(self, family: str, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Derivatives [n, P] of log loss of a family's runs, with params and tokens [n]."""
        e, a, b, alpha, beta = self.of(family)
        n_term, d_term = a * params**-alpha, b * tokens**-beta
        whole = e + n_term + d_term
        out = np.zeros((len(whole), self.size))
        own = (e * np.ones_like(whole), n_term, d_term, -n_term * np.log(params),
               -d_term * np.log(tokens))  # fmt: skip
        out[:, self.columns(family)] = np.stack(own, axis=1) / whole[:, None]
        return out


@dataclass(frozen=True)
class Quantity:
    """What a design is to determine: a function of the coordinates, linearised.

    Attributes:
        name: in words.
        value: under the assumed laws.
        gradient: its derivatives [P].
    """

    name: str
    value: float
    gradient: np.ndarray


def of_family(laws: AssumedLaws, name: str, family: str) -> Quantity:
    """`alpha`, `beta`, `floor` (E, nats a token) or `a` (N* ~ C^a) of one family."""
    e, _, _, alpha, beta = laws.of(family)
    total = alpha + beta
    value, own = {
        "alpha": (alpha, (0, 0, 0, 1, 0)),
        "beta": (beta, (0, 0, 0, 0, 1)),
        "floor": (e, (e, 0, 0, 0, 0)),
        "a": (beta / total, (0, 0, 0, -beta / total**2, alpha / total**2)),
    }[name]
    gradient = np.zeros(laws.size)
    gradient[laws.columns(family)] = own
    return Quantity(f"{'E' if name == 'floor' else name} of {family}", float(value), gradient)


def loss_at(laws: AssumedLaws, family: str, compute: float) -> Quantity:
    """Least loss (nats a token) of a family at C = 6 N D FLOPs.

    By the envelope theorem its derivatives are those of the law at the best N and D.
    """
    params, tokens = _best(laws, family, np.log10([compute]))
    loss = float(_least_loss(laws, family, np.log10([compute]))[0])
    gradient = loss * laws.gradient(family, params, tokens)[0]
    return Quantity(f"loss of {family} at {compute:.3g} FLOPs", loss, gradient)


def gap_at(laws: AssumedLaws, compute: float) -> Quantity:
    """Least loss of the first family less that of the second, at C = 6 N D FLOPs.

    Raises:
        ScalingError: there is one family alone.
    """
    one, other = _pair(laws)
    first, second = loss_at(laws, one, compute), loss_at(laws, other, compute)
    name = f"loss of {one} less {other} at {compute:.3g} FLOPs"
    return Quantity(name, first.value - second.value, first.gradient - second.gradient)


def crossing_of(laws: AssumedLaws) -> Quantity:
    """Where the first two families' least losses are equal (log10 FLOPs, C = 6 N D).

    Raises:
        ScalingError: there is one family alone, or they are equal nowhere or more than once.
    """
    one, other = _pair(laws)

    def gap(log10_c: np.ndarray) -> np.ndarray:
        return _least_loss(laws, one, log10_c) - _least_loss(laws, other, log10_c)

    grid = np.arange(_HORIZON[0], _HORIZON[1] + 0.01, 0.01)
    changes = np.flatnonzero(np.diff(gap(grid) > 0))
    if len(changes) != 1:
        raise ScalingError(f"crossing: the assumed laws of {one} and {other} cross {len(changes)} "
                           "times between 10^10 and 10^40 FLOPs, not once; choose the gap at a "
                           "compute instead")  # fmt: skip
    low, high = grid[changes[0]], grid[changes[0] + 1]
    point = float(root_scalar(lambda x: float(gap(np.array([x]))[0]), bracket=(low, high)).root)
    # What is above the floor falls as C^(-alpha beta / (alpha + beta)).
    slope = 0.0
    for family, sign in ((one, -1), (other, 1)):
        e, _, _, alpha, beta = laws.of(family)
        above = float(_least_loss(laws, family, np.array([point]))[0]) - e
        slope += sign * math.log(10) * alpha * beta / (alpha + beta) * above
    gradient = -gap_at(laws, 10**point).gradient / slope
    return Quantity(f"crossing of {one} and {other}, log10 FLOPs", point, gradient)


def _best(laws: AssumedLaws, family: str, log10_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best N and D at computes 10^log10_c = 6 N D [m]."""
    k_n, a, k_d, b = optimal_allocation(laws.of(family))
    log_c = math.log(10) * log10_c
    return np.exp(k_n + a * log_c), np.exp(k_d + b * log_c)


def _least_loss(laws: AssumedLaws, family: str, log10_c: np.ndarray) -> np.ndarray:
    params, tokens = _best(laws, family, log10_c)
    return _LAW.loss(laws.of(family), {"params": params, "tokens": tokens})


def _pair(laws: AssumedLaws) -> tuple[str, str]:
    if len(laws.families) != 2:
        raise ScalingError(f"a gap or a crossing is between two families; the assumed laws are of "
                           f"{', '.join(laws.families)}")  # fmt: skip
    return laws.families[0], laws.families[1]


def variance_factor(objective: Objective, noise: float) -> float:
    """Asymptotic variance of a fit's parameters, over that of least squares in log loss.

    For normal noise of standard deviation `noise` in log loss: psi^2 over psi'^2 of the
    objective's influence function psi. Huber's with a delta far below the noise is absolute
    deviation, pi / 2; far above it is least squares, 1.

    Raises:
        ScalingError: the objective is not one of log loss.
    """
    if objective.kind == "log-lsq":
        return 1.0
    if objective.kind == "lad":
        return math.pi / 2
    if objective.kind != "huber":
        raise ScalingError(f"objective: {objective.kind} is not of log loss; choose huber, lad or "
                           "log-lsq")  # fmt: skip
    k = objective.delta / noise
    inside = math.erf(k / math.sqrt(2))
    edge = 2 * k * math.exp(-(k**2) / 2) / math.sqrt(2 * math.pi)
    return (inside - edge + k**2 * (1 - inside)) / inside**2
