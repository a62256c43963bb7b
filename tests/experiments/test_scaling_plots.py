"""Figures say whose a line is, show what is left over, and where an interval has no end."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.experiments.scaling import cross, fit_joint, fit_law, paper, read_runs
from mmfree_jax.experiments.scaling.fit_plots import plot_fit, plot_joint
from mmfree_jax.experiments.scaling.plots import plot_crossing, plot_rates
from mmfree_jax.figures import show_late


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture(scope="module")
def families():
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 19, 3), 4)
    gadre = {"E": 1.8, "a": 300.0, "b": 500.0, "eta": 0.2}
    return {name: draw_runs("gadre", gadre, params, tokens, noise=0.003, family=name, seed=k)
            for k, name in enumerate(("ternary", "float"))}  # fmt: skip


def test_residuals_are_drawn_over_size_and_tokens(families):
    fit = fit_law(families["ternary"], "gadre", resamples=0, profile=False, holdout=False)
    figure, rows = plot_fit(fit)
    law, over_n, over_d, *_ = figure.axes
    assert "ternary: runs" in texts(law)
    assert over_n.get_xlabel() == "parameters N"
    assert over_d.get_xlabel() == "training tokens D"
    loss, fitted = families["ternary"].loss, fit.predict(fit.inputs)
    for axes, x in ((over_n, families["ternary"].params), (over_d, families["ternary"].tokens)):
        drawn = axes.collections[0].get_offsets()
        np.testing.assert_allclose(drawn[:, 0], x)
        np.testing.assert_allclose(drawn[:, 1], np.log(loss / fitted))
    runs = [r for r in rows if r["series"] == "run"]
    np.testing.assert_allclose([r["tokens"] for r in runs], families["ternary"].tokens)


def test_every_line_of_a_joint_fit_has_its_family(families):
    fit = fit_joint(families, "gadre", resamples=0, profile=False, restarts=0)
    figure, _ = plot_joint(fit)
    law, over_n, _ = figure.axes
    said = " ".join(texts(law))
    for name in families:
        assert f"{name}: runs" in said
        assert f"{name}: least loss" in said
    assert "shared E" in said
    assert texts(over_n) == ["ternary", "float"]
    assert law.get_ylim()[0] < fit.parameters["E"]


def test_never_is_an_arrow():
    ends = read_runs([paper.ENDPOINTS])
    two = tuple(ends.take(ends.family == f) for f in ("matmul-free", "transformer++"))
    result = cross(two, ("a", "b"), ("power",), resample="noise", resamples=200)
    assert result.laws[0].turns[0].interval[1] is None
    figure, _ = plot_crossing(result)
    arrows = [t for t in figure.axes[3].texts
              if isinstance(t, Annotation) and t.arrow_patch is not None]  # fmt: skip
    assert [arrow.xy for arrow in arrows] == [(result.horizon + 0.45, 1)]
    assert "to never" in texts(figure.axes[3])


def test_rates_name_their_family_in_the_legend():
    figure, _ = plot_rates({("ternary", "1M"): {1e-3: 3.0, 2e-3: 2.9}})
    assert figure.axes[0].get_legend().get_title().get_text() == "ternary"


def test_a_curves_first_tenth_does_not_set_the_range():
    axes = Figure().subplots()
    x = np.arange(101.0)
    axes.plot(x, np.where(x < 10, 9.0, 3.0 - x / 100))
    axes.plot([50.0], [np.nan])
    show_late(axes)
    low, high = axes.get_ylim()
    assert low == pytest.approx(2.0 - 0.05 * 0.9)
    assert high == pytest.approx(2.9 + 0.05 * 0.9)
    show_late(Figure().subplots())  # nothing drawn: nothing to do
