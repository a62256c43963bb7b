"""Results as JSON documents and as text in which no number stands alone."""

from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.compute_optimal import allocate, local_exponents
from mmfree_jax.experiments.scaling.crossing import Crossing
from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.fitted_law import prediction_block
from mmfree_jax.experiments.scaling.frame import compute, definitions
from mmfree_jax.experiments.scaling.grouped import grouped
from mmfree_jax.experiments.scaling.isoflop import Allocation
from mmfree_jax.experiments.scaling.law_crossing import LawCrossing
from mmfree_jax.experiments.scaling.training_cost import SIX
from mmfree_jax.experiments.scaling.uncertainty import corrected_quantiles, on_bound
from mmfree_jax.installed import versions

_PACKAGES = ("mmfree-jax", "numpy", "scipy")  # what computed a result


def fit_document(fit: Fit) -> dict[str, Any]:
    """The JSON document of a fit; its first six keys are the stable interface."""
    s = fit.search
    document: dict[str, Any] = {
        "law": fit.law.name,
        "parameters": fit.parameters,
        "objective": s.objective,
        "n": len(fit.frame),
        "intervals": {k: list(v) for k, v in fit.intervals.items()},
        "warnings": fit.warnings,
        "formula": fit.law.formula,
        "objective_function": fit.objective.formula,
        "interval_level": fit.level,
        "interval_method": "none" if not fit.intervals else
        "bias-corrected percentile bootstrap over "
        + (fit.bootstrap.kind if fit.bootstrap else "runs"),
        "standard_errors": {},
        "profile_intervals": {k: list(p.interval) for k, p in fit.profiles.items()},
        "leave_one_size_out": [
            {"from": h.low, "to": h.high, "runs": h.runs, "mean_log_error": h.error,
             "rms_log_error": h.rms, "extrapolated": h.extrapolated} for h in fit.holdout
        ],
        "conventions": {"params": fit.size, "flops": fit.flops},
        "definitions": definitions(fit.frame, fit.size, fit.flops),
        "optimisation": {
            "starts": s.starts,
            "starts_at_optimum": s.starts_at_best,
            "same_within": 1e-5 if fit.objective.kind == "lad" else 1e-6,
            "other_local_optima": s.distinct,
            "restarts": s.restarts,
            "gradient": s.slope,
        },
        "seed": fit.seed,
        "versions": versions(*_PACKAGES),
    }  # fmt: skip
    if fit.bootstrap is not None:
        b = fit.bootstrap
        document["bootstrap"] = {"resamples": b.asked, "used": len(b.parameters),
                                 "resampled": b.kind, "independent_runs": b.clusters,
                                 "warm_started_from": len(s.optima)}  # fmt: skip
        if len(b.parameters) >= 20:
            error = b.parameters.std(axis=0, ddof=1)
            document["standard_errors"] = dict(zip(fit.law.parameters, error, strict=True))
    if fit.law.name == "chinchilla":
        document["compute_optimal"] = _optimal(fit)
    document["for_predictions"] = prediction_block(fit)
    return document


def _optimal(fit: Fit) -> dict[str, Any]:
    """Exponents a and b of N* ~ C^a, D* ~ C^b and tokens per parameter, with intervals.

    C is the fit's own, by the FLOPs a token of its runs; the exponents are those at the largest
    compute of any run.
    """
    cost, x = fit.cost, fit.inputs
    spent = 6 * x["params"] * x["tokens"] if cost == SIX else compute(fit.frame, fit.flops)
    log10_c = np.log10(spent.max()) + np.arange(3)
    n, d = (part[0] for part in allocate(fit.law, fit.vector(), log10_c, cost))
    if not np.isfinite(n).all():
        return {"warning": "an exponent is not positive: there is no optimal allocation"}
    a, b = local_exponents(fit.vector(), np.log(n), cost)[:, 0, 0]
    draws = np.empty((0, 5)) if fit.bootstrap is None else fit.bootstrap.parameters
    dn, dd = allocate(fit.law, draws, log10_c, cost)
    good = np.isfinite(dn).all(1)
    draws, dn, dd = draws[good], dn[good], dd[good]
    da, db = local_exponents(draws, np.log(dn), cost)[:, :, 0]

    def interval(value: float, values: np.ndarray) -> list[float] | None:
        if len(values) < 20:
            return None
        centre = float(np.median(values)) if on_bound(fit.model, fit.search) else value
        return corrected_quantiles(centre, values, fit.level)[:, 0].tolist()

    table = [
        {
            "compute": float(10.0 ** log10_c[k]), "decades_beyond_data": k,
            "params": float(n[k]), "params_interval": interval(n[k], dn[:, k]),
            "tokens": float(d[k]), "tokens_interval": interval(d[k], dd[:, k]),
            "tokens_per_param": float(d[k] / n[k]),
            "tokens_per_param_interval": interval(d[k] / n[k], dd[:, k] / dn[:, k]),
        } for k in range(3)
    ]  # fmt: skip
    return {"a": float(a), "a_interval": interval(a, da), "b": float(b),
            "b_interval": interval(b, db), "budgets": table,
            "compute_from": "6 N D" if cost == SIX else
            {"flops_per_token": "6 N (1 + excess N^-shrink)", "excess": cost.excess,
             "shrink": cost.shrink, "greatest_miss": cost.worst}}  # fmt: skip


