"""A joint fit as a JSON document and as text in which no number stands alone."""

from typing import Any

from mmfree_jax.experiments.scaling.frame import definitions
from mmfree_jax.experiments.scaling.joint import JointFit
from mmfree_jax.experiments.scaling.report import fit_document, meaning_of, number, with_interval
from mmfree_jax.installed import versions


def joint_document(fit: JointFit) -> dict[str, Any]:
    """The JSON document of a joint fit; each of `families` is one of a single fit.

    In these, objectives are the family's part of the sum, and what `optimisation` says is
    said of the joint search.
    """
    s, test = fit.search, fit.test
    families = {name: fit_document(own) for name, own in fit.fits.items()}
    for name, document in families.items():
        document["parameters_alone"] = fit.alone[name]
    return {
        "law": fit.sharing.law.name,
        "shared": {
            p: {"value": fit.parameters[p],
                "interval": list(fit.intervals[p]) if p in fit.intervals else None,
                "profile_interval": list(fit.profiles[p].interval) if p in fit.profiles else None}
            for p in fit.sharing.shared
        },
        "objective": s.objective,
        "n": sum(len(own.frame) for own in fit.fits.values()),
        "families": families,
        "test": None if test is None else {
            "null": f"{', '.join(fit.sharing.shared)} the same in all families",
            "statistic": test.statistic,
            "parameters_freed": test.freed,
            "p_value": test.p_value,
            "resamples": len(test.draws),
            "objective_separate": test.separate,
        },
        "formula": fit.sharing.law.formula,
        "objective_function": fit.objective.formula,
        "interval_level": fit.level,
        "definitions": _definitions(fit),
        "optimisation": {
            "starts": s.starts, "starts_at_optimum": s.starts_at_best, "restarts": s.restarts,
            "gradient": s.slope,
        },
        "seed": fit.seed,
        "warnings": fit.warnings,
        "versions": versions("mmfree-jax", "numpy", "scipy"),
    }  # fmt: skip


def _definitions(fit: JointFit) -> dict[str, str]:
    """What N and C are; the families have one convention."""
    own = next(iter(fit.fits.values()))
    return definitions(own.frame, own.size, own.flops)


def joint_text(fit: JointFit) -> str:
    """A joint fit as lines of text."""
    sharing, s = fit.sharing, fit.search
    n = sum(len(own.frame) for own in fit.fits.values())
    lines = [f"{sharing.law.formula}, {', '.join(sharing.shared)} shared by "
             f"{', '.join(sharing.families)}",
             f"  {fit.objective.formula}, n = {n}",
             f"  {meaning_of(_definitions(fit), sharing.law.inputs)}"]  # fmt: skip
    for name in sharing.shared:
        apart = ", ".join(f"{f} {number(p[name])}" for f, p in fit.alone.items())
        lines.append(f"{_line(fit, name, name)}   (fitted apart: {apart})")
    for k, (family, own) in enumerate(fit.fits.items()):
        lines.append(f"  {family}, {len(own.frame)} runs:")
        for name, i in zip(sharing.law.parameters, sharing.positions(k), strict=True):
            if name not in sharing.shared:
                lines.append("  " + _line(fit, name, sharing.names[i]))
    level = f"{100 * fit.level:.0f}%"
    lines.append(f"  ({level} intervals: bootstrap within each family, then profile)")
    lines.append(f"  objective {s.objective:.10g}; {s.starts_at_best} of {s.starts} starts reached "
                 f"it, gradient {s.slope:.1e}")  # fmt: skip
    if fit.test is not None:
        lines.append("  " + sharing_text(fit))
    return "\n".join(lines + [f"  warning: {w}" for w in fit.warnings])


def _line(fit: JointFit, name: str, joint: str) -> str:
    """One parameter with its intervals."""
    shown = with_interval(fit.parameters[joint], fit.intervals.get(joint),
                          "no interval: see warnings")  # fmt: skip
    if joint in fit.profiles:
        low, high = fit.profiles[joint].interval
        shown += f"   profile [{number(low)}, {number(high)}]"
    return f"  {name:<10} {shown}"


def sharing_text(fit: JointFit) -> str:
    """What the test says of the sharing, in a sentence."""
    test, what = fit.test, ", ".join(fit.sharing.shared)
    assert test is not None
    against = test.p_value < 1 - fit.level
    verdict = (f"the runs speak against one {what} for all families" if against
               else f"the runs do not speak against one {what} for all families")  # fmt: skip
    freed = "1 parameter" if test.freed == 1 else f"{test.freed} parameters"
    return (f"likelihood ratio of fits apart, with {freed} more: {number(test.statistic)}, "
            f"p = {test.p_value:.3g} by {len(test.draws)} data sets drawn under sharing: "
            f"{verdict}")  # fmt: skip
