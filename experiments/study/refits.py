"""The study's joint fit, and what becomes of it in every draw of noise and of what it misses.

Shapes: n runs, B draws, R refits, Q coordinates of the joint law.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.joint import JointFit, fit_joint
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.misfit import (
    LENGTHS,
    Beside,
    Misfit,
    Places,
    estimate_misfit,
)
from mmfree_jax.experiments.scaling.ratio_path import (
    gradient_of,
    log_losses_of,
    parameters_of,
    refit_jointly,
    residuals_of,
)
from mmfree_jax.experiments.study.runs import Runs, frame_of
from mmfree_jax.experiments.study.trunk_noise import TrunkNoise

_STEPS = 4
"""Of generalised least squares, from a fit that is near its end."""


@dataclass(frozen=True)
class Refits:
    """What a joint fit becomes in every draw.

    Attributes:
        draws: family -> parameters of refits [R, P].
        misfit: how far the law misses the losses; None: not asked.
        beside: what that adds to the law; None: nothing.
    """

    draws: dict[str, np.ndarray]
    misfit: Misfit | None = None
    beside: Beside | None = None


def fit_mean(
    families: dict[str, Runs], shared: Sequence[str], unique_tokens: float | None, worth: float,
    restarts: int, law: str | Law = "chinchilla",
) -> JointFit:  # fmt: skip
    """The joint fit to the mean losses of all draws."""
    frames = {
        name: frame_of(runs, runs.fitted, unique_tokens, worth) for name, runs in families.items()
    }
    return fit_joint(frames, law, shared=shared, size="non-embedding", flops="exact", resamples=0,
                     profile=False, restarts=restarts)  # fmt: skip


def refit_draws(
    fit: JointFit, families: dict[str, Runs], noise: TrunkNoise, seed: int,
    lengths: Sequence[float] = LENGTHS,
) -> Refits:  # fmt: skip
    """Refits of a joint fit to every draw, each with departures as large as the fit shows.

    Args:
        fit: of `fit_mean`, to these runs.
        families: name -> runs.
        noise: of training.
        seed: of the departures.
        lengths: over which departures stay alike, as of `estimate_misfit`; none: no departures.
    """
    parts = list(families.values())
    drawn = np.log(np.concatenate([runs.draws for runs in parts], axis=1))
    if not lengths:
        return Refits(refit_jointly(fit, drawn).parameters)
    params, tokens = (np.concatenate([runs.column(name) for runs in parts])
                      for name in ("params_non_embedding", "tokens"))  # fmt: skip
    number = np.repeat(np.arange(len(parts)), [len(runs.rows) for runs in parts])
    point, own = fit.search.point[None], log_losses_of(fit)[None]
    misfit = estimate_misfit(
        residuals_of(fit, point, own)[0], gradient_of(fit, point[0]), noise_of(parts, noise),
        Places.of(params, tokens, number), lengths,
    )  # fmt: skip
    departures = misfit.draw(len(drawn), list(families), np.random.default_rng([seed, 2]))
    for k, name in enumerate(families):
        rows = number == k
        drawn[:, rows] += departures[name].at(params[rows], tokens[rows])
    found, inverses = refit_jointly(fit, drawn), misfit.inverses()
    # Huber's loss lets go of runs that a law of the wrong form misses, such as the few of the
    # largest size; least squares by the covariance of noise and departures does not.
    for _ in range(_STEPS):
        step = inverses.least_squares(gradient_of(fit, point[0])).T
        point = point + residuals_of(fit, point, own) @ step
    points, drawn = found.points, drawn[found.rows]
    for _ in range(_STEPS):
        points = points + residuals_of(fit, points, drawn) @ step
    residuals = residuals_of(fit, points, drawn)
    good = np.isfinite(residuals).all(1)
    beside = Beside(
        tuple(families), {name: p[0] for name, p in parameters_of(fit, point).items()},
        inverses.telling(), residuals_of(fit, point, own), residuals[good],
        {name: of_family.of(found.rows[good]) for name, of_family in departures.items()},
    )  # fmt: skip
    return Refits(parameters_of(fit, points[good]), misfit, beside)


def noise_of(families: Sequence[Runs], noise: TrunkNoise) -> np.ndarray:
    """Covariance of log losses by documents, rates and training, a family behind the other [n, n].

    Of few draws a covariance is of low rank; that of training, which makes it definite, is known
    in closed form.
    """
    drawn = np.log(np.concatenate([runs.without_noise for runs in families], axis=1))
    rows = [row for runs in families for row in runs.rows]
    return np.cov(drawn, rowvar=False) + noise.covariance(rows)
