"""A law bound to runs: value, gradient and curvature, for many parameter vectors at once.

Shapes: S parameter vectors, n runs, P parameters.

Inside, positive parameters are logarithms (E = exp(e), as Hoffmann et al. do), inputs are
log-transformed, centred and scaled, so that a unit step in any coordinate changes a term
by about a factor e. Outside, one sees only the parameters of the formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Inputs = dict[str, np.ndarray]
FAMILY = "family"
"""The input that says which family a run is of, in a law of several: 0, 1, ... [n]."""


@dataclass(frozen=True)
class Evaluation:
    """A law at S parameter vectors: values [S, n], gradients [S, P, n], and a function.

    `hessian(outer, inner)` is sum_n outer * gradient gradient' + inner * second derivative,
    [S, P, P] for weights [S, n]: what any sum of functions of the values needs.
    """

    value: np.ndarray
    gradient: np.ndarray
    hessian: Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Model:
    """A law bound to the inputs of n runs.

    `evaluate` works on standardised coordinates [S, P] and gives log loss where `space`
    is "log", loss where it is "raw". Natural coordinates (logs of positive parameters)
    are `matrix @ coordinates + offset`. `terms` are the coordinates that are the logarithm of
    a whole term of the loss: towards minus infinity the term vanishes.
    """

    space: str
    evaluate: Callable[[np.ndarray], Evaluation]
    matrix: np.ndarray
    offset: np.ndarray
    positive: tuple[bool, ...]
    terms: tuple[int, ...] = ()

    def to_natural(self, coordinates: np.ndarray) -> np.ndarray:
        """Standardised [..., P] -> natural coordinates [..., P]."""
        return coordinates @ self.matrix.T + self.offset

    def from_natural(self, natural: np.ndarray) -> np.ndarray:
        """Natural [..., P] -> standardised coordinates [..., P]."""
        return (natural - self.offset) @ np.linalg.inv(self.matrix).T

    def to_parameters(self, coordinates: np.ndarray) -> np.ndarray:
        """Standardised [..., P] -> the parameters of the formula [..., P]."""
        natural = self.to_natural(coordinates)
        with np.errstate(over="ignore"):
            return np.where(self.positive, np.exp(natural), natural)

    def from_parameters(self, parameters: np.ndarray) -> np.ndarray:
        """Parameters of the formula [..., P] -> standardised coordinates [..., P]."""
        parameters = np.asarray(parameters, dtype=float)
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.from_natural(np.where(self.positive, np.log(parameters), parameters))


# --- sums of exponentials: log L = logsumexp_k u_k, with u_k linear in the coordinates ---

Term = tuple[tuple[int, np.ndarray], ...]
"""A term of the sum: (parameter index, feature [n]) pairs. The first pair is the term's own
intercept, whose feature is 1 everywhere."""


def log_sum_model(terms: Sequence[Term], n: int, positive: tuple[bool, ...]) -> Model:
    """Build the model of log L = logsumexp over terms, standardising the coordinates."""
    size = len(positive)
    slopes = sorted({j for term in terms for j, _ in term[1:]})
    to_standard = np.eye(size)
    for j in slopes:
        features = np.concatenate([f for term in terms for i, f in term[1:] if i == j])
        # Spread within each term, so that a common offset is not mistaken for information.
        spread = np.sqrt(np.mean([np.var(f) for t in terms for i, f in t[1:] if i == j]))
        tiny = 1e-9 * (1 + np.abs(features).max())
        to_standard[j, j] = spread if spread > tiny else 1.0
    for term in terms:
        for j, feature in term[1:]:
            to_standard[term[0][0], j] += feature.mean()
    back = np.linalg.inv(to_standard)

    # In standard coordinates: intercept + sum_j coordinate_j * (feature_j - mean) / spread.
    standard: list[Term] = [
        tuple(
            [(term[0][0], np.ones(n))]
            + [(j, (f - f.mean()) / to_standard[j, j]) for j, f in term[1:]]
        )
        for term in terms
    ]
    columns = [np.array([j for j, _ in term]) for term in standard]
    pairs = [
        (
            [(a, b) for i, a in enumerate(cols) for b in cols[i:]],
            np.stack([fa * fb for i, (_, fa) in enumerate(term) for _, fb in term[i:]], axis=1),
        )
        for term, cols in zip(standard, columns, strict=True)
    ]

    def evaluate(coordinates: np.ndarray) -> Evaluation:
        count = len(coordinates)
        gradient = np.zeros((count, size, n))
        shares = []
        for term in standard:
            u = np.repeat(coordinates[:, term[0][0], None], n, axis=1)
            for j, feature in term[1:]:
                u += coordinates[:, j, None] * feature
            shares.append(u)
        top = shares[0].copy()
        for u in shares[1:]:
            np.maximum(top, u, out=top)
        total = np.zeros_like(top)
        for u in shares:
            u -= top
            np.exp(u, out=u)
            total += u
        value = np.log(total)
        value += top
        np.reciprocal(total, out=total)
        written: set[int] = set()
        for u, term in zip(shares, standard, strict=True):
            u *= total
            gradient[:, term[0][0]] = u
            for j, feature in term[1:]:
                if j in written:
                    gradient[:, j] += u * feature
                else:
                    np.multiply(u, feature, out=gradient[:, j])
                    written.add(j)

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            out = (gradient * (outer - inner)[:, None]) @ gradient.transpose(0, 2, 1)
            for u, (indices, products) in zip(shares, pairs, strict=True):
                moments = (inner * u) @ products
                for column, (a, b) in enumerate(indices):
                    out[:, a, b] += moments[:, column]
                    if a != b:
                        out[:, b, a] += moments[:, column]
            return out

        return Evaluation(value, gradient, hessian)

    intercepts = tuple(term[0][0] for term in terms)
    return Model("log", evaluate, back, np.zeros(size), positive, intercepts)