def number(value: float | None) -> str:
    """Four significant digits; None is shown as open."""
    if value is None:
        return "open"
    if not np.isfinite(value):
        return str(value)
    return f"{value:.4g}"


def with_interval(value: float, interval: Any, why: str = "no interval") -> str:
    """`value [low, high]`, or the value and why it has no interval."""
    if interval is None:
        return f"{number(value)} ({why})"
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def meaning_of(meaning: dict[str, str], inputs: tuple[str, ...] = ("params", "compute")) -> str:
    """What N and C are, as far as a law of these inputs uses them."""
    symbols = {"N": "params", "C": "compute"}
    return "; ".join(f"{s}: {meaning[s]}" for s, name in symbols.items() if name in inputs)


def fit_text(fit: Fit) -> str:
    """A fit as lines of text."""
    s, lines = fit.search, [fit.law.formula]
    which = "" if fit.law.target == "loss" else f", L the {fit.law.target}"
    lines.append(f"  {fit.objective.formula}{which}, n = {len(fit.frame)}")
    if {"params", "compute"} & set(fit.law.inputs):
        lines.append(f"  {meaning_of(definitions(fit.frame, fit.size, fit.flops), fit.law.inputs)}")
    level = f"{100 * fit.level:.0f}%"
    for name, value in fit.parameters.items():
        shown = with_interval(value, fit.intervals.get(name), "no interval: see warnings")
        profile = fit.profiles.get(name)
        if profile is not None:
            low, high = profile.interval
            shown += f"   profile [{number(low)}, {number(high)}]"
        lines.append(f"  {name:<10} {shown}")
    lines.append(f"  ({level} intervals: bootstrap, then profile)")
    lines.append(f"  objective {s.objective:.10g}; {s.starts_at_best} of {s.starts} starts reached "
                 f"it, gradient {s.slope:.1e}")  # fmt: skip
    if fit.law.name == "chinchilla":
        best = _optimal(fit)
        if "a" in best:
            lines.append(f"  N* ~ C^{with_interval(best['a'], best['a_interval'])}, "
                         f"D* ~ C^{with_interval(best['b'], best['b_interval'])}")  # fmt: skip
            at = best["budgets"][0]
            ratio = with_interval(at["tokens_per_param"], at["tokens_per_param_interval"])
            by = "C = 6 N D" if fit.cost == SIX else "the runs' FLOPs a token, exponents there"
            lines.append(f"  tokens per parameter at {at['compute']:.2e} FLOPs {ratio}, by {by}")
    for h in fit.holdout:
        if h.extrapolated:
            lines.append(f"  largest size held out ({h.runs} runs): predicted loss off by "
                         f"{100 * h.error:+.2f}% (rms {100 * h.rms:.2f}%)")  # fmt: skip
    return "\n".join(lines + [f"  warning: {w}" for w in grouped((w,) for w in fit.warnings)])


