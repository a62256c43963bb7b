"""Scaling laws with their uncertainty: read runs, fit laws, compare families.

A pure library on numpy and scipy. Start with `read_runs` and `fit_law`; docs/scaling.md is
the guide.
"""

from mmfree_jax.experiments.scaling.crossing import cross
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.extrapolation import extrapolate
from mmfree_jax.experiments.scaling.fit import Fit, fit_law
from mmfree_jax.experiments.scaling.frame import RunFrame, compute, make_frame
from mmfree_jax.experiments.scaling.isoflop import envelope, isoflop, parametric
from mmfree_jax.experiments.scaling.joint import JointFit, fit_joint
from mmfree_jax.experiments.scaling.laws import LAWS, Law
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.read import Columns, read_runs

__all__ = [
    "LAWS",
    "Columns",
    "Fit",
    "JointFit",
    "Law",
    "Objective",
    "RunFrame",
    "ScalingError",
    "compute",
    "cross",
    "envelope",
    "extrapolate",
    "fit_joint",
    "fit_law",
    "isoflop",
    "make_frame",
    "parametric",
    "read_runs",
]
