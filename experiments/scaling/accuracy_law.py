"""Accuracy on a task as a function of the loss: a sigmoid above the chance level.

    accuracy = chance + (ceiling - chance) / (1 + exp((L - L_half) / width))

The chance level is known (0.25 for four choices), not fitted; at the loss L_half accuracy is half
way up. The loss may be that of any text, or of the task's own answers.
"""

from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling.models import Evaluation, Inputs, Model

PARAMETERS = ("ceiling", "L_half", "width")


def accuracy(p: np.ndarray, x: Inputs) -> np.ndarray:
    """The formula: parameters [..., 3], inputs `loss` and `chance` [n]."""
    ceiling, half, width = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    with np.errstate(over="ignore"):
        return x["chance"] + (ceiling - x["chance"]) / (1 + np.exp((x["loss"] - half) / width))


def build(x: Inputs) -> Model:
    """The law bound to runs; natural coordinates are (log ceiling, L_half, log width)."""
    loss, chance = x["loss"], x["chance"]
    spread = max(float(loss.std()), 1e-9)
    matrix, offset = np.diag([1.0, spread, 1.0]), np.array([0.0, loss.mean(), np.log(spread)])

    def evaluate(coordinates: np.ndarray) -> Evaluation:
        natural = coordinates @ matrix.T + offset
        ceiling, half, log_width = (natural[:, j, None] for j in range(3))
        with np.errstate(all="ignore"):
            top, scale = np.exp(ceiling), np.exp(-log_width)
            z = (half - loss) * scale
            s = 1 / (1 + np.exp(-z))
            rise = top - chance
            d1 = s * (1 - s)
            d2 = d1 * (1 - 2 * s)
            # z falls by itself for a unit of log width and rises by `scale` for one of L_half.
            slope = np.stack([top * s, rise * d1 * scale, -rise * d1 * z], axis=1)
            bend = {
                (0, 0): top * s, (0, 1): top * d1 * scale, (0, 2): -top * d1 * z,
                (1, 1): rise * d2 * scale**2, (1, 2): -rise * scale * (d2 * z + d1),
                (2, 2): rise * z * (d2 * z + d1),
            }  # fmt: skip
        gradient = slope * np.diag(matrix)[:, None]

        def hessian(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
            out = (gradient * outer[:, None]) @ gradient.transpose(0, 2, 1)
            for (i, j), d in bend.items():
                moment = np.einsum("sn,sn->s", inner, d) * matrix[i, i] * matrix[j, j]
                out[:, i, j] += moment
                if i != j:
                    out[:, j, i] += moment
            return out

        return Evaluation(chance + rise * s, gradient, hessian)

    return Model("raw", evaluate, matrix, offset, (True, False, True))


def starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    """120 starts: ceilings, places of half the rise and widths."""
    best, loss = float(np.exp(y.max())), x["loss"]
    places = [loss.min() - np.ptp(loss), *np.quantile(loss, (0.0, 0.33, 0.67, 1.0))]
    widths = np.array([0.03, 0.1, 0.3, 1.0, 3.0, 10.0]) * max(float(loss.std()), 1e-9)
    natural = [
        (np.log(ceiling), half, np.log(width))
        for ceiling, half, width in product(best * np.array([1.0, 1.2, 2.0, 4.0]), places, widths)
    ]
    return model.from_natural(np.array(natural))
