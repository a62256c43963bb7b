"""What fitted laws predict: loss, compute-optimal size and tokens, and what equals another family.

Intervals are quantiles over the bootstrap refits that a fit keeps, corrected for bias as the fit's
own are. Shapes: R refits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from mmfree_jax.experiments.scaling.compute_optimal import allocate, curve
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fitted_law import FittedLaw
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.uncertainty import Interval, bias_of

ENOUGH = 20
"""Refits below which there is no interval."""
NEW_RUNS = 20_000
"""Runs that are drawn for the interval of one new run."""


@dataclass(frozen=True)
class Estimate:
    """A number, with the quantiles of its refits.

    Attributes:
        value: of the fit itself; infinite where no amount is enough, NaN where there is none.
        interval: an end is None where it is infinite; None in all with too few refits.
        never: share of the refits in which it is infinite.
        undefined: share of the refits in which it is NaN; they are left out of the interval.
    """

    value: float
    interval: Interval | None
    never: float
    undefined: float


@dataclass(frozen=True)
class Place:
    """Where a loss is predicted, in raw counts.

    Attributes:
        params, tokens: N and D, or compute (FLOPs); what is not asked for is None.
        bits, unique_tokens: for the laws that read them besides.
    """

    params: float | None = None
    tokens: float | None = None
    compute: float | None = None
    bits: float | None = None
    unique_tokens: float | None = None

    def also(self, law: Law) -> dict[str, float]:
        """What a law reads besides size, tokens and compute.

        Raises:
            ScalingError: it is not given, or the law does not give a loss.
        """
        if law.target != "loss":
            raise ScalingError(f"law: {law.name} gives {law.target}, not a loss; predict from a "
                               "law of the loss")  # fmt: skip
        found = {}
        for name in law.also:
            found[name] = getattr(self, name)
            if found[name] is None:
                raise ScalingError(f"{name}: {law.name} ({law.formula}) needs it; give "
                                   f"--{name.replace('_', '-')}")  # fmt: skip
        return found


@dataclass(frozen=True)
class Optimum:
    """Size and tokens of least loss for a compute, by the FLOPs a token of the fitted runs."""

    params: Estimate
    tokens: Estimate
    tokens_per_param: Estimate


@dataclass(frozen=True)
class Prediction:
    """One family at a place.

    Attributes:
        fitted: the law.
        place: as asked.
        loss: mean loss of runs there (nats a token).
        new_run: interval of the loss of one new run, which scatters as the fitted runs do.
        optimum: at a compute, for laws of N and D; its loss is `loss`.
        beyond: decades by which the place (or the optimum) lies outside the fitted runs, below
            0 on the small side, by the names of `FittedLaw.ranges`; what lies inside is left out.
    """

    fitted: FittedLaw
    place: Place
    loss: Estimate
    new_run: Interval | None
    optimum: Optimum | None
    beyond: dict[str, float]


@dataclass(frozen=True)
class Equivalent:
    """How much of something a family needs to reach another family's loss.

    Attributes:
        family: which needs it.
        what: `tokens` at the same N, `params` at the same D, or `compute`, each optimal.
        base: what the other family has.
        needed: as much; infinite where no amount is enough.
    """

    family: str
    what: str
    base: float
    needed: Estimate

    @property
    def multiple(self) -> Estimate:
        """`needed` as a multiple of `base`."""
        n, ends = self.needed, self.needed.interval
        low, high = ends or (None, None)
        interval = ends and (low and low / self.base, high and high / self.base)
        return Estimate(n.value / self.base, interval, n.never, n.undefined)


def quantiles(value: float, refits: np.ndarray, level: float, corrects: bool) -> Interval | None:
    """Ends of refits [R] of a value, infinite ones included; None of fewer than `ENOUGH`.

    Equal-tailed percentiles, corrected for bias (`uncertainty.corrected_quantiles`) if so told.
    """
    if len(refits) < ENOUGH:
        return None
    method = "linear" if np.isfinite(refits).all() else "nearest"
    tails = ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    ends = np.quantile(refits, _shares(value, refits, tails, corrects), method=method)
    low, high = (float(e) if np.isfinite(e) else None for e in ends)
    return low, high


def _shares(value: float, refits: np.ndarray, z: np.ndarray, corrects: bool) -> np.ndarray:
    """The shares of refits [R] that stand for normal quantiles z of a value."""
    bias = bias_of(value, refits[:, None])[0] if corrects and not np.isnan(value) else 0.0
    return ndtr(2 * bias + z)


def estimate(value: float, refits: np.ndarray, level: float, corrects: bool) -> Estimate:
    """A number with the quantiles of its refits [R]."""
    known = refits[~np.isnan(refits)]
    count = max(len(refits), 1)
    return Estimate(float(value), quantiles(value, known, level, corrects),
                    float(np.isinf(known).sum() / count),
                    float(np.isnan(refits).sum() / count))  # fmt: skip


def predict(
    fitted: FittedLaw, place: Place, *, level: float | None = None, seed: int = 0
) -> Prediction:
    """The loss at a size and tokens, or at a compute with the best of both.

    Args:
        fitted: the law.
        place: `params` and `tokens`, or `compute`.
        level: of the intervals; by default the fit's own.
        seed: of the new runs.

    Raises:
        ScalingError: the place is not one of the two, the law knows compute alone, or it needs
            what is not given.
    """
    level = fitted.level if level is None else level
    also = place.also(fitted.law)
    if place.compute is None:
        if place.params is None or place.tokens is None:
            raise ScalingError("place: give --params and --tokens, or --flops")
        if "params" not in fitted.law.inputs:
            raise ScalingError(f"params: {fitted.law.name} ({fitted.law.formula}) knows compute "
                               "alone; give --flops")  # fmt: skip
    elif place.params is not None or place.tokens is not None:
        raise ScalingError("flops: stands for the best size and tokens; give it without --params "
                           "and --tokens")  # fmt: skip
    loss = _loss_at(place)
    value, refits = loss(fitted, fitted.parameters[None])[0], loss(fitted, fitted.resamples)
    optimum, corrects = None, not fitted.on_bound
    at: dict[str, float | None] = {"compute": place.compute}
    if place.params is not None and place.tokens is not None:
        at = {"params": place.params, "tokens": place.tokens}
    elif place.compute is not None and "params" in fitted.law.inputs:
        log_c = np.log10([place.compute])
        (n,), (d,) = (v[0] for v in allocate(fitted.law, fitted.parameters, log_c, fitted.cost))
        ns, ds = (v[:, 0] for v in allocate(fitted.law, fitted.resamples, log_c, fitted.cost))
        optimum = Optimum(*(estimate(v, refits_of, level, corrects) for v, refits_of in
                            ((n, ns), (d, ds), (d / n, ds / ns))))  # fmt: skip
        at = {"params": float(n), "tokens": float(d)}
    mean = estimate(value, refits, level, corrects)
    new_run = _new_run(fitted, float(value), refits, level, seed)
    return Prediction(fitted, place, mean, new_run, optimum, _beyond(fitted, {**at, **also}))


def spent(fitted: FittedLaw, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The compute of runs, elementwise, by the FLOPs a token of the fitted ones."""
    return tokens * np.exp(fitted.cost.log_per_token(np.log(params)))


