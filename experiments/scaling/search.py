"""Find the global optimum of a fit from many starts, and refit it cheaply.

A robust objective with a small delta is nearly a sum of absolute values: kinks everywhere,
so that ordinary quasi-Newton runs stop short. Two routes lead to the optimum here, and the
lower end wins:

* continuation: least squares first (every start), then Huber objectives whose quadratic
  zone shrinks by a constant factor to the one asked for;
* directly at the objective asked for, from wherever least squares ended.

Starts that meet at the same least-squares point are merged, since their paths are one from
there on. The best optimum is then challenged: the runs are reweighted at random, the fit
follows, and is brought back to the true weights. Least absolute deviation is finished by
sequential linear programming, which ends on the exact vertex.
"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.descent import (
    exact,
    follow,
    huber_oracle,
    lower,
    merge,
    polish,
    typical_residual,
    vertex,
    widths_to,
)
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.models import FAMILY, Inputs, Model
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.trust_region import minimise

RESTARTS = 128
"""Random reweightings in each round that challenges an optimum."""
SAME = 1e-6
"""Two objective values closer than this (relative) count as the same optimum."""
SUBSET = 64
"""Runs that the coarse stage uses where there are more."""
PROSPECT = 5.0
"""A start goes on if its sum of squares is within this factor of the least one."""
HALF_SETTLED = 128
"""Points of the coarse stage that also descend directly."""
VERTICES = 32
"""Ends that linear programming carries to their vertex, for least absolute deviation."""
DYING = 0.05
"""A term that is nowhere a greater share of the loss than this may be better at nothing."""


@dataclass(frozen=True)
class Search:
    """The result of a many-start search, in the model's standardised coordinates.

    Attributes:
        point: the optimum [P].
        objective: its exact objective, a sum over runs.
        slope: greatest absolute gradient entry there (for `lad`, the decrease that a linear
            programme still finds).
        starts: starting points tried; `starts_at_best` of them ended within a millionth of
            `objective`; `distinct` different end points had a greater one.
        restarts: random reweightings tried from the optimum.
        optima: the optimum and up to three other local optima, best first, and for a term that
            vanished at the optimum the best point where it is alive [K, P].
        ends: end points of all starts after merging [U, P], and their objectives [U].
    """

    point: np.ndarray
    objective: float
    slope: float
    starts: int
    starts_at_best: int
    distinct: int
    restarts: int
    optima: np.ndarray
    ends: np.ndarray
    ends_objectives: np.ndarray


def search(
    law: Law,
    inputs: Inputs,
    log_loss: np.ndarray,
    objective: Objective,
    *,
    restarts: int = RESTARTS,
    seed: int = 0,
    known: np.ndarray | None = None,
) -> Search:
    """Minimise the objective over a law's parameters from every start of its grid.

    Args:
        law: the functional form; its `starts` are the grid (4,500 for `chinchilla`).
        inputs: the law's inputs, each [n], in raw counts.
        log_loss: natural log of the loss [n].
        objective: what to minimise.
        restarts: random reweightings per round of challenges; 0 for none.
        seed: of the reweightings and of the coarse stage's subset.
        known: further points to descend from, where something is known of the optimum [K, P].
    """
    model = law.build(inputs)
    rng = np.random.default_rng(seed)
    squared = Objective("log-lsq" if model.space == "log" else "lsq")

    # 1. Every start, least squares, on a subset where there are many runs.
    points, cell = _coarse(law, model, inputs, log_loss, rng)
    squares = exact(model, squared, log_loss, points)
    tiny = 1e-15 * len(log_loss)
    near = squares <= PROSPECT * squares.min() + tiny
    # The hopeless are starts on plateaus where a term has died; one of each kind goes on.
    hopeless = np.flatnonzero(~near)
    kinds = np.unique(np.round(np.log(squares[hopeless] + tiny), 1), return_index=True)[1]
    kept = np.r_[np.flatnonzero(near), hopeless[kinds]]

    # 2. Least squares to its end on all runs; merge again.
    oracle = huber_oracle(model, model.space, log_loss, np.inf, 1.0)
    settled, group = merge(
        minimise(oracle, points[kept], runs=len(log_loss), iterations=60, tolerance=1e-9).points,
        1e-3,
    )
    scale = typical_residual(
        model, objective, log_loss, settled[np.argmin(exact(model, squared, log_loss, settled))]
    )

    # 3. The objective itself, by continuation and directly; also from half-settled points,
    # which are more diverse.
    half = kept[np.argsort(squares[kept], kind="stable")][:HALF_SETTLED]
    known = np.empty((0, settled.shape[1])) if known is None else known
    pool = np.concatenate([settled, points[half], known])
    ends, values = pool, exact(model, objective, log_loss, pool)
    routes = [widths_to(objective, scale)]
    if routes[0] and objective.kind != "lad":
        routes.append([])
    for widths in routes:
        reached = follow(model, objective, log_loss, pool, widths, scale=scale)
        ends, values = lower(ends, values, reached.points,
                              exact(model, objective, log_loss, reached.points))  # fmt: skip
    near_end = np.flatnonzero(values < 1.2 * values.min() + tiny)
    more = follow(model, objective, log_loss, ends[near_end], [], iterations=200, scale=scale)
    ends[near_end], values[near_end] = lower(
        ends[near_end], values[near_end], more.points,
        exact(model, objective, log_loss, more.points),
    )  # fmt: skip

    if objective.kind == "lad":
        _to_vertices(model, log_loss, ends, values)

    # 4. Challenge the best by reweighting, then finish it, also without the terms that are dying.
    best, best_value, tried = _challenge(
        model, objective, log_loss, ends[np.argmin(values)], scale, restarts, rng
    )
    candidates = np.concatenate([best[None], ends[np.argsort(values, kind="stable")[:4]]])
    finished = [polish(model, objective, log_loss, c, scale) for c in candidates]
    best, best_value, slope = min(finished, key=lambda f: f[1])
    for term in model.terms:
        buried = _without(model, best, term)
        if buried is not None:
            end = polish(model, objective, log_loss, buried, scale)
            if end[1] < best_value:
                best, best_value, slope = end

    same = 1e-5 if objective.kind == "lad" else SAME
    at_best = values <= best_value * (1 + same) + 1e-18 * len(log_loss)
    reached_best = np.zeros(len(points), bool)
    reached_best[kept] = at_best[: len(settled)][group]
    reached_best[half] |= at_best[len(settled) :][: len(half)]
    alive = _with_dead_terms_alive(model, objective, log_loss, best, scale)
    optima = np.concatenate([_distinct(best, best_value, ends, values), alive])
    others = np.round(np.log(np.maximum(values[~at_best], 1e-300)), 4)
    return Search(
        point=best,
        objective=best_value,
        slope=slope,
        starts=len(cell),
        starts_at_best=int(reached_best[cell].sum()),
        distinct=len(np.unique(others)),
        restarts=tried,
        optima=optima,
        ends=ends,
        ends_objectives=values,
    )


def _coarse(
    law: Law, model: Model, inputs: Inputs, log_loss: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Least squares from every start, roughly; merged points, and the cell of each start."""
    n = len(log_loss)
    rows = np.arange(n)
    if n > SUBSET:
        rows = np.sort(_subset(inputs.get(FAMILY, np.zeros(n)), rng))
    few = law.build({name: column[rows] for name, column in inputs.items()})
    starts = few.from_natural(model.to_natural(law.starts(model, inputs, log_loss)))
    oracle = huber_oracle(few, few.space, log_loss[rows], np.inf, 1.0)
    ends = minimise(oracle, starts, runs=len(rows), iterations=40, tolerance=1e-5).points
    return merge(model.from_natural(few.to_natural(ends)), 0.02)


