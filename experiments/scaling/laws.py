"""Scaling laws: the loss of a run as a function of size, data and compute.

Each law is data (names, formula, starting grid) plus one function that builds a `Model`
for given runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling import accuracy_law, precision_law, repetition_law
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.models import Evaluation, Inputs, Model, Term, log_sum_model


@dataclass(frozen=True)
class Law:
    """A functional form. `loss(parameters [..., P], inputs)` is the formula itself.

    The law falls along its `inputs`; it reads the columns `also` besides. It gives the column
    `target`, and is fitted to it by the `objective` unless another one is named.
    """

    name: str
    formula: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    floor: str | None
    exponents: tuple[str, ...]
    loss: Callable[[np.ndarray, Inputs], np.ndarray]
    build: Callable[[Inputs], Model]
    starts: Callable[[Model, Inputs, np.ndarray], np.ndarray]
    also: tuple[str, ...] = ()
    target: str = "loss"
    objective: str = "huber"

    def index(self, parameter: str) -> int:
        """Position of a parameter in `parameters`."""
        return self.parameters.index(parameter)


# --- L = E + A / N^alpha + B / D^beta ---


def _chinchilla_loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    e, a, b, alpha, beta = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return e + a * x["params"] ** -alpha + b * x["tokens"] ** -beta


def _chinchilla(x: Inputs) -> Model:
    log_n, log_d = np.log(x["params"]), np.log(x["tokens"])
    one = np.ones_like(log_n)
    terms: list[Term] = [((0, one),), ((1, one), (3, -log_n)), ((2, one), (4, -log_d))]
    return log_sum_model(terms, len(log_n), (True, True, True, False, False))


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
    return log_sum_model([((0, np.ones_like(log_c)), (1, -log_c))], len(log_c), (True, False))


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
    return log_sum_model([((0, one),), ((1, one), (2, -log_c))], len(log_c), (True, True, False))


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
    return log_sum_model(terms, len(log_c), (True, True, True, False))


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
            (), _line_loss, _line, _line_starts, objective="lsq"),
        Law("gadre", "L = E + (a M^eta + b M^-eta) / C^eta, M = D / N", ("E", "a", "b", "eta"),
            ("compute", "params", "tokens"), "E", ("eta",),
            _gadre_loss, _gadre, _gadre_starts),
        Law("broken", "L = E + K C^-c0 (1 + C / C_break)^-c1",
            ("E", "K", "c0", "c1", "C_break"), ("compute",), "E", ("c0",),
            _broken_loss, _broken, _broken_starts),
        Law("precision", "L = E + A / (N (1 - exp(-bits / gamma)))^alpha + B / D^beta",
            precision_law.PARAMETERS, ("params", "tokens"), "E", ("alpha", "beta"),
            precision_law.loss, precision_law.build, precision_law.starts, also=("bits",)),
        Law("repeated", "L = E + A / N'^alpha + B / D'^beta, D' = U + U R_D (1 - exp((1 - D/U) / "
            "R_D)), N' likewise of the size that U deserves",
            repetition_law.PARAMETERS, ("params", "tokens"), "E", ("alpha", "beta"),
            repetition_law.loss, repetition_law.build, repetition_law.starts,
            also=("unique_tokens",)),
        Law("accuracy", "accuracy = chance + (ceiling - chance) / (1 + exp((L - L_half) / width))",
            accuracy_law.PARAMETERS, ("loss",), None, (),
            accuracy_law.accuracy, accuracy_law.build, accuracy_law.starts,
            also=("chance",), target="accuracy", objective="lsq"),
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
