"""Crossings of known curves, and refusals to conclude."""

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.experiments.scaling import paper
from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.crossing import cross, frontier
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.lead import (
    changes,
    crossings,
    leaders,
    measure_lead,
    stretches,
)
from mmfree_jax.experiments.scaling.plots import plot_crossing
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.scaling.report import crossing_document, crossing_text

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
ONE = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.35}
TWO = {"E": 1.8, "A": 300.0, "B": 1100.0, "alpha": 0.34, "beta": 0.35}


def pair(noise=0.002, other=None):
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 20, 5), 5)
    return (
        draw_runs("chinchilla", ONE, params, tokens, noise=noise, seed=1),
        draw_runs("chinchilla", other or TWO, params, tokens, noise=noise, seed=2),
    )


def loss_at(p, log10_c):
    """The least loss over N at C = 6 N D, by search."""
    c = 10.0**log10_c
    return minimize_scalar(
        lambda log_n: p["E"] + p["A"] * np.exp(-p["alpha"] * log_n)
        + p["B"] * (c / 6 / np.exp(log_n)) ** -p["beta"],
        bounds=(np.log(1e4), np.log(1e15)), method="bounded", options={"xatol": 1e-12},
    ).fun  # fmt: skip


def truth(one, two):
    return brentq(lambda x: loss_at(one, x) - loss_at(two, x), 17, 29)


def test_compute_optimal_curves_are_minima_over_size():
    grid = np.array([18.0, 21.0, 24.0])
    n = np.geomspace(1e6, 1e13, 200001)
    for name, p in (
        ("chinchilla", (1.7, 400, 1500, 0.34, 0.36)),
        ("gadre", (1.7, 900, 3000, 0.18)),
    ):
        law = LAWS[name]
        best = curve(law, np.array(p), grid)[0]
        for c, value in zip(10**grid, best, strict=True):
            x = {"params": n, "tokens": c / 6 / n, "compute": np.full_like(n, c)}
            assert value == pytest.approx(law.loss(np.array(p), x).min(), rel=1e-7)


def test_every_sign_change_is_a_crossing_and_rounding_is_none():
    x = np.linspace(0, 10, 101)
    functions = [
        (lambda x: x - 3.33, [(3.33, 1)]),
        (lambda x: np.ones_like(x), []),
        (lambda x: (x - 2.04) * (x - 7), [(2.04, 0), (7.0, 1)]),
        (lambda x: (x - 5) ** 2, []),  # touches
        (lambda x: 1e-14 * np.sin(9 * x), []),  # the rounding of equal curves
        (lambda x: np.full_like(x, np.nan), []),
    ]  # fmt: skip
    for difference, expected in functions:
        leading = leaders(3 + difference(x), np.full_like(x, 3.0))
        found = crossings(difference, leading, x)
        assert [leader for _, leader in found] == [leader for _, leader in expected]
        np.testing.assert_allclose([at for at, _ in found], [at for at, _ in expected], atol=1e-9)


def test_a_crossing_on_a_point_of_the_grid_counts_once():
    x = np.arange(5.0)
    assert crossings(lambda x: x - 2, leaders(x, np.full(5, 2.0)), x) == [(2.0, 1)]
    rows, columns = changes(np.array([[0, 1, 0, -1, -1], [1, 0, 1, 1, 1]], np.int8))
    assert (rows.tolist(), columns.tolist()) == ([0], [2])


def test_stretches_are_the_quantiles_of_one_crossing():
    """Refits of one crossing at 4 + z / 2: the open stretch is its equal-tailed interval."""
    place = 4 + 0.5 * norm.ppf((np.arange(400) + 0.5) / 400)
    x = np.arange(0, 8, 0.01)
    lead = measure_lead(
        lambda c: (np.full((400, len(c)), 3.0), 3 + place[:, None] - c), x - 4, 400, x, 0.95
    )
    found = stretches(x, lead.first, lead.second, 0.95)
    assert [s.leader for s in found] == [0, None, 1]
    assert found[1].low == pytest.approx(4 - 0.98, abs=0.02)
    assert found[1].high == pytest.approx(4 + 0.98, abs=0.02)
    assert lead.none == 0
    assert lead.conditional == pytest.approx((4 - 0.98, 4 + 0.98), abs=0.02)
    middle = np.argmin(np.abs(x - 4))
    assert lead.probability[middle] == pytest.approx(0.5, abs=0.01)
    # Wilson's interval of 200 in 400, and of 400 in 400: 400 / (400 + 1.96^2).
    assert lead.band[:, middle] == pytest.approx([0.451, 0.549], abs=0.01)
    assert lead.band[:, 0] == pytest.approx([0.9905, 1.0], abs=1e-4)
    assert lead.gap[:, middle] == pytest.approx([-0.98, 0.98], abs=0.02)


