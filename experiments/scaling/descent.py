"""Local descent from given points: the building blocks of the search and of every refit.

Points are rows of standardised coordinates [S, P]; all of them descend together.
"""

import numpy as np

from mmfree_jax.experiments.scaling.models import Model
from mmfree_jax.experiments.scaling.objectives import Objective, losses, multiplier, target_width
from mmfree_jax.experiments.scaling.trust_region import Minima, Oracle, chunk_size, minimise


def residuals(model: Model, space: str, target: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Fit minus target, [S, n], in log or raw loss; NaN where a line has no logarithm."""
    value = model.evaluate(points).value
    with np.errstate(all="ignore"):
        if model.space == "log" and space == "raw":
            value = np.exp(value)
        elif model.space == "raw" and space == "log":
            value = np.log(value)
    return value - target


def response(
    model: Model, space: str, log_loss: np.ndarray, point: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals [n] in log or raw loss at one point [P], and their gradient in it [n, P]."""
    at = model.evaluate(point[None])
    value, gradient = at.value[0], at.gradient[0].T
    if model.space == "log" and space == "raw":
        value = np.exp(value)
        gradient = gradient * value[:, None]
    elif model.space == "raw" and space == "log":
        gradient = gradient / value[:, None]
        value = np.log(value)
    return value - (log_loss if space == "log" else np.exp(log_loss)), gradient


def exact(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    points: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """The objective itself at points [S, P] -> [S], with weights [S, n] where given.

    `log_loss` is [n], or [S, n] where each point has losses of its own.
    """
    target = log_loss if objective.space == "log" else np.exp(log_loss)
    out = np.empty(len(points))
    chunk = chunk_size(log_loss.shape[-1])
    for first in range(0, len(points), chunk):
        rows = slice(first, first + chunk)
        goal = target if target.ndim == 1 else target[rows]
        loss = losses(objective, residuals(model, objective.space, goal, points[rows]))
        if weights is None:
            out[rows] = loss.sum(1)
        else:
            # A run that a resample left out costs nothing, even where its loss overflows.
            out[rows] = np.where(weights[rows] > 0, weights[rows] * loss, 0.0).sum(1)
    return out


def huber_oracle(
    model: Model,
    space: str,
    log_loss: np.ndarray,
    width: float,
    factor: float,
    weights: np.ndarray | None = None,
) -> Oracle:
    """Value, gradient and exact Hessian of factor * sum Huber_width(residual)."""
    target = log_loss if space == "log" else np.exp(log_loss)

    def oracle(points: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            at = model.evaluate(points)
            value, natural = at.value, at.value
            if model.space == "log" and space == "raw":
                value = np.exp(natural)
            elif model.space == "raw" and space == "log":
                value = np.log(natural)
            residual = value - (target if target.ndim == 1 else target[rows])
            force = np.clip(residual, -width, width)
            outer = (force == residual).astype(float)
            residual -= 0.5 * force
            if weights is not None:
                w = weights[rows]
                outer *= w
                force_w = force * w
            else:
                force_w = force
            total = np.einsum("sn,sn->s", force_w, residual)
            # From the space of the residual to the space of the model's derivatives.
            if model.space == "log" and space == "raw":
                inner = force_w * value
                outer = outer * value * value
                force_w = inner
            elif model.space == "raw" and space == "log":
                inner = force_w / natural
                outer = outer / natural**2 - inner / natural
                force_w = inner
            else:
                inner = force_w
            # hessian's gradient product must carry the chain rule's own term as well.
            if model.space == "log" and space == "raw":
                outer = outer + inner
            gradient = (at.gradient @ force_w[:, :, None])[:, :, 0]
            hessian = at.hessian(outer, inner)
        return factor * total, factor * gradient, factor * hessian

    return oracle


def widths_to(objective: Objective, scale: float) -> list[float]:
    """Quadratic half-widths of the continuation, from three residuals down to the target."""
    final = target_width(objective, scale)
    ratio = 4.0 if objective.kind == "lad" else 3.0
    widths = []
    width = 3.0 * scale
    while width > 1.5 * final and np.isfinite(final):
        widths.append(width)
        width /= ratio
    return widths


def follow(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    points: np.ndarray,
    widths: list[float],
    weights: np.ndarray | None = None,
    directions: np.ndarray | None = None,
    iterations: int = 60,
    tolerance: float = 1e-15,
    scale: float = 1.0,
    final: float | None = None,
) -> Minima:
    """Descend through the `widths` in turn, then at the objective itself."""
    for width in widths:
        oracle = huber_oracle(model, objective.space, log_loss, width, 1.0, weights)
        points = minimise(
            oracle,
            points,
            runs=log_loss.shape[-1],
            iterations=10,
            tolerance=1e-5,
            radius=0.5,
            directions=directions,
        ).points
    final = target_width(objective, scale) if final is None else final
    oracle = huber_oracle(
        model, objective.space, log_loss, final, multiplier(objective, final), weights
    )
    return minimise(
        oracle,
        points,
        runs=log_loss.shape[-1],
        iterations=iterations,
        tolerance=tolerance,
        radius=0.3,
        directions=directions,
    )


def typical_residual(
    model: Model, objective: Objective, log_loss: np.ndarray, point: np.ndarray
) -> float:
    """Median absolute residual at a point, in the space of the objective; at least 1e-12."""
    target = log_loss if objective.space == "log" else np.exp(log_loss)
    size = np.abs(residuals(model, objective.space, target, point[None])[0])
    return max(float(np.median(size)), 1e-12)


def polish(
    model: Model, objective: Objective, log_loss: np.ndarray, point: np.ndarray, scale: float
) -> tuple[np.ndarray, float, float]:
    """Carry one point to the optimum at machine precision.

    Returns the point, its objective, and what is left: the greatest gradient entry, or for
    `lad` the decrease that the last linear programme promised.
    """
    value = float(exact(model, objective, log_loss, point[None])[0])
    if objective.kind == "lad":
        return vertex(model, log_loss, point, value)
    width = target_width(objective, scale)
    oracle = huber_oracle(model, objective.space, log_loss, width, multiplier(objective, width))
    end = minimise(
        oracle, point[None], runs=len(log_loss), iterations=200, tolerance=0.0, radius=0.05
    )
    end_value = float(exact(model, objective, log_loss, end.points)[0])
    if end_value <= value:
        point, value = end.points[0], end_value
    row = np.zeros(1, int)
    _, gradient, hessian = oracle(point[None], row)
    # Values stop resolving before gradients do: last Newton steps are judged by the gradient.
    for _ in range(8):
        if not np.isfinite(hessian).all():
            break
        trial = point - np.linalg.lstsq(hessian[0], gradient[0], rcond=1e-15)[0]
        _, trial_gradient, trial_hessian = oracle(trial[None], row)
        trial_value = float(exact(model, objective, log_loss, trial[None])[0])
        flatter = np.abs(trial_gradient).max() < np.abs(gradient).max()
        if not (flatter and trial_value <= value * (1 + 1e-14)):
            break
        point, value = trial, min(value, trial_value)
        gradient, hessian = trial_gradient, trial_hessian
    value = float(exact(model, objective, log_loss, point[None])[0])
    return point, value, float(np.abs(gradient).max())


def vertex(
    model: Model, log_loss: np.ndarray, point: np.ndarray, value: float
) -> tuple[np.ndarray, float, float]:
    """Sequential linear programming for sum |residual|: exact in the limit."""
    from scipy.optimize import linprog

    objective = Objective("lad")
    n, size = len(log_loss), len(point)
    radius, promise = 0.1, np.inf
    for _ in range(60):
        at = model.evaluate(point[None])
        gradient, residual = at.gradient[0], at.value[0]
        if model.space == "raw":
            gradient, residual = gradient / residual, np.log(residual)
        residual = residual - log_loss
        # min sum t, -t <= residual + gradient' s <= t, |s| <= radius
        a = np.block([[gradient.T, -np.eye(n)], [-gradient.T, -np.eye(n)]])
        answer = linprog(
            np.r_[np.zeros(size), np.ones(n)], A_ub=a, b_ub=np.r_[-residual, residual],
            bounds=[(-radius, radius)] * size + [(0, None)] * n, method="highs",
        )  # fmt: skip
        if answer.x is None:
            break
        promise = max(value - float(answer.fun), 0.0)
        trial = point + answer.x[:size]
        trial_value = float(exact(model, objective, log_loss, trial[None])[0])
        if trial_value < value:
            point, value = trial, trial_value
            radius *= 2.0 if value - trial_value > 0.75 * promise else 1.0
        else:
            radius *= 0.25
        if promise <= 1e-14 * max(value, 1e-300) or radius < 1e-13:
            break
    return point, value, promise


def refit(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    weights: np.ndarray,
    seeds: np.ndarray,
    *,
    scale: float,
    directions: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Refit under R sets of run weights [R, n], warm-started from known optima [K, P].

    `log_loss` is [n], or [R, n] where the losses differ too.

    Each refit takes the lowest of: a direct descent from every seed, and a continuation
    from least squares that begins at the first seed (`lad`: the continuation alone, which
    stops at 0.3% of the typical residual instead of the vertex). Returns points [R, P] and
    objectives [R].
    """
    count = len(weights)
    best = np.tile(seeds[0], (count, 1))
    values = exact(model, objective, log_loss, best, weights)
    continuation = widths_to(objective, scale)
    routes = [(seed, []) for seed in seeds] + [(seeds[0], continuation)] * bool(continuation)
    final = None
    if objective.kind == "lad":  # a kink a thousandth of a residual wide: no need for vertices
        final = 3e-3 * scale
        routes = [(seeds[0], [w for w in continuation if w > final])]
    for seed, widths in routes:
        end = follow(
            model, objective, log_loss, np.tile(seed, (count, 1)), widths, weights,
            directions, iterations=40, tolerance=1e-10, scale=scale, final=final,
        )  # fmt: skip
        best, values = lower(best, values, end.points,
                              exact(model, objective, log_loss, end.points, weights))  # fmt: skip
    return best, values


def lower(
    points: np.ndarray, values: np.ndarray, new_points: np.ndarray, new_values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The lower of two sets of end points, row by row."""
    lower = new_values < values
    return np.where(lower[:, None], new_points, points), np.where(lower, new_values, values)


def merge(points: np.ndarray, grain: float) -> tuple[np.ndarray, np.ndarray]:
    """One representative per cell of side `grain`, and the cell of each point."""
    cells = np.round(np.clip(points, -1e6, 1e6) / grain)
    _, first, cell = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    return points[first], cell.reshape(-1)
