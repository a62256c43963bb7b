"""Fit one law to several families that share some of its parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling.descent import exact, typical_residual
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import Fit, Interval
from mmfree_jax.experiments.scaling.frame import RunFrame, inputs, join, refuse_constant, resolve
from mmfree_jax.experiments.scaling.grouped import grouped
from mmfree_jax.experiments.scaling.identifiability import after_fit, before_fit
from mmfree_jax.experiments.scaling.joint_law import (
    JointModel,
    Sharing,
    bind,
    joint_law,
    mixed,
    rows_of,
    share,
)
from mmfree_jax.experiments.scaling.laws import Law, get_law
from mmfree_jax.experiments.scaling.models import FAMILY
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.profile import Profile, profile_intervals
from mmfree_jax.experiments.scaling.search import RESTARTS, Search, search
from mmfree_jax.experiments.scaling.sharing_test import SharingTest, sharing_test
from mmfree_jax.experiments.scaling.uncertainty import (
    Bootstrap,
    bootstrap,
    bootstrap_intervals,
    clusters_of,
)

TEST_RESAMPLES = 1000
"""Most data sets drawn under sharing: a p-value to a thousandth."""
TOPS = 8
"""Ends of each family's own search that are combined into points of the joint one, at most:
so many combinations in all of two families as `TOPS` squared, and no more of several."""


@dataclass(frozen=True)
class JointFit:
    """A law fitted to several families at once.

    Attributes:
        sharing: the law, the families and what they share.
        objective: summed over all runs of all families.
        search: the search over all parameters, in the order of `sharing.names`.
        parameters: name -> value, by the names of `sharing.names`.
        fits: family -> its law under sharing, as if fitted alone; objectives are its part of
            the sum, and rows of the bootstrap draws belong together across families.
        alone: family -> the parameters that it has by itself.
        bootstrap, intervals, profiles: as of a `Fit`.
        test: whether the runs speak against the sharing; None where nothing was drawn.
        warnings: what a reader must know, each once.
    """

    sharing: Sharing
    objective: Objective
    search: Search
    parameters: dict[str, float]
    fits: dict[str, Fit]
    alone: dict[str, dict[str, float]]
    bootstrap: Bootstrap | None
    intervals: dict[str, Interval]
    profiles: dict[str, Profile]
    test: SharingTest | None
    level: float
    seed: int
    warnings: list[str]


def by_family(frames: Sequence[tuple[str, RunFrame]]) -> dict[str, RunFrame]:
    """Tell runs apart by their family column; a source without one is a family by its name.

    Raises:
        ScalingError: rows without a family in a source that names some, or two sources without
            any that have one name.
    """
    out: dict[str, list[RunFrame]] = {}
    by_source: set[str] = set()
    for source, frame in frames:
        named = frame.family != ""
        if named.any() and not named.all():
            row = int(np.argmin(named))
            raise ScalingError(f"column: 'family' is empty in {int((~named).sum())} of {len(frame)}"
                               f" runs, the first {frame.provenance[row]}; name it or leave them "
                               "out with --where")  # fmt: skip
        if not named.any():
            if source in by_source:
                raise ScalingError(f"runs: two files without a family column are called "
                                   f"{source!r}; rename one, or give them the column")  # fmt: skip
            by_source.add(source)
            frame = replace(frame, family=np.full(len(frame), source))
        for name in np.unique(frame.family):
            out.setdefault(str(name), []).append(frame.take(frame.family == name))
    return {name: join(parts) for name, parts in out.items()}


def fit_joint(
    families: Mapping[str, RunFrame],
    law: str | Law = "chinchilla",
    objective: Objective | None = None,
    *,
    shared: Sequence[str] = ("E",),
    size: str = "auto",
    flops: str = "auto",
    resamples: int = 4000,
    resample: str = "runs",
    level: float = 0.95,
    profile: bool = True,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> JointFit:
    """Fit one law to two or more families, with some parameters in common, and test that.

    Args:
        families: name -> runs.
        law, objective, size, flops, level, profile, restarts, seed: as of `fit_law`.
        shared: names of the law's parameters that are one for all families.
        resamples: bootstrap refits, drawn within each family; the test draws as many data
            sets under sharing, `TEST_RESAMPLES` at most. 0 for neither.
        resample: `runs`, or `noise` by every loss's standard error, for both.

    Raises:
        ScalingError: fewer than two families, a name that is no parameter, a column that the
            law needs is missing, a law that reads further columns, or a family has fewer runs
            than the law parameters.
    """
    form = law if isinstance(law, Law) else get_law(law)
    if form.also:
        raise ScalingError(f"joint: the law {form.name} reads the column {form.also[0]!r} besides "
                           "and is fitted to one family at a time; leave out --joint")  # fmt: skip
    sharing = share(form, list(families), shared)
    objective = objective or Objective(form.objective)
    for name, frame in families.items():
        if len(frame) < len(form.parameters):
            raise ScalingError(
                f"runs: {len(frame)} runs of family {name!r} cannot determine the "
                f"{len(form.parameters)} parameters of {form.name} ({form.formula}); add runs, or "
                "name a law with fewer by --law"
            )
    size, flops = resolve(list(families.values()), size, flops)
    named = {n: replace(f, family=np.full(len(f), n)) for n, f in families.items()}
    frame = join(list(named.values()))
    of_family = np.repeat(np.arange(len(families)), [len(f) for f in families.values()])
    x = inputs(frame, form.inputs, size=size, flops=flops) | {FAMILY: of_family}
    log_loss = np.log(frame.loss)
    whole_law, joint = joint_law(sharing), bind(sharing, x)
    for family, rows in zip(sharing.families, joint.rows, strict=True):
        refuse_constant("loss", log_loss[rows], f"runs of {family}")
    alone = [
        search(form, rows_of(x, k), log_loss[rows], objective, restarts=restarts, seed=seed)
        for k, rows in enumerate(joint.rows)
    ]
    found = search(whole_law, x, log_loss, objective, restarts=restarts, seed=seed,
                   known=_combined(sharing, joint, alone))  # fmt: skip
    scale = typical_residual(joint.whole, objective, log_loss, found.point)
    values = joint.whole.to_parameters(found.point)

    warnings = []
    draws, test, intervals, profiles = None, None, {}, {}
    exact_fit = len(frame) <= len(sharing.names) or scale <= 1e-10
    if resamples > 0:
        draws = bootstrap(frame, joint.whole, objective, log_loss, found, scale, count=resamples,
                          kind=resample, seed=seed, strata=of_family,
                          need=len(form.parameters))  # fmt: skip
        warnings += draws.warnings
        if len(draws.parameters) >= 20:
            intervals = bootstrap_intervals(sharing.names, joint.whole, found, draws, level)
        else:
            warnings.append("no intervals: fewer than 20 bootstrap refits succeeded")
        if exact_fit:
            warnings.append("no test of the sharing: the joint law passes through every run")
        else:
            test = sharing_test(
                joint, objective, log_loss, found, alone, scale, clusters_of(frame),
                count=min(resamples, TEST_RESAMPLES),
                noise=frame.loss_sd if resample == "noise" else None, seed=seed,
            )  # fmt: skip
    else:
        warnings.append("no intervals and no test of the sharing, for want of a --bootstrap of "
                        "1000 or so")  # fmt: skip
    if profile and not exact_fit:
        spread = None if draws is None else draws.points
        profiles = profile_intervals(whole_law, joint.whole, objective, log_loss, found, scale,
                                     level, spread, clusters_of(frame))  # fmt: skip
    fits = {}
    for k, (name, own) in enumerate(named.items()):
        at = sharing.positions(k)
        names = [sharing.names[i] for i in at]
        fits[name] = _of_family(
            Fit(
                law=form, objective=objective, size=size, flops=flops, frame=own,
                inputs=rows_of(x, k), log_loss=log_loss[joint.rows[k]], model=joint.models[k],
                search=_projected(found, joint, k, objective, log_loss),
                parameters=dict(zip(form.parameters, map(float, values[at]), strict=True)),
                bootstrap=draws and _bootstrap_of(draws, joint, k, at, own), level=level,
                intervals={p: intervals[n] for p, n in zip(form.parameters, names, strict=True)
                           if n in intervals},
                profiles={p: profiles[n] for p, n in zip(form.parameters, names, strict=True)
                          if n in profiles},
                holdout=[], seed=seed,
            )
        )  # fmt: skip
    return JointFit(
        sharing=sharing, objective=objective, search=found,
        parameters=dict(zip(sharing.names, map(float, values), strict=True)), fits=fits,
        alone={
            name: dict(zip(form.parameters, map(float, joint.models[k].to_parameters(a.point)),
                           strict=True))
            for k, (name, a) in enumerate(zip(families, alone, strict=True))
        },
        bootstrap=draws, intervals=intervals, profiles=profiles, test=test, level=level, seed=seed,
        warnings=grouped(
            [*(("", w) for w in warnings), *((name, w) for name, f in fits.items()
                                             for w in f.warnings)],
            [list(fits)],
        ),
    )  # fmt: skip


def _combined(sharing: Sharing, joint: JointModel, alone: Sequence[Search]) -> np.ndarray:
    """Points of the joint search from the best ends of each family's own [K, Q].

    Every combination of ends, with the shared parameters of one family after another and with
    their mean.
    """
    few = max(int(TOPS ** (2 / len(alone))), 1)
    tops = [
        m.to_natural(np.concatenate([a.optima, a.ends[np.argsort(a.ends_objectives)]])[:few])
        for m, a in zip(joint.models, alone, strict=True)
    ]
    chosen = np.array(list(product(*(range(len(t)) for t in tops))))
    natural = [t[chosen[:, k]] for k, t in enumerate(tops)]
    leads = (None, *range(len(alone)))
    return joint.whole.from_natural(
        np.concatenate([mixed(sharing, natural, lead) for lead in leads])
    )


def _projected(
    found: Search, joint: JointModel, family: int, objective: Objective, log_loss: np.ndarray
) -> Search:
    """A joint search as one family sees it; objectives are the family's part of the sum.

    Of the ends, those stay that are as good as the optimum for all families together.
    """
    project, model = joint.projections[family], joint.models[family]
    target = log_loss[joint.rows[family]]
    near = found.ends_objectives <= found.objective * 1.001 + 1e-15
    points, optima = project(found.ends[near]), project(found.optima)
    own = float(exact(model, objective, target, project(found.point)[None])[0])
    return replace(
        found, point=project(found.point), objective=own, optima=optima,
        ends=points, ends_objectives=np.full(len(points), own),
    )  # fmt: skip


def _bootstrap_of(
    draws: Bootstrap, joint: JointModel, family: int, at: np.ndarray, frame: RunFrame
) -> Bootstrap:
    """The joint refits as one family sees them, in the order of all families."""
    return replace(
        draws, points=joint.projections[family](draws.points), parameters=draws.parameters[:, at],
        clusters=int(clusters_of(frame).max()) + 1, warnings=[],
    )  # fmt: skip


def _of_family(fit: Fit) -> Fit:
    """A family's fit with what must be known of it."""
    said = [*fit.frame.notes, *before_fit(fit.law, fit.inputs)]
    said += after_fit(fit.law, fit.model, fit.objective, fit.inputs, fit.log_loss, fit.search,
                      fit.parameters, fit.intervals)  # fmt: skip
    return replace(fit, warnings=list(dict.fromkeys(said)))