def crossing_document(result: Crossing) -> dict[str, Any]:
    """The JSON document of a comparison of two families."""
    points = [r.point for r in result.laws if r.point is not None]
    return {
        "families": list(result.names),
        "conclusion": result.conclusion,
        "laws": {r.law: _law_document(r, result) for r in result.laws},
        "spread_over_laws": {
            "lowest": min(points, default=None), "highest": max(points, default=None),
            "laws_without_crossing": [r.law for r in result.laws if r.point is None],
        },
        "laws_not_fitted": result.skipped,
        "data_log10_compute": list(result.data),
        "both_families_up_to_log10_compute": result.shared,
        "horizon_log10_compute": result.horizon,
        "interval_level": result.level,
        "interval_method": "computes around a crossing at which neither family has the lower loss "
        "in enough joint bootstrap resamples; null is the end of the range: before the data, or "
        "beyond the horizon or never",
        "conventions": {"flops": result.flops},
        "definitions": _of_families(result),
        "warnings": result.warnings,
        "versions": versions(*_PACKAGES),
    }  # fmt: skip


def _law_document(r: LawCrossing, result: Crossing) -> dict[str, Any]:
    """One law of a comparison: all crossings, the first of them again, and the lead by compute."""

    def beyond(at: float) -> float:
        return max(0.0, at - result.shared)

    lead = r.lead
    document: dict[str, Any] = {
        "log10_compute": r.point,
        "interval": None if r.interval is None else list(r.interval),
        "interval_given_crossing": None if lead is None or lead.conditional is None else
        list(lead.conditional),
        "probability_no_crossing": r.probability_none,
        "crossings_in_range": len(r.turns),
        "crossings": [{"log10_compute": t.at, "interval": t.interval and list(t.interval),
                       "lower_beyond": result.names[t.leader],
                       "decades_beyond_data": beyond(t.at)} for t in r.turns],
        "lower_before": None if r.leader_before is None else result.names[r.leader_before],
        "lower_after": result.names[r.turns[0].leader] if r.turns else None,
        "resamples": 0 if lead is None else lead.refits,
        "decades_beyond_data": None if r.point is None else beyond(r.point),
        "fits": [{"parameters": f.parameters, "objective": f.search.objective,
                  "objective_function": f.objective.formula, "n": len(f.frame),
                  "intervals": {k: list(v) for k, v in f.intervals.items()}}
                 for f in r.fits],
        "warnings": r.warnings,
    }  # fmt: skip
    if lead is not None:
        some = slice(None, None, 10)
        document["lead"] = {
            "of": result.names[0],
            "log10_compute": lead.log10_c[some].round(3),
            "probability_lower": lead.probability[some],
            "probability_interval": lead.band[:, some],
            "loss_difference_interval": lead.gap[:, some],
        }
        document["settled"] = [
            {"from": s.low, "to": s.high, "lower": None if s.leader is None else
             result.names[s.leader]} for s in r.spans
        ]  # fmt: skip
    return document


def _of_families(result: Crossing) -> dict[str, str]:
    """What N and C are in a comparison."""
    fit = result.laws[0].fits[0]
    return definitions(fit.frame, fit.size, fit.flops)


def crossing_text(result: Crossing) -> str:
    """A comparison as lines of text."""
    lines = [f"{result.names[0]} against {result.names[1]}, log10 FLOPs of every crossing "
             f"({100 * result.level:.0f}% joint bootstrap):"]  # fmt: skip
    for r in result.laws:
        places = [(f"{t.at:.2f}", t.interval) for t in r.turns] or [("no crossing", r.interval)]
        what = ", ".join(f"{at}{_ends(interval)}" for at, interval in places)
        if r.probability_none is not None:
            what += f", P(no crossing) = {r.probability_none:.2f}"
        else:
            what += " (no interval: see warnings)"
        lines.append(f"  {r.law:<12} {what}")
    lines += [f"  {name:<12} not fitted: {why}" for name, why in result.skipped.items()]
    lines += _lead_lines(result)
    lines.append(f"  ({meaning_of(_of_families(result))})")
    lines.append(result.conclusion)
    lines += [f"  warning: {w}" for w in _crossing_warnings(result)]
    return "\n".join(lines)


def _ends(interval: tuple[float | None, float | None] | None) -> str:
    """An interval of a crossing, behind its place."""
    if interval is None:
        return ""
    low, high = interval
    return (f" [{'before the data' if low is None else f'{low:.2f}'}, "
            f"{'never' if high is None else f'{high:.2f}'}]")  # fmt: skip


