"""Choose between laws by what each says of budgets that it has not seen.

How well a law fits its runs says little of how far it can be trusted beyond them. Here the
largest budgets are held out, the law is fitted to the cheaper runs and asked for the best loss
of each budget held out; the errors weigh the laws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.crossing import CROSSING_LAWS, frontier
from mmfree_jax.experiments.scaling.descent import refit, typical_residual
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import Fit, fit_law
from mmfree_jax.experiments.scaling.frame import RunFrame, compute, inputs, resolve
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.uncertainty import groups_of

DECADES = (0, 1, 2)
"""How far beyond the runs the average over laws is reported."""


@dataclass(frozen=True)
class Fold:
    """One prediction: a law fitted to runs below a compute, at the runs of a greater budget.

    Attributes:
        below: the compute that the fitted runs stay under; `fitted` of them.
        at: the budget predicted (its least compute).
        error: mean of log L_predicted - log L over its runs.
    """

    below: float
    fitted: int
    at: float
    error: float


@dataclass(frozen=True)
class LawScore:
    """A law: its fit to all runs, its parameters by cheaper runs, and its errors held out.

    Attributes:
        fit: to all runs (for laws of C alone those on the compute frontier).
        shortest: parameters fitted to the runs below all budgets held out [P].
        folds: every prediction.
        rms, bias: root mean square and mean of their errors, in log loss.
        weight: share of the law in an average over laws.
    """

    fit: Fit
    shortest: np.ndarray
    folds: list[Fold]
    rms: float
    bias: float
    weight: float


@dataclass(frozen=True)
class Extrapolation:
    """Laws by their errors on budgets held out, best first; `skipped` ones with the reason.

    `held_out` are the budgets (their least computes), `scatter` the runs' own, in log loss.
    `targets` [m, 2] are the compute and loss of every run on the frontier.
    """

    scores: list[LawScore]
    skipped: dict[str, str]
    held_out: np.ndarray
    scatter: float
    targets: np.ndarray
    level: float
    seed: int

    def average(self, log10_c: np.ndarray) -> np.ndarray:
        """Loss (nats a token) averaged over laws by their weights, and its interval [3, m].

        At compute-optimal size, by the FLOPs a token of the runs. The interval is of all laws'
        bootstrap refits together, each law as often as its weight; NaN without refits.
        """
        fits, weights = [s.fit for s in self.scores], [s.weight for s in self.scores]
        centre = sum(w * curve(f.law, f.vector(), log10_c, f.cost)[0]
                     for w, f in zip(weights, fits, strict=True))  # fmt: skip
        lines, shares = [], []
        for w, f in zip(weights, fits, strict=True):
            if f.bootstrap is not None and len(f.bootstrap.parameters) >= 20:
                lines.append(curve(f.law, f.bootstrap.parameters, log10_c, f.cost))
                shares.append(np.full(len(lines[-1]), w / len(lines[-1])))
        ends = np.full((2, len(log10_c)), np.nan)
        if len(lines) == len(fits):
            tail = (1 - self.level) / 2
            draws, share = np.concatenate(lines), np.concatenate(shares)
            for j, column in enumerate(draws.T):
                good = np.isfinite(column)
                ends[:, j] = np.quantile(column[good], [tail, 1 - tail], weights=share[good],
                                         method="inverted_cdf")  # fmt: skip
        return np.stack([np.asarray(centre), *ends])


def extrapolate(
    frame: RunFrame,
    laws: Sequence[str] = CROSSING_LAWS,
    *,
    hold_out: int = 3,
    size: str = "auto",
    flops: str = "auto",
    resamples: int = 1000,
    resample: str = "runs",
    level: float = 0.95,
    seed: int = 0,
) -> Extrapolation:
    """Score laws by their predictions of the largest budgets of one family.

    The runs on the compute frontier are what is predicted; computes within 2% are one budget.
    With h = 1 to `hold_out` budgets held out (a third of all at most), each law is fitted to
    all cheaper runs and predicts every budget held out. A law's weight is in proportion to
    (rms^2 + scatter^2)^(-m/2) for m budgets: the greatest likelihood of its errors, an error
    less than the runs' own scatter being luck.

    Args:
        frame: the runs.
        laws: names in `LAWS`, of size, tokens or compute.
        hold_out: most budgets held out.
        size, flops, resamples, resample, level, seed: as of `fit_law`, for the fits to all runs.

    Raises:
        ScalingError: fewer than four budgets, or no law can be scored.
    """
    size, flops = resolve([frame], size, flops)
    c = compute(frame, flops)
    best = frontier(frame, c)
    budget = groups_of(c[best])
    count = int(budget.max()) + 1
    if count < 4:
        raise ScalingError(f"runs: {count} budgets on the compute frontier; holding some out needs "
                           "four or more (computes within 2% are one)")  # fmt: skip
    starts = np.array([c[best][budget == b].min() for b in range(count)])
    held = starts[-min(hold_out, count // 3) :]
    scores, skipped = [], {}
    for name in laws:
        law = get_law(name)
        if law.also:
            skipped[name] = f"reads the column {law.also[0]!r} besides compute, size and tokens"
            continue
        runs = frame.take(best) if law.inputs == ("compute",) else frame
        own = compute(runs, flops)
        few = int((own < 0.99 * held[0]).sum())
        if few <= len(law.parameters):
            skipped[name] = (f"{few} runs below the budgets held out; its {len(law.parameters)} "
                             "parameters need more")  # fmt: skip
            continue
        fit = fit_law(runs, name, size=size, flops=flops, resamples=resamples, resample=resample,
                      level=level, profile=False, holdout=False, seed=seed)  # fmt: skip
        scale = typical_residual(fit.model, fit.objective, fit.log_loss, fit.search.point)
        under = np.array([(own < 0.99 * h).astype(float) for h in held])
        points, _ = refit(fit.model, fit.objective, fit.log_loss, under, fit.search.optima,
                          scale=scale)  # fmt: skip
        parameters = fit.model.to_parameters(points)
        goal = frame.take(best)
        x = inputs(goal, law.inputs, size=size, flops=flops)
        folds = [
            Fold(float(h), int(under[i].sum()), float(starts[b]), float(np.mean(
                np.log(law.loss(parameters[i], x)[budget == b]) - np.log(goal.loss[budget == b]))))
            for i, h in enumerate(held)
            for b in range(count) if starts[b] >= h
        ]  # fmt: skip
        errors = np.array([f.error for f in folds])
        if not np.isfinite(errors).all():
            skipped[name] = "fitted to the cheaper runs it has no finite loss at the others"
            continue
        scores.append(LawScore(fit, parameters[0], folds, float(np.sqrt(np.mean(errors**2))),
                               float(errors.mean()), 0.0))  # fmt: skip
    if not scores:
        raise ScalingError("extrapolate: no law can be scored: "
                           + "; ".join(f"{n}: {why}" for n, why in skipped.items()))  # fmt: skip
    scatter = min(1.4826 * float(np.median(np.abs(s.fit.log_loss - np.log(s.fit.predict(
        s.fit.inputs))))) for s in scores)  # fmt: skip
    log_weight = np.array([-0.5 * len(held) * np.log(max(s.rms**2 + scatter**2, 1e-30))
                           for s in scores])  # fmt: skip
    weight = np.exp(log_weight - log_weight.max())
    weighted = [
        LawScore(s.fit, s.shortest, s.folds, s.rms, s.bias, float(w))
        for s, w in zip(scores, weight / weight.sum(), strict=True)
    ]
    weighted.sort(key=lambda s: -s.weight)
    targets = np.stack([c[best], frame.loss[best]], axis=1)
    return Extrapolation(weighted, skipped, held, scatter, targets, level, seed)
