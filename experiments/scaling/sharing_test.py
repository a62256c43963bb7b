"""Are parameters that a joint fit shares the same in truth? A likelihood ratio, calibrated.

The objective is read as a likelihood whose noise has one scale, profiled out; the statistic is
twice the log of the ratio between each family fitted by itself and all under sharing. Robust
objectives and few runs are far from its chi-squared limit, so that its distribution is found
by drawing data in which sharing holds: the joint fit's losses, plus its residuals drawn anew
within each family (those of one run's rows together).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.descent import exact, follow, lower, refit
from mmfree_jax.experiments.scaling.joint_law import JointModel
from mmfree_jax.experiments.scaling.objectives import Objective, log_likelihood
from mmfree_jax.experiments.scaling.search import Search


@dataclass(frozen=True)
class SharingTest:
    """A likelihood-ratio test of what is shared.

    Attributes:
        statistic: 2 log of the likelihood ratio, at least 0.
        freed: parameters more that the separate fits have.
        p_value: share of data drawn under sharing whose statistic is as great, counting the
            data themselves.
        draws: statistics under sharing [R].
        separate: objective of the separate fits, all families together.
    """

    statistic: float
    freed: int
    p_value: float
    draws: np.ndarray
    separate: float


def sharing_test(
    joint: JointModel,
    objective: Objective,
    log_loss: np.ndarray,
    found: Search,
    alone: Sequence[Search],
    scale: float,
    clusters: np.ndarray,
    *,
    count: int,
    noise: np.ndarray | None = None,
    seed: int = 0,
) -> SharingTest:
    """Test a joint fit against the same law fitted to each family alone.

    Args:
        joint, log_loss: the law bound to all runs [n], in order of family.
        found, alone: the searches under sharing and of each family.
        scale: typical residual of the joint fit.
        clusters: which rows are one run's [n].
        count: data sets drawn under sharing.
        noise: standard errors of the losses [n]; the drawn data then have normal noise of
            these instead of residuals.
        seed: of what is drawn.
    """
    n, rng = len(log_loss), np.random.default_rng(seed)
    total = sum(a.objective for a in alone)
    raw = objective.space == "raw"
    value = joint.whole.evaluate(found.point[None]).value[0]
    loss = np.exp(value) if joint.whole.space == "log" else value
    if noise is not None:
        drawn = loss + noise * rng.standard_normal((count, n))
    elif raw:
        drawn = loss + (np.exp(log_loss) - loss)[donors(joint, clusters, count, rng)]
    else:
        drawn = loss * np.exp((log_loss - np.log(loss))[donors(joint, clusters, count, rng)])
    targets = np.log(np.maximum(drawn, 1e-3 * loss))
    weights = np.ones((count, n))
    shared, under = refit(joint.whole, objective, targets, weights, found.optima, scale=scale)
    free = np.zeros(count)
    for rows, model, project, own in zip(
        joint.rows, joint.models, joint.projections, alone, strict=True
    ):
        seeds = np.concatenate([project(found.point)[None], own.optima])
        goal, ones = targets[:, rows], weights[:, rows]
        points, values = refit(model, objective, goal, ones, seeds, scale=scale)
        # From where sharing ended as well: what has more freedom must never fit worse.
        end = follow(model, objective, goal, project(shared), [], iterations=40, tolerance=1e-10,
                     scale=scale).points  # fmt: skip
        free += lower(points, values, end, exact(model, objective, goal, end))[1]

    def ratio(restricted: np.ndarray, freed: np.ndarray) -> np.ndarray:
        gain = log_likelihood(objective, freed, n) - log_likelihood(objective, restricted, n)
        return np.maximum(2 * gain, 0.0)

    draws = ratio(under, free)
    draws = draws[np.isfinite(draws)]
    statistic = float(ratio(np.array([found.objective]), np.array([total]))[0])
    return SharingTest(
        statistic=statistic,
        freed=sum(len(a.point) for a in alone) - len(found.point),
        p_value=(1 + int((draws >= statistic).sum())) / (1 + len(draws)),
        draws=draws,
        separate=float(total),
    )


def donors(
    joint: JointModel, clusters: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Whose residual each row gets in each data set, [count, n]: a run's from another run.

    A run of m rows gets those of a run of its family in their order, stretched to m.
    """
    out = np.empty((count, len(clusters)), int)
    for rows in joint.rows:
        within = np.arange(rows.start, rows.stop)
        runs = [within[clusters[rows] == c] for c in np.unique(clusters[rows])]
        chosen = rng.integers(len(runs), size=(count, len(runs)))
        for j, run in enumerate(runs):
            table = np.array([r[np.arange(len(run)) * len(r) // len(run)] for r in runs])
            out[:, run] = table[chosen[:, j]]
    return out
