"""Scaling laws: the loss of a run as a function of size, data and compute.

Each law is data (names, formula, starting grid) plus one function that builds a `Model`
for given runs: value, gradient and curvature in standardised coordinates, for many
parameter vectors at once. Shapes: S parameter vectors, n runs, P parameters.

Inside, positive parameters are logarithms (E = exp(e), as Hoffmann et al. do), inputs are
log-transformed, centred and scaled, so that a unit step in any coordinate changes a term
by about a factor e. Outside, one sees only the parameters of the formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError

Inputs = dict[str, np.ndarray]


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


@dataclass(frozen=True)
class Law:
    """A functional form. `loss(parameters [..., P], inputs)` is the formula itself."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    floor: str | None
    exponents: tuple[str, ...]
    loss: Callable[[np.ndarray, Inputs], np.ndarray]
    build: Callable[[Inputs], Model]
    starts: Callable[[Model, Inputs, np.ndarray], np.ndarray]

    def index(self, parameter: str) -> int:
        """Position of a parameter in `parameters`."""
        return self.parameters.index(parameter)


# --- sums of exponentials: log L = logsumexp_k u_k, with u_k linear in the coordinates ---

Term = tuple[tuple[int, np.ndarray], ...]
"""A term of the sum: (parameter index, feature [n]) pairs. The first pair is the term's own
intercept, whose feature is 1 everywhere."""


def _log_sum_model(terms: Sequence[Term], n: int, positive: tuple[bool, ...]) -> Model:
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


# --- L = E + A / N^alpha + B / D^beta ---


def _chinchilla_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    e, a, b, alpha, beta = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return e + a * x["params"] ** -alpha + b * x["tokens"] ** -beta


def _chinchilla(x: Inputs) -> Model:
    log_n, log_d = np.log(x["params"]), np.log(x["tokens"])
    one = np.ones_like(log_n)
    terms: list[Term] = [((0, one),), ((1, one), (3, -log_n)), ((2, one), (4, -log_d))]
    return _log_sum_model(terms, len(log_n), (True, True, True, False, False))


def _chinchilla_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    """Hoffmann et al.'s grid, 5 x 6 x 6 x 5 x 5 = 4,500 starts (their appendix D.3)."""
    exponents = np.arange(0, 2.5, 0.5)
    logs = np.arange(0, 30, 5.0)
    natural = np.array(
        list(product(np.arange(-1, 1.5, 0.5), logs, logs, exponents, exponents)), dtype=float
    )
    return model.from_natural(natural)


# --- power laws in compute ---


def _compute(x: Inputs) -> np.ndarray:
    return np.log(x["compute"])


def _floor_starts(y: np.ndarray) -> list[tuple[float, float]]:
    """(log floor, log of the remainder of the median loss) for a range of floors."""
    low, middle = float(np.exp(y.min())), float(np.exp(np.median(y)))
    fractions = (0.01, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
    return [(np.log(f * low), np.log(middle - f * low + 1e-12)) for f in fractions]


_EXPONENTS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)


def _power_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    k, gamma = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return k * x["compute"] ** -gamma


def _power(x: Inputs) -> Model:
    log_c = _compute(x)
    return _log_sum_model([((0, np.ones_like(log_c)), (1, -log_c))], len(log_c), (True, False))


def _power_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    rows = [
        (shift + np.median(y), g * _scale(model, 1)) for shift in (-0.5, 0, 0.5) for g in _EXPONENTS
    ]
    return np.array(rows)


def _scale(model: Model, slope: int) -> float:
    """Standard deviation of the feature that belongs to a slope."""
    return 1.0 / model.matrix[slope, slope]


def _power_floor_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    e, k, gamma = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return e + k * x["compute"] ** -gamma


def _power_floor(x: Inputs) -> Model:
    log_c = _compute(x)
    one = np.ones_like(log_c)
    return _log_sum_model([((0, one),), ((1, one), (2, -log_c))], len(log_c), (True, True, False))


def _power_floor_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    rows = [
        (e, rest + shift, gamma * _scale(model, 2))
        for (e, rest), gamma, shift in product(_floor_starts(y), _EXPONENTS, (-0.5, 0.0, 0.5))
    ]
    return np.array(rows)


# --- Gadre et al. 2024, equation 4: over-training at M = D / N ---


def _gadre_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    e, a, b, eta = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    ratio = x["tokens"] / x["params"]
    return e + (a * ratio**eta + b * ratio**-eta) * x["compute"] ** -eta


def _gadre(x: Inputs) -> Model:
    log_c, log_m = _compute(x), np.log(x["tokens"] / x["params"])
    one = np.ones_like(log_c)
    terms: list[Term] = [
        ((0, one),),
        ((1, one), (3, log_m - log_c)),
        ((2, one), (3, -log_m - log_c)),
    ]
    return _log_sum_model(terms, len(log_c), (True, True, True, False))


def _gadre_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    shares = (0.02, 0.2, 0.5, 0.8, 0.98)
    rows = [
        (e, rest + np.log(share), rest + np.log(1 - share), eta * _scale(model, 3))
        for (e, rest), share, eta in product(_floor_starts(y), shares, _EXPONENTS)
    ]
    return np.array(rows)


# --- smoothly broken power law with one break (Caballero et al. 2023) ---
#
# Their sharpness f is fixed at 1, a change of slope over about two decades: left free it
# runs to 0 on any real ladder, where the "break" becomes a corner between two runs.