def test_the_bias_of_refits_is_corrected():
    """Refits whose crossings lie 0.2 too far, 4.2 + z / 2: their interval is moved to 3.8."""
    place = 4.2 + 0.5 * norm.ppf((np.arange(4000) + 0.5) / 4000)
    x = np.arange(0, 8, 0.01)
    lead = measure_lead(
        lambda c: (np.full((4000, len(c)), 3.0), 3 + place[:, None] - c), x - 4, 4000, x, 0.95
    )
    found = stretches(x, lead.first, lead.second, 0.95)
    assert found[1].low == pytest.approx(3.8 - 0.98, abs=0.02)
    assert found[1].high == pytest.approx(3.8 + 0.98, abs=0.02)
    at = np.argmin(np.abs(x - found[1].low))
    assert lead.gap[1, at] == pytest.approx(0, abs=0.02)


def test_refits_without_a_curve_settle_nothing():
    x = np.arange(0, 2, 0.01)
    other = np.where(np.arange(100)[:, None] < 10, np.nan, 4.0) + 0 * x
    lead = measure_lead(
        lambda c: (np.full((100, len(c)), 3.0), other[:, : len(c)]), 0 * x - 1, 100, x, 0.95
    )
    assert lead.probability[0] == 1
    assert lead.band[0, 0] < 0.9  # the ten could fall to either side
    assert [s.leader for s in stretches(x, lead.first, lead.second, 0.95)] == [None]


def test_a_crossing_inside_the_data_does_not_hide_one_beyond():
    """E + K C^-gamma with K so that the curves meet at 10^19 and at 10^24.9."""
    steep = {"E": 1.8, "K": 0.389053 * 10 ** (19 * 0.2), "gamma": 0.2}
    flat = {"E": 1.7, "K": 0.489053 * 10 ** (19 * 0.1), "gamma": 0.1}
    places = [brentq(lambda c: sum(sign * (p["E"] + p["K"] * 10 ** (-c * p["gamma"]))
                                   for sign, p in ((1, steep), (-1, flat))), *ends)
              for ends in ((18, 20), (23, 27))]  # fmt: skip
    assert places == pytest.approx([19.0, 24.9], abs=0.001)
    c = 10.0 ** np.linspace(16.5, 22.5, 25)
    params = np.sqrt(c / 120)
    runs = tuple(draw_runs("power-floor", p, params, c / 6 / params, noise=0.0003, seed=k)
                 for k, p in enumerate((steep, flat)))  # fmt: skip
    result = cross(runs, ("steep", "flat"), ["power-floor"], points="all", resamples=200)
    r = result.laws[0]
    assert [t.leader for t in r.turns] == [0, 1]
    for turn, place in zip(r.turns, places, strict=True):
        assert turn.interval[0] < place < turn.interval[1]
        assert turn.interval[0] < turn.at < turn.interval[1]
    assert r.lead.probability[np.argmin(np.abs(r.lead.log10_c - 22))] == 1
    assert r.lead.probability[-1] == 0
    text = result.conclusion
    assert "is that of flat up to 10^19.00, then of steep up to 10^24." in text
    assert "FLOPs, then of flat." in text
    assert "flat leads from 10^25." in text or "flat leads from 10^24." in text
    assert "That steep overtakes is supported" in text
    assert "within the data" in text
    assert "That flat overtakes is supported" in text
    assert "decades beyond the runs (10^22.5)" in text
    document = crossing_document(result)["laws"]["power-floor"]
    assert [c["lower_beyond"] for c in document["crossings"]] == ["steep", "flat"]
    assert [s["lower"] for s in document["settled"]] == ["flat", None, "steep", None, "flat"]
    assert document["lead"]["probability_lower"][0] == 0
    assert " 24." in crossing_text(result).splitlines()[1]
    rows = plot_crossing(result)[1]
    assert [round(row["log10_compute"]) for row in rows
            if row["series"] == "crossing power-floor"] == [19, 25]  # fmt: skip


def test_equal_families_do_not_cross():
    runs = pair(0.0, ONE)
    result = cross(runs, ("one", "same"), ["power"], resamples=0)
    assert result.laws[0].turns == ()
    assert result.laws[0].leader_before is None
    assert "neither has a lower loss" in result.conclusion


