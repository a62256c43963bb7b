"""Fit a law to runs and say how sure one can be of it."""

from dataclasses import dataclass, field

import numpy as np

from mmfree_jax.experiments.scaling.descent import typical_residual
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame, inputs, refuse_constant, resolve, targets
from mmfree_jax.experiments.scaling.identifiability import after_fit, before_fit
from mmfree_jax.experiments.scaling.laws import Law, get_law
from mmfree_jax.experiments.scaling.models import Inputs, Model
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.profile import Profile, profile_intervals
from mmfree_jax.experiments.scaling.search import RESTARTS, Search, search
from mmfree_jax.experiments.scaling.training_cost import SIX, TrainingCost, training_cost
from mmfree_jax.experiments.scaling.uncertainty import (
    Bootstrap,
    Holdout,
    Interval,
    bootstrap,
    bootstrap_intervals,
    clusters_of,
    leave_one_out,
)


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
        law, objective, size, flops: what was fitted, to what, by which conventions.
        frame, inputs, log_loss, model: the runs and the law bound to them.
        search: the many-start search and its optimum.
        parameters: name -> value.
        bootstrap: refitted parameters, or None.
        level: of all intervals, such as 0.95.
        intervals: name -> (low, high) from the bootstrap; empty without one.
        profiles: name -> interval by the profile of the objective; open ends are None.
        holdout: prediction of each size by the others (laws of the loss).
        warnings: what a reader must know before using a number.
    """

    law: Law
    objective: Objective
    size: str
    flops: str
    frame: RunFrame
    inputs: Inputs
    log_loss: np.ndarray
    model: Model
    search: Search
    parameters: dict[str, float]
    bootstrap: Bootstrap | None
    level: float
    intervals: dict[str, Interval]
    profiles: dict[str, Profile]
    holdout: list[Holdout]
    seed: int
    warnings: list[str] = field(default_factory=list)

    def vector(self) -> np.ndarray:
        """The parameters in the law's order [P]."""
        return np.array([self.parameters[name] for name in self.law.parameters])

    @property
    def cost(self) -> TrainingCost:
        """FLOPs a token of the runs, by the fit's conventions; 6 N D for a law without size."""
        if "params" not in self.law.inputs or self.flops.startswith("6nd"):
            return SIX
        return training_cost(self.frame, self.size, self.flops)

    def predict(self, at: Inputs) -> np.ndarray:
        """Loss (nats a token), or the law's other target, at inputs in raw counts, each [m]."""
        return self.law.loss(self.vector(), at)


def fit_law(
    frame: RunFrame,
    law: str | Law = "chinchilla",
    objective: Objective | None = None,
    *,
    size: str = "auto",
    flops: str = "auto",
    resamples: int = 4000,
    resample: str = "runs",
    level: float = 0.95,
    profile: bool = True,
    holdout: bool = True,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> Fit:
    """Fit one law to one family of runs.

    Args:
        frame: the runs.
        law: a name in `LAWS`, or a law.
        objective: what to minimise; by default Huber with delta 1e-3 on log loss, and least
            squares for the straight line and for accuracies.
        size: which parameters N counts; flops: how C is counted (`frame.resolve`, `compute`).
        resamples: bootstrap refits; 0 for none.
        resample: `runs` (with replacement, rows of one run together) or `noise` (every loss
            redrawn from its standard error `loss_sd`).
        level: of the intervals.
        profile, holdout: whether to compute those two as well.
        restarts: random challenges of the optimum.
        seed: of everything random.

    Raises:
        ScalingError: a column that the law needs is missing, or there are fewer runs than
            parameters.

    Example:
        >>> import numpy as np
        >>> from mmfree_jax.experiments.scaling import fit_law, make_frame
        >>> size, tokens = (x.ravel() for x in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e8, 3e8, 1e9]))
        >>> loss = 1.7 + 400 * size**-0.34 + 410 * tokens**-0.28
        >>> frame = make_frame(params=size, tokens=tokens, loss=loss)
        >>> fit = fit_law(frame, resamples=0, profile=False, holdout=False)
        >>> {name: round(value, 2) for name, value in fit.parameters.items()}
        {'E': 1.7, 'A': 400.0, 'B': 410.0, 'alpha': 0.34, 'beta': 0.28}
    """
    form = get_law(law) if isinstance(law, str) else law
    objective = objective or Objective(form.objective)
    size, flops = resolve([frame], size, flops)
    x = inputs(frame, (*form.inputs, *form.also), size=size, flops=flops)
    log_loss = np.log(targets(frame, form.target))
    if resample == "noise" and form.target != "loss":
        raise ScalingError(f"resample: noise redraws losses, and {form.name} is fitted to the "
                           f"column {form.target!r}; resample runs")  # fmt: skip
    warnings = [*frame.notes, *before_fit(form, x)]
    if len(frame) < len(form.parameters):
        raise ScalingError(
            f"runs: {len(frame)} runs cannot determine the {len(form.parameters)} parameters of "
            f"{form.name} ({form.formula}); add runs, or name a law with fewer by --law or --laws"
        )
    refuse_constant(form.target, log_loss)
    model = form.build(x)
    found = search(form, x, log_loss, objective, restarts=restarts, seed=seed)
    scale = typical_residual(model, objective, log_loss, found.point)
    values = model.to_parameters(found.point)
    parameters = dict(zip(form.parameters, map(float, values), strict=True))

    draws, intervals = None, {}
    if resamples > 0:
        draws = bootstrap(frame, model, objective, log_loss, found, scale, count=resamples,
                          kind=resample, seed=seed)  # fmt: skip
        warnings += draws.warnings
        if len(draws.parameters) >= 20:
            intervals = bootstrap_intervals(form.parameters, model, found, draws, level)
        else:
            warnings.append("no intervals: fewer than 20 bootstrap refits succeeded")
    else:
        warnings.append("no intervals, for want of a --bootstrap of 1000 or so; parameters alone "
                        "say nothing of their uncertainty")  # fmt: skip
    exact_fit = len(frame) <= len(form.parameters) or scale <= 1e-10
    profiles = {}
    if profile and not exact_fit:
        spread = None if draws is None else draws.points
        profiles = profile_intervals(form, model, objective, log_loss, found, scale, level, spread,
                                     clusters_of(frame))  # fmt: skip
    folds = []
    if holdout and not exact_fit and form.target == "loss":
        group = x["params"] if "params" in x else x["compute"]
        folds = leave_one_out(model, objective, log_loss, found, scale, group)
    warnings += after_fit(form, model, objective, x, log_loss, found, parameters, intervals)
    return Fit(
        law=form, objective=objective, size=size, flops=flops, frame=frame, inputs=x,
        log_loss=log_loss, model=model, search=found, parameters=parameters, bootstrap=draws,
        level=level, intervals=intervals, profiles=profiles, holdout=folds, seed=seed,
        warnings=list(dict.fromkeys(warnings)),
    )  # fmt: skip
