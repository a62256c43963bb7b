"""Sweeps: many training runs from one config, planned, run, resumed and tabulated.

`config` and `plan` say which runs; `estimate` what they cost; `runner` starts the ordinary
trainer, one process a run; `table` keeps the results; `rates` chooses learning rates from
them, `axes`
has what is tried beside them, `widening` adds to their lists, `halving` and `pauses` end the
worse runs early, `rate_fit` and `rate_rule` carry them to other sizes and budgets; `branches` has
the trunks that runs share; `report` and `status` read all of it. docs/sweeps.md is the guide.
Nothing here starts JAX in the sweep's own process: it would take the memory that the runs need.
"""