def _loss_at(place: Place) -> Callable[[FittedLaw, np.ndarray], np.ndarray]:
    """The loss [R] at a place by a law's parameters [R, P]."""

    def loss(fitted: FittedLaw, parameters: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            if place.compute is not None:
                return curve(fitted.law, parameters, np.log10([place.compute]), fitted.cost)[:, 0]
            assert place.params is not None
            assert place.tokens is not None
            n, d = np.array([place.params]), np.array([place.tokens])
            x = {"params": n, "tokens": d, "compute": spent(fitted, n, d)}
            x |= {name: np.array([value]) for name, value in place.also(fitted.law).items()}
            return fitted.law.loss(parameters, x)[:, 0]

    return loss


def _new_run(
    fitted: FittedLaw, value: float, refits: np.ndarray, level: float, seed: int
) -> Interval | None:
    """Interval of one run's loss: a mean, drawn as its interval says, times a run's residual.

    Residuals are widened by sqrt(n / (n - P)) for the parameters that were fitted to them.
    """
    residuals = fitted.log_residuals[np.isfinite(fitted.log_residuals)]
    n, size = len(residuals), len(fitted.parameters)
    refits = refits[np.isfinite(refits)]
    if n <= size or len(refits) < ENOUGH:
        return None
    rng = np.random.default_rng(seed)
    scatter = np.sqrt(n / (n - size)) * rng.choice(residuals, NEW_RUNS)
    drawn = _shares(value, refits, rng.standard_normal(NEW_RUNS), not fitted.on_bound)
    return quantiles(value, np.quantile(refits, drawn) * np.exp(scatter), level, False)


def _beyond(fitted: FittedLaw, at: dict[str, float | None]) -> dict[str, float]:
    """Decades outside the ranges of the fitted runs."""
    n, d = at.get("params"), at.get("tokens")
    if n is not None and d is not None:
        at = at | {"6nd": 6 * n * d, "tokens_per_param": d / n}
    out = {}
    for name, value in at.items():
        if value is None or name not in fitted.ranges or not np.isfinite(value):
            continue
        low, high = fitted.ranges[name]
        decades = np.log10(value / high) if value > high else min(np.log10(value / low), 0)
        if abs(decades) > 1e-9:
            out[name] = float(decades)
    return out


def equal_loss(
    reference: FittedLaw,
    other: FittedLaw,
    place: Place,
    *,
    level: float | None = None,
    seed: int = 0,
) -> list[Equivalent]:
    """What another family needs to reach the loss that the reference has at a place.

    At a size and tokens: tokens at the same size, and parameters at the same tokens. At a
    compute: compute, each family with its best size and tokens. Refits of one joint fit are
    compared row by row, those of separate fits in a random order.

    Raises:
        ScalingError: as `predict`, or the two count N or C differently.
    """
    level = reference.level if level is None else level
    asked = ("flops",) if place.compute is not None and "params" not in reference.law.inputs else (
        "params",)  # fmt: skip
    for key in asked:
        if reference.conventions[key] != other.conventions[key]:
            raise ScalingError(
                f"equal-to: {reference.family} counts {key} as {reference.conventions[key]}, "
                f"{other.family} as {other.conventions[key]}; fit both with the same --size and "
                "--flops"
            )
    corrects = not (reference.on_bound or other.on_bound)
    rows = min(len(reference.resamples), len(other.resamples))
    mine, theirs = reference.resamples[:rows], other.resamples[:rows]
    if reference.source != other.source:
        theirs = theirs[np.random.default_rng(seed).permutation(rows)]
    loss = _loss_at(place)
    targets = loss(reference, np.concatenate([reference.parameters[None], mine]))
    parameters = np.concatenate([other.parameters[None], theirs])
    out = []
    for what, base in (("tokens", place.tokens), ("params", place.params),
                       ("compute", place.compute)):  # fmt: skip
        if base is not None:
            needed = _reach(_along(other, place, what), parameters, targets)
            amount = estimate(needed[0], needed[1:], level, corrects)
            out.append(Equivalent(other.family, what, base, amount))
    return out


def _along(
    fitted: FittedLaw, place: Place, what: str
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A family's loss [R] by parameters [R, P] and log10 of one amount [R], the rest as is."""

    def loss(parameters: np.ndarray, log10: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            if what == "compute":
                return curve(fitted.law, parameters, log10[:, None], fitted.cost)[:, 0]
            amounts = {"params": np.full_like(log10, place.params or np.nan),
                       "tokens": np.full_like(log10, place.tokens or np.nan)}  # fmt: skip
            amounts[what] = 10.0**log10
            x = {key: amount[:, None] for key, amount in amounts.items()}
            x["compute"] = spent(fitted, x["params"], x["tokens"])
            x |= {name: np.array([value]) for name, value in place.also(fitted.law).items()}
            return fitted.law.loss(parameters, x)[:, 0]

    return loss


def _reach(
    loss: Callable[[np.ndarray, np.ndarray], np.ndarray],
    parameters: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """The amount [R] at which a falling loss reaches its target [R], by bisection of its log.

    Infinite where 10^60 is not enough, 0 where 10^-20 is too much; NaN where the loss does not
    fall or either is unknown.
    """
    low, high = np.full(len(targets), -20.0), np.full(len(targets), 60.0)
    most, least = loss(parameters, low), loss(parameters, high)
    for _ in range(100):
        middle = (low + high) / 2
        above = loss(parameters, middle) > targets
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    found = np.where(least >= targets, np.inf, np.where(most <= targets, 0.0, 10**low))
    return np.where((most > least) & ~np.isnan(targets), found, np.nan)
