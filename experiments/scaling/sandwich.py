"""How far estimates scatter, whatever the noise: sandwich variances and their freedom.

An estimate that minimises a sum of losses of residuals has the covariance A^-1 B A^-1: A is the
curvature of the sum, B the variance of its gradient (Godambe 1960, Huber 1967). Only where the
loss is minus the log of the noise's density do the two cancel. B is taken from the residuals,
rows of one cluster together, each corrected for its leverage (HC2; CR2 of Bell and McCaffrey
2002 for clusters), and so few residuals are known to belong to Student's t with the degrees of
freedom of Bell and McCaffrey.
"""

from dataclasses import dataclass

import numpy as np

RIDGE = 1e-9
"""Share of the curvature's trace that is added to it: directions that the data leave open."""
LEAST_REST = 0.01
"""A residual keeps at least this share of its variance (1 - leverage) in a correction."""


@dataclass(frozen=True)
class Scatter:
    """Of K linear combinations of estimated coordinates.

    Attributes:
        variance: by the sandwich [K].
        curvature: their entries of A^-1 [K]: what twice a rise of the objective is measured in.
        freedom: degrees of freedom of `variance` [K], at least 1.
    """

    variance: np.ndarray
    curvature: np.ndarray
    freedom: np.ndarray


def scatter(
    gradient: np.ndarray,
    score: np.ndarray,
    slope: np.ndarray,
    clusters: np.ndarray,
    combinations: np.ndarray,
) -> Scatter:
    """The sandwich of an estimate at its optimum.

    Args:
        gradient: of each row's fitted value [n, P].
        score: derivative of each row's loss in its residual [n].
        slope: expected derivative of the score [n]; 1 and the residual itself as score give
            least squares.
        clusters: number of each row's cluster [n]; rows of different clusters are independent.
        combinations: weights of the coordinates [K, P].
    """
    norm = np.sqrt((gradient**2).sum(0))
    norm = np.where(norm > 0, norm, 1.0)
    unit, weights = gradient / norm, combinations / norm
    root = _root(unit, slope)
    score = _unshrunk(np.sqrt(slope)[:, None] * (unit @ root), clusters, score[None])[0]
    groups = int(clusters.max()) + 1
    sums = np.zeros((groups, unit.shape[1]))
    np.add.at(sums, clusters, score[:, None] * unit)
    ridge = RIDGE * float(slope @ (unit**2).sum(1)) * float(score @ score) / float(slope.sum())
    inner = sums.T @ sums + ridge * np.eye(len(norm))
    across = weights @ root
    out = across @ root.T
    variance = np.einsum("kp,pq,kq->k", out, inner, out)
    return Scatter(variance, (across**2).sum(1), _freedom(unit, clusters, weights))


def _root(unit: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """R [P, P] with R R' = (sum slope unit unit')^-1."""
    curvature = (unit * slope[:, None]).T @ unit
    curvature += RIDGE * np.trace(curvature) * np.eye(len(curvature))
    values, basis = np.linalg.eigh(curvature)
    return basis / np.sqrt(np.maximum(values, RIDGE * values[-1]))


def _unshrunk(hat_root: np.ndarray, clusters: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(I - H)^-1/2 within each cluster, applied to rows [K, n]; H = hat_root hat_root' [n, n]."""
    rest = np.maximum(1 - (hat_root**2).sum(1), LEAST_REST)
    out = rows / np.sqrt(rest)
    for g in np.flatnonzero(np.bincount(clusters) > 1):
        own = np.flatnonzero(clusters == g)
        values, basis = np.linalg.eigh(np.eye(len(own)) - hat_root[own] @ hat_root[own].T)
        values = np.maximum(values, LEAST_REST)
        out[:, own] = (rows[:, own] @ basis / np.sqrt(values)) @ basis.T
    return out


def _freedom(unit: np.ndarray, clusters: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bell and McCaffrey's degrees of freedom of each combination [K], for least squares.

    The sandwich is a quadratic form in the noise with the matrix G, one row and column a
    cluster; under equal noise (tr G)^2 / tr G^2 is the freedom of the chi-square nearest to it.
    """
    n, groups = len(clusters), int(clusters.max()) + 1
    root = _root(unit, np.ones(n))
    hat_root = unit @ root
    parts = _unshrunk(hat_root, clusters, weights @ root @ hat_root.T)
    out = np.empty(len(weights))
    for k, part in enumerate(parts):
        own = np.bincount(clusters, part**2, minlength=groups)
        seen = np.zeros((groups, hat_root.shape[1]))
        np.add.at(seen, clusters, part[:, None] * hat_root)
        shared = (seen**2).sum(1)
        squares = (own**2 - 2 * own * shared).sum() + ((seen.T @ seen) ** 2).sum()
        out[k] = (own - shared).sum() ** 2 / max(squares, 1e-300)
    return np.maximum(out, 1.0)
