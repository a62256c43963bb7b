"""Sweeps: many training runs from one config, planned, run, resumed and tabulated.

`config` and `plan` say which runs; `estimate` what they cost; `runner` starts the ordinary
trainer, one process a run; `table` keeps the results; `rates` chooses learning rates from
them, `axes`
has what is tried beside them, `widening` adds to their lists, `halving` and `pauses` end the
worse runs early, `rate_fit` and `rate_rule` carry them to other sizes and budgets; `branches` has
the trunks that runs share; `report` and `status` read all of it. docs/sweeps.md is the guide.
Nothing here starts JAX in the sweep's own process: it would take the memory that the runs need.

Public are the names in `__all__`, which read what sweeps and runs left behind.
"""

from typing import TYPE_CHECKING

from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.experiments.sweep.curves import (
        Curve,
        Phase,
        PhaseSummary,
        load_curve,
        phases,
        phases_text,
        plot_phases,
        summarise_phases,
    )
    from mmfree_jax.experiments.sweep.rates import tried_rates
    from mmfree_jax.experiments.sweep.report import losses_text

__all__ = [
    "Curve",
    "Phase",
    "PhaseSummary",
    "load_curve",
    "losses_text",
    "phases",
    "phases_text",
    "plot_phases",
    "summarise_phases",
    "tried_rates",
]

_NAMES = {
    "mmfree_jax.experiments.sweep.curves": (
        "Curve Phase PhaseSummary load_curve phases phases_text plot_phases summarise_phases"
    ),
    "mmfree_jax.experiments.sweep.rates": "tried_rates",
    "mmfree_jax.experiments.sweep.report": "losses_text",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