def _subset(family: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`SUBSET` of the rows in all, as many of each family as it has or its share."""
    names = np.unique(family)
    each = [np.flatnonzero(family == name) for name in names]
    most = SUBSET // len(names)
    return np.concatenate([rng.choice(rows, min(most, len(rows)), replace=False) for rows in each])


def _challenge(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    best: np.ndarray,
    scale: float,
    restarts: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, float, int]:
    """Try to beat an optimum by refitting randomly reweighted runs and coming back."""
    value = float(exact(model, objective, log_loss, best[None])[0])
    n, tried = len(log_loss), 0
    for _ in range(4 if restarts else 0):
        tried += restarts
        weights = rng.multinomial(n, np.full(n, 1 / n), size=restarts).astype(float)
        widths = widths_to(objective, scale)[:3]
        moved = follow(model, objective, log_loss, np.tile(best, (restarts, 1)), widths,
                        weights, iterations=15, tolerance=1e-6, scale=scale).points  # fmt: skip
        moved = moved[np.isfinite(moved).all(1)]
        back = follow(model, objective, log_loss, moved, widths_to(objective, scale)[-2:],
                       scale=scale).points  # fmt: skip
        if objective.kind != "lad":
            direct = follow(model, objective, log_loss, moved, [], scale=scale).points
            back = np.concatenate([back, direct])
        values = exact(model, objective, log_loss, back)
        gain = value - values.min()
        if gain > 0:
            best, value = back[np.argmin(values)], float(values.min())
        if gain <= 1e-10 * abs(value):
            break
    return best, value, tried


def _distinct(
    best: np.ndarray, best_value: float, ends: np.ndarray, values: np.ndarray, keep: int = 3
) -> np.ndarray:
    """The best point and up to `keep` others, apart from one another, within 10% of it."""
    points = [best]
    for row in np.argsort(values, kind="stable"):
        if len(points) > keep or values[row] > 1.1 * best_value + 1e-15:
            break
        if min(np.abs(ends[row] - p).max() for p in points) > 0.05:
            points.append(ends[row])
    return np.array(points)


def _to_vertices(model: Model, log_loss: np.ndarray, ends: np.ndarray, values: np.ndarray) -> None:
    """Carry the best ends of least absolute deviation to their vertices, in place.

    Descent stops short of the kinks by up to a percent, so that ends of one vertex differ.
    """
    near = np.flatnonzero(values < 1.02 * values.min() + 1e-15 * len(log_loss))
    near = near[np.argsort(values[near], kind="stable")]
    some, cell = merge(ends[near], 1e-3)
    first = np.array([np.flatnonzero(cell == c)[0] for c in range(len(some))])
    for c in np.argsort(first)[:VERTICES]:
        start = near[first[c]]
        point, value, _ = vertex(model, log_loss, ends[start], float(values[start]))
        rows = near[cell == c]
        ends[rows], values[rows] = point, value


def shares(model: Model, point: np.ndarray) -> list[tuple[int, float]]:
    """(coordinate, greatest share of the loss of any run) of each term, where there are several."""
    gradient = model.evaluate(point[None]).gradient[0]
    return [(j, float(gradient[j].max())) for j in model.terms if len(model.terms) > 1]


def _without(model: Model, point: np.ndarray, term: int) -> np.ndarray | None:
    """The point with one term set to nothing; None where the term is no small one.

    Where the least objective lies at 0, descent in its logarithm comes near and never arrives.
    """
    share = dict(shares(model, point)).get(term, 1.0)
    if share >= DYING:
        return None
    gone = point.copy()
    gone[term] -= 60.0 + np.log(max(share, 1e-300))
    return gone


def _with_dead_terms_alive(
    model: Model, objective: Objective, log_loss: np.ndarray, best: np.ndarray, scale: float
) -> np.ndarray:
    """For each term below 0.1% of every loss: the best fit in which it is about half of one [K, P].

    A refit to other weights could not bring the term back from nothing, where it has no slope.
    """
    size = len(best)
    out = []
    for j, share in shares(model, best):
        if share >= 1e-3:
            continue
        start = best.copy()
        start[j] = np.log(0.5) + log_loss.min()
        others = np.delete(np.eye(size), j, axis=1)[None]
        out.append(follow(model, objective, log_loss, start[None], widths_to(objective, scale),
                          directions=others, tolerance=1e-9, scale=scale).points[0])  # fmt: skip
    return np.array(out).reshape(-1, size)
