"""Scaling laws with their uncertainty: read runs, fit laws, compare families.

A pure library on numpy and scipy. Start with `read_runs` and `fit_law`; docs/scaling.md is
the guide. Texts and figures, which need more, are imported when they are first used.
"""

from typing import TYPE_CHECKING

from mmfree_jax.experiments.scaling.crossing import cross
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.extrapolation import extrapolate
from mmfree_jax.experiments.scaling.fit import Fit, fit_law
from mmfree_jax.experiments.scaling.fitted_law import FittedLaw, fitted_law, read_fits
from mmfree_jax.experiments.scaling.frame import RunFrame, compute, make_frame
from mmfree_jax.experiments.scaling.isoflop import envelope, isoflop, parametric
from mmfree_jax.experiments.scaling.joint import JointFit, fit_joint
from mmfree_jax.experiments.scaling.laws import LAWS, Law
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.predict import (
    Equivalent,
    Estimate,
    Optimum,
    Place,
    Prediction,
    equal_loss,
    predict,
)
from mmfree_jax.experiments.scaling.read import Columns, read_runs
from mmfree_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from mmfree_jax.experiments.scaling.extrapolation_report import (
        extrapolation_text,
        plot_extrapolation,
    )
    from mmfree_jax.experiments.scaling.fit_plots import plot_fit, plot_joint
    from mmfree_jax.experiments.scaling.joint_report import joint_text, sharing_text
    from mmfree_jax.experiments.scaling.plots import (
        plot_allocation,
        plot_crossing,
        plot_families,
        plot_gap,
        plot_rates,
        png,
    )
    from mmfree_jax.experiments.scaling.predict_report import predict_text
    from mmfree_jax.experiments.scaling.report import allocation_text, crossing_text, fit_text

__all__ = [
    "LAWS",
    "Columns",
    "Equivalent",
    "Estimate",
    "Fit",
    "FittedLaw",
    "JointFit",
    "Law",
    "Objective",
    "Optimum",
    "Place",
    "Prediction",
    "RunFrame",
    "ScalingError",
    "allocation_text",
    "compute",
    "cross",
    "crossing_text",
    "envelope",
    "equal_loss",
    "extrapolate",
    "extrapolation_text",
    "fit_joint",
    "fit_law",
    "fit_text",
    "fitted_law",
    "isoflop",
    "joint_text",
    "make_frame",
    "parametric",
    "plot_allocation",
    "plot_crossing",
    "plot_extrapolation",
    "plot_families",
    "plot_fit",
    "plot_gap",
    "plot_joint",
    "plot_rates",
    "png",
    "predict",
    "predict_text",
    "read_fits",
    "read_runs",
    "sharing_text",
]

_OF = "mmfree_jax.experiments.scaling"
_NAMES = {
    f"{_OF}.extrapolation_report": "extrapolation_text plot_extrapolation",
    f"{_OF}.fit_plots": "plot_fit plot_joint",
    f"{_OF}.joint_report": "joint_text sharing_text",
    f"{_OF}.plots": ("plot_allocation plot_crossing plot_families plot_gap plot_rates png"),
    f"{_OF}.predict_report": "predict_text",
    f"{_OF}.report": "allocation_text crossing_text fit_text",
}
__getattr__, __dir__ = lazy_names(__name__, _NAMES)