def _lead_lines(result: Crossing) -> list[str]:
    """P(the first family has the lower loss) at whole decades, a line a law."""
    leads = [(r.law, r.lead) for r in result.laws if r.lead is not None]
    if not leads:
        return []
    first, last = int(np.ceil(result.data[0])), int(np.floor(result.horizon))
    decades = np.arange(first, last + 1, max(1, (last - first + 7) // 8))
    grid = leads[0][1].log10_c
    at = [int(np.argmin(np.abs(grid - d))) for d in decades]
    width = max(float(np.max(lead.band[1] - lead.band[0])) for _, lead in leads) / 2
    lines = [f"P({result.names[0]} has the lower loss), {leads[0][1].refits} joint resamples "
             f"(+-{width:.2f} at most):",
             "  log10 FLOPs  " + "".join(f"{d:>6}" for d in decades)]  # fmt: skip
    for law, lead in leads:
        lines.append(f"  {law:<12} " + "".join(f"{p:>6.2f}" for p in lead.probability[at]))
    return lines


def _crossing_warnings(result: Crossing) -> list[str]:
    """Each warning once, with the laws and families that it is about."""
    found = [("", "", w) for w in result.warnings]
    for r in result.laws:
        prefixes = tuple(f"{name}: " for name in result.names)
        found += [(r.law, "", w) for w in r.warnings if not w.startswith(prefixes)]
        for name, fit in zip(result.names, r.fits, strict=True):
            found += [(r.law, name, w) for w in fit.warnings]
    return grouped(found, ([r.law for r in result.laws], result.names))


def allocation_document(results: list[Allocation]) -> dict[str, Any]:
    """The JSON document of one or more approaches to the optimal allocation."""
    out: dict[str, Any] = {}
    for r in results:
        tail = 50 * (1 - r.level)
        budgets = []
        for i, p in enumerate(r.budgets):
            entry: dict[str, Any] = {
                "compute": p.compute, "status": p.status, "runs": p.runs, "sizes": p.sizes,
                "curvature_in_standard_errors": p.curvature_t,
            }  # fmt: skip
            if p.status == "minimum":
                entry |= {"params": p.params, "tokens": p.tokens, "loss": p.loss}
                for j, name in enumerate(("params", "tokens")):
                    draws = r.budget_draws[:, i, j]
                    draws = draws[np.isfinite(draws)]
                    entry[f"{name}_interval"] = None
                    if len(draws) >= 20:
                        entry[f"{name}_interval"] = np.percentile(
                            draws, [tail, 100 - tail]
                        ).tolist()
                    entry["share_of_resamples_with_a_minimum"] = (
                        len(draws) / max(len(r.budget_draws), 1))  # fmt: skip
            budgets.append(entry)
        out[r.approach] = {
            "definitions": r.definitions,
            "exponents": r.exponents,
            "intervals": {k: list(v) for k, v in r.intervals.items()},
            "params_prefactor": float(np.exp(r.n_coefficients[0])),
            "tokens_prefactor": float(np.exp(r.d_coefficients[0])),
            "budgets": budgets,
            "points": r.points.tolist(),
            "resamples": len(r.draws),
            "interval_level": r.level,
            "warnings": r.warnings,
        }
    return {"approaches": out, "versions": versions(*_PACKAGES)}


def allocation_text(results: list[Allocation]) -> str:
    """Optimal allocations as lines of text."""
    lines = []
    for r in results:
        lines.append(f"approach {r.approach} ({100 * r.level:.0f}% bootstrap intervals):")
        lines.append(f"  {meaning_of(r.definitions)}")
        for name, value in r.exponents.items():
            label = {"a": "N* ~ C^a", "b": "D* ~ C^b", "a_plus_b": "a + b"}[name]
            shown = with_interval(value, r.intervals.get(name), "no interval: see warnings")
            lines.append(f"  {label:<10} {shown}")
        for i, p in enumerate(r.budgets):
            if p.status != "minimum":
                lines.append(f"  {p.compute:.2e} FLOPs: no minimum ({p.status})")
                continue
            draws = r.budget_draws[:, i, 0]
            draws = draws[np.isfinite(draws)]
            tail = 50 * (1 - r.level)
            interval = np.percentile(draws, [tail, 100 - tail]) if len(draws) >= 20 else None
            lines.append(f"  {p.compute:.2e} FLOPs: N* = {with_interval(p.params, interval)} from "
                         f"{p.sizes} sizes")  # fmt: skip
    found = [(r.approach, w) for r in results for w in r.warnings]
    lines += [f"  warning: {w}" for w in grouped(found, ([r.approach for r in results],))]
    return "\n".join(lines)