def _broken_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    e, k, c0, c1, d = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return e + k * x["compute"] ** -c0 * (1 + x["compute"] / d) ** -c1


def _broken(x: Inputs) -> Model:
    raw = _compute(x)
    mean, spread = raw.mean(), max(raw.std(), 1e-9)
    z = (raw - mean) / spread
    n = len(z)

    def evaluate(q: np.ndarray) -> Evaluation:
        e, k, c0, c1, d = (q[:, j, None] for j in range(5))
        t = spread * (z - d)
        small = np.exp(-np.abs(t))
        soft = np.maximum(t, 0) + np.log1p(small)
        gate = np.where(t > 0, 1.0, small) / (1 + small)
        u = k - c0 * z - c1 * soft
        top = np.maximum(e, u)
        rest, share = np.exp(e - top), np.exp(u - top)
        total = rest + share
        value = top + np.log(total)
        rest /= total
        share /= total
        slope = np.zeros((len(q), 5, n))
        slope[:, 1], slope[:, 2], slope[:, 3] = 1.0, -z, -soft
        slope[:, 4] = spread * c1 * gate
        gradient = slope * share[:, None]
        gradient[:, 0] = rest

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            out = (gradient * (outer - inner)[:, None]) @ gradient.transpose(0, 2, 1)
            out[:, 0, 0] += (inner * rest).sum(1)
            w = inner * share
            out += (slope * w[:, None]) @ slope.transpose(0, 2, 1)
            mixed = spread * (w * gate).sum(1)
            out[:, 3, 4] += mixed
            out[:, 4, 3] += mixed
            out[:, 4, 4] -= spread**2 * (w * c1 * gate * (1 - gate)).sum(1)
            return out

        return Evaluation(value, gradient, hessian)

    # log C = mean + spread z: k' = k - c0 mean, c0' = c0 spread, d' = (d - mean) / spread.
    matrix = np.diag([1.0, 1.0, 1 / spread, 1.0, spread])
    matrix[1, 2] = mean / spread
    offset = np.array([0, 0, 0, 0, mean])
    return Model("log", evaluate, matrix, offset, (True, True, False, False, True), (0, 1))


def _broken_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    spread = 1.0 / model.matrix[2, 2]
    slopes = (0.02, 0.1, 0.3)
    rows = [
        (e, rest, c0 * spread, c1, d)
        for (e, rest), c0, c1, d in product(
            _floor_starts(y)[::2], slopes, (-0.1, -0.02, *slopes), (-1.2, -0.4, 0.4, 1.2)
        )
    ]
    return np.array(rows)


# --- a straight line in log10 C ---


def _line_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    intercept, slope = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return intercept + slope * np.log10(x["compute"])


def _line(x: Inputs) -> Model:
    raw = np.log10(x["compute"])
    mean, spread = raw.mean(), max(raw.std(), 1e-9)
    basis = np.stack([np.ones_like(raw), (raw - mean) / spread])

    def evaluate(q: np.ndarray) -> Evaluation:
        gradient = np.broadcast_to(basis, (len(q), *basis.shape))

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            return (gradient * outer[:, None]) @ gradient.transpose(0, 2, 1)

        return Evaluation(q @ basis, gradient, hessian)

    matrix = np.array([[1.0, -mean / spread], [0.0, 1 / spread]])
    return Model("raw", evaluate, matrix, np.zeros(2), (False, False))


def _line_starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    loss = np.exp(y)
    basis = np.stack([np.ones_like(loss), np.log10(x["compute"])], axis=1)
    answer = model.from_parameters(np.linalg.lstsq(basis, loss, rcond=None)[0])
    spread = max(float(loss.std()), 1e-6)
    offsets = np.array(list(product((0.0, -0.5, 0.5), repeat=2)))
    return answer + spread * offsets


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law("chinchilla", "L = E + A / N^alpha + B / D^beta", ("E", "A", "B", "alpha", "beta"),
            ("params", "tokens"), "E", ("alpha", "beta"),
            _chinchilla_loss, _chinchilla, _chinchilla_starts),
        Law("power", "L = K / C^gamma", ("K", "gamma"), ("compute",), None, ("gamma",),
            _power_loss, _power, _power_starts),
        Law("power-floor", "L = E + K / C^gamma", ("E", "K", "gamma"), ("compute",), "E",
            ("gamma",), _power_floor_loss, _power_floor, _power_floor_starts),
        Law("line", "L = intercept + slope log10 C", ("intercept", "slope"), ("compute",), None,
            (), _line_loss, _line, _line_starts),
        Law("gadre", "L = E + (a M^eta + b M^-eta) / C^eta, M = D / N", ("E", "a", "b", "eta"),
            ("compute", "params", "tokens"), "E", ("eta",),
            _gadre_loss, _gadre, _gadre_starts),
        Law("broken", "L = E + K C^-c0 (1 + C / C_break)^-c1",
            ("E", "K", "c0", "c1", "C_break"), ("compute",), "E", ("c0",),
            _broken_loss, _broken, _broken_starts),
    )
}  # fmt: skip
"""Every law by name: the names that the command line accepts."""


def get_law(name: str) -> Law:
    """Look a law up by name.

    Raises:
        ScalingError: no law has that name.
    """
    if name not in LAWS:
        raise ScalingError(f"law: {name!r} is unknown; choose one of {', '.join(LAWS)}")
    return LAWS[name]