def test_exact_data_give_the_crossing():
    result = cross(pair(0.0), laws=["chinchilla"], resamples=0)
    assert result.laws[0].point == pytest.approx(truth(ONE, TWO), abs=1e-4)
    assert result.laws[0].leader_before == 1
    assert [t.leader for t in result.laws[0].turns] == [0]
    assert "no probability can be given" in result.conclusion


def test_joint_bootstrap_holds_the_crossing():
    result = cross(pair(), ("one", "two"), ["chinchilla"], resamples=200)
    r = result.laws[0]
    assert r.interval[0] < truth(ONE, TWO) < r.interval[1]
    assert r.probability_none == 0
    assert "supported" in result.conclusion
    assert "extrapolation" in result.conclusion


def test_parallel_curves_do_not_cross():
    """Every term of the second is a tenth larger: no refit crosses, and nothing is open."""
    worse = {**ONE, "E": 1.87, "A": 440.0, "B": 1650.0}
    result = cross(pair(other=worse), ("one", "two"), ["gadre"], resamples=200)
    r = result.laws[0]
    assert r.point is None
    assert r.probability_none > 0.9
    assert r.interval is None
    assert [s.leader for s in r.spans] == [0]
    assert "one has the lower loss throughout" in result.conclusion
    assert "one leads from 10^17.00 to 10^30.00 FLOPs (by extrapolation beyond 10^20.0)." in (
        result.conclusion
    )
    assert "cannot be excluded" in result.conclusion


def test_laws_that_disagree_are_reported_as_such():
    """Two power laws over different floors: a straight line crosses, the truth does not."""
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 21, 7), 1, spread=1)
    slow = draw_runs("power-floor", {"E": 2.0, "K": 5000, "gamma": 0.2}, params, tokens)
    fast = draw_runs("power-floor", {"E": 1.8, "K": 2900, "gamma": 0.2}, params, tokens)
    result = cross((slow, fast), ("slow", "fast"), ["line", "power-floor"], resamples=50)
    by = {r.law: r for r in result.laws}
    assert by["line"].point is not None
    assert by["power-floor"].point is None
    assert "disagree" in result.conclusion


def test_frontier():
    frame = make_frame(params=1e7, tokens=1e9, loss=[3.0, 2.9, 3.1, 2.5])
    np.testing.assert_array_equal(frontier(frame, np.array([1.0, 2, 3, 4])), [1, 1, 0, 1])
    np.testing.assert_array_equal(frontier(frame, np.array([1.0, 1, 1, 4])), [0, 1, 0, 1])


def test_bad_requests():
    frames = tuple(f.take(np.array([2, 12, 22])) for f in pair())
    with pytest.raises(
        ScalingError, match="no law can be fitted to both families: chinchilla: runs: 3"
    ):
        cross(frames, laws=["chinchilla"], resamples=0)
    with pytest.raises(ScalingError, match="horizon: 10\\^18 FLOPs is not beyond the data"):
        cross(pair(), laws=["line"], horizon=18)
    result = cross(frames, laws=["line", "chinchilla"], resamples=0)
    assert "5 parameters" in result.skipped["chinchilla"]


def test_the_papers_lines_and_three_points():
    assert paper.lines_cross_at() == pytest.approx(22.77, abs=0.005)
    assert pytest.approx(22.78, abs=0.005) == paper.DRAWN_STAR
    frame = read_runs([paper.ENDPOINTS])
    frames = tuple(frame.take(frame.family == f) for f in ("matmul-free", "transformer++"))
    result = cross(frames, ("matmul-free", "transformer++"), resample="noise", resamples=300)
    assert set(result.skipped) == {"chinchilla", "gadre", "broken"}
    assert all(r.probability_none > 0 for r in result.laws if r.law != "power-floor")
    assert "cannot be concluded" in result.conclusion
    floor = next(r for r in result.laws if r.law == "power-floor")
    assert any("three points cannot fix a floor" in w for w in floor.warnings)


def test_a_crossing_within_the_data_is_not_put_beyond_it():
    table = RESULTS / "study" / "best.csv"
    families = ("matmulfree", "transformer")
    frames = tuple(read_runs([table], where=[f"family = {name}"]) for name in families)
    result = cross(frames, ("MatMul-free", "Transformer++"), ["line", "power-floor"], size="total",
                   flops="6nd", resamples=60)  # fmt: skip
    assert min(r.point for r in result.laws) < result.data[1]
    assert "the fitted crossings lie within the data (up to 10^16.0)" in result.conclusion
    assert "or more beyond" not in result.conclusion
