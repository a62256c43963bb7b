"""Crossings of known curves, and refusals to conclude."""

from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.experiments.scaling import paper
from mmfree_jax.experiments.scaling.crossing import cross, curve, first_crossings, frontier
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.read import read_runs

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
ONE = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.35}
TWO = {"E": 1.8, "A": 300.0, "B": 1100.0, "alpha": 0.34, "beta": 0.35}


def pair(noise=0.002, other=None):
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 20, 5), 5)
    return (
        draw_runs("chinchilla", ONE, params, tokens, noise=noise, seed=1),
        draw_runs("chinchilla", other or TWO, params, tokens, noise=noise, seed=2),
    )


def truth(one, two):
    grid = np.linspace(16, 30, 14001)
    law = LAWS["chinchilla"]
    difference = [curve(law, np.array([p[k] for k in law.parameters]), grid)[0] for p in (one, two)]
    return first_crossings((difference[0] - difference[1])[None], grid)[0][0]


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


def test_first_crossings():
    x = np.linspace(0, 10, 101)
    d = np.stack([x - 3.33, np.ones_like(x), (x - 2) * (x - 7), np.full_like(x, np.nan)])
    where, count = first_crossings(d, x)
    np.testing.assert_allclose(where, [3.33, np.nan, 2, np.nan], atol=0.01)
    np.testing.assert_array_equal(count[:3], [1, 0, 2])


def test_exact_data_give_the_crossing():
    result = cross(pair(0.0), laws=["chinchilla"], resamples=0)
    assert result.laws[0].point == pytest.approx(truth(ONE, TWO), abs=0.01)
    assert result.laws[0].leader_before == 1
    assert result.laws[0].leader_after == 0
    assert "no probability can be given" in result.conclusion


def test_joint_bootstrap_holds_the_crossing():
    result = cross(pair(), ("one", "two"), ["chinchilla"], resamples=200)
    r = result.laws[0]
    assert r.interval[0] < truth(ONE, TWO) < r.interval[1]
    assert r.probability_none == 0
    assert "supported" in result.conclusion
    assert "extrapolation" in result.conclusion


def test_parallel_curves_do_not_cross():
    worse = {**ONE, "E": 1.9, "A": 440.0, "B": 1650.0}
    result = cross(pair(other=worse), ("one", "two"), ["chinchilla"], resamples=200)
    r = result.laws[0]
    assert r.point is None
    assert r.probability_none > 0.9
    assert r.interval[1] is None
    assert "one has the lower loss throughout" in result.conclusion
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
    result = cross(frames, ("MatMul-free", "Transformer++"), ["line", "power-floor"], resamples=60)
    assert min(r.point for r in result.laws) < result.data[1]
    assert "the earliest fitted crossing lies within the data" in result.conclusion
    assert "or more beyond" not in result.conclusion
