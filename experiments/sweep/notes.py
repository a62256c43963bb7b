"""What there is to say of a plan beside its table."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mmfree_jax.experiments.sweep.branches import savings_text
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.pauses import saved_flops
from mmfree_jax.experiments.sweep.plan import derived_sizes, parameters
from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.shapes import FEWEST
from mmfree_jax.no_effect import without_effect


def plan_notes(
    sweep: SweepConfig,
    runs: Sequence[PlannedRun],
    data_tokens: Mapping[tuple[str, ...], int] | None,
) -> list[str]:
    """Lines on what the design leaves out, and on data that is seen more than once.

    Args:
      sweep: the config.
      runs: those of the plan.
      data_tokens: data paths -> training tokens; None: not known.
    """
    lines = [f"note: {text}" for text in derived_sizes(sweep).left_out]
    idle = Counter(line for run in runs for line in without_effect(run.config))
    lines += [f"warning: {n} of {len(runs)} runs: {line}" for line, n in idle.items()]
    lines += _beyond_rules(sweep, runs)
    lines += _few_sizes(sweep, runs)
    if sweep.halving.is_on:
        lines.append(
            f"note: halving ends tuning runs early, which saves {_saved(sweep, runs):.3g} FLOPs of "
            "those below"
        )
    if (savings := savings_text(runs)) is not None:
        lines.append(savings)
    elif sweep.is_branched and any(run.stage == "main" for run in runs):
        lines.append("note: schedule is wsd-branched, but no two runs differ in their budget "
                     "alone: each is made by itself")  # fmt: skip
    if data_tokens is None:
        return lines
    passes = [run.tokens / data_tokens[run.config.data.paths] for run in runs]
    again = sum(p > 1 for p in passes)
    if again:
        lines.append(
            f"warning: {again} of {len(runs)} runs see their corpus more than once, up to "
            f"{max(passes):.3g} times: tokens that come again teach less, and a law fitted to "
            "them is that of this corpus; give more text, or smaller budgets"
        )
    return lines


def _few_sizes(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """Budgets of an isoFLOP design that have too few sizes in some family."""
    if not sweep.named_sizes:  # else refused
        return []
    found: dict[tuple[float, str], set[str]] = {}
    for run in runs:
        if run.budget is not None:
            found.setdefault((run.budget, run.family), set()).add(run.size)
    return [
        f"note: flop_budgets: {family} spends {budget:.3g} FLOPs at {', '.join(sorted(sizes))} "
        f"alone; a parabola takes {FEWEST} sizes"
        for (budget, family), sizes in sorted(found.items()) if len(sizes) < FEWEST
    ]  # fmt: skip


def _beyond_rules(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> list[str]:
    """Families whose rates a rule gives beyond the sizes or budgets that it was fitted to."""
    lines = []
    for family in sweep.families:
        own = [run for run in runs if run.family == family.label]
        if not (own and family.rate_rule.is_on):
            continue
        rule = family.rate_rule.rule(family.label)
        for what, limits, values in (
            ("parameters", rule.params_range, [parameters(r.config, "non-embedding") for r in own]),
            ("tokens", rule.tokens_range, [run.tokens for run in own]),
        ):
            if limits is not None and not limits[0] <= min(values) <= max(values) <= limits[1]:
                lines.append(
                    f"note: the rate rule of {family.label} was fitted to {limits[0]:.3g} to "
                    f"{limits[1]:.3g} {what}; these runs have {min(values):.3g} to "
                    f"{max(values):.3g}"
                )
    return lines


def _saved(sweep: SweepConfig, runs: Sequence[PlannedRun]) -> float:
    return saved_flops([run for run in runs if run.stage == "tuning"], sweep.halving)
