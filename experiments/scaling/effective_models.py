"""Laws in which a count is replaced by an effective one, that further parameters shape.

log L = logsumexp_k u_k as in `models.py`, but u_k = intercept - slope * h_k, where h_k is the
logarithm of an effective count: a smooth function of some of the parameters. Shapes: S parameter
vectors, n runs, P parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfree_jax.experiments.scaling.models import Evaluation, Model


@dataclass(frozen=True)
class Effective:
    """The logarithm of an effective count [S, n] and its derivatives.

    Attributes:
        value: [S, n].
        first: parameter index -> derivative [S, n]; absent ones are 0.
        second: (index, index), ordered -> second derivative [S, n].
    """

    value: np.ndarray
    first: dict[int, np.ndarray] = field(default_factory=dict)
    second: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class EffectiveTerm:
    """exp(intercept - slope * h(parameters)), one term of the loss.

    `count` maps natural parameters [S, P] to h; `typical` is the raw count [n] near which it
    lies, by which the coordinates are centred and scaled.
    """

    intercept: int
    slope: int
    typical: np.ndarray
    count: Callable[[np.ndarray], Effective]


def effective_model(
    floor: int, terms: Sequence[EffectiveTerm], n: int, positive: tuple[bool, ...]
) -> Model:
    """Build the model of L = E + sum of terms, standardising intercepts and slopes.

    Where an effective count has no value (a parameter out of its range) the loss is NaN.
    """
    size = len(positive)
    to_standard = np.eye(size)
    for term in terms:
        logs = np.log(term.typical)
        to_standard[term.slope, term.slope] = logs.std() if logs.std() > 1e-9 else 1.0
        to_standard[term.intercept, term.slope] = -logs.mean()
    back = np.linalg.inv(to_standard)

    def evaluate(coordinates: np.ndarray) -> Evaluation:
        natural = coordinates @ back.T
        with np.errstate(all="ignore"):
            exponents = [np.repeat(natural[:, floor, None], n, axis=1)]
            slopes: list[dict[int, np.ndarray]] = [{floor: np.ones_like(exponents[0])}]
            curved: list[dict[tuple[int, int], np.ndarray]] = [{}]
            for term in terms:
                h, power = term.count(natural), natural[:, term.slope, None]
                exponents.append(natural[:, term.intercept, None] - power * h.value)
                first = {j: -power * d for j, d in h.first.items()}
                _add(first, term.intercept, np.ones_like(h.value))
                _add(first, term.slope, -h.value)
                second = {pair: -power * d for pair, d in h.second.items()}
                for j, d in h.first.items():
                    pair = (min(j, term.slope), max(j, term.slope))
                    _add(second, pair, -d * (2.0 if j == term.slope else 1.0))
                slopes.append(first)
                curved.append(second)
            top = np.max(exponents, axis=0)
            shares = np.exp(np.array(exponents) - top)
            total = shares.sum(0)
            value = top + np.log(total)
            shares /= total
        steep = np.zeros((len(terms) + 1, len(coordinates), size, n))
        for k, first in enumerate(slopes):
            for j, d in first.items():
                steep[k, :, j] = d
        gradient = np.einsum("ksn,kspn->spn", shares, steep)

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            out = (gradient * (outer - inner)[:, None]) @ gradient.transpose(0, 2, 1)
            for share, u, second in zip(shares, steep, curved, strict=True):
                weight = inner * share
                out += (u * weight[:, None]) @ u.transpose(0, 2, 1)
                for (i, j), d in second.items():
                    moment = np.einsum("sn,sn->s", weight, d)
                    out[:, i, j] += moment
                    if i != j:
                        out[:, j, i] += moment
            return back.T @ out @ back

        return Evaluation(value, back.T @ gradient, hessian)

    ends = (floor, *(term.intercept for term in terms))
    return Model("log", evaluate, back, np.zeros(size), positive, ends)


def _add(parts: dict, key: object, value: np.ndarray) -> None:
    parts[key] = parts[key] + value if key in parts else value
