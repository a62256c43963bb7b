"""What there is to say of a plan beside its table."""

from collections.abc import Mapping, Sequence

from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import PlannedRun, derived_sizes


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
