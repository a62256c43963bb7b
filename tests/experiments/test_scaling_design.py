"""Designs by Fisher information: what they promise is what refits of simulated runs show."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import least_squares
from synthetic_runs import draw_runs

from mmfree_jax.experiments.scaling.descent import refit
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.information import (
    AssumedLaws,
    crossing_of,
    gap_at,
    loss_at,
    of_family,
    variance_factor,
)
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.optimal_design import (
    Candidates,
    Limits,
    best_design,
    criterion_of,
)

LAW = get_law("chinchilla")
TRUTH = np.array([[1.75, 420.0, 1900.0, 0.34, 0.36], [1.75, 300.0, 2300.0, 0.32, 0.37]])
APART = AssumedLaws(("a", "b"), TRUTH)
SHARED = AssumedLaws(("a", "b"), TRUTH, shares_floor=True)
ALONE = AssumedLaws(("a",), TRUTH[:1])
NOISE = 0.005


def coordinates(laws):
    """Of the assumed laws, written out: log E, log A, log B, alpha, beta; E once if shared."""
    own = [[math.log(e), math.log(a), math.log(b), alpha, beta]
           for e, a, b, alpha, beta in laws.parameters.tolist()]  # fmt: skip
    if not laws.shares_floor:
        return np.concatenate(own)
    return np.array([own[0][0], *own[0][1:], *own[1][1:]])


def laws_at(laws, point):
    """The laws at other coordinates."""
    if laws.shares_floor:
        own = [[point[0], *point[1:5]], [point[0], *point[5:9]]]
    else:
        own = np.reshape(point, (-1, 5)).tolist()
    values = [[*np.exp(p[:3]), *p[3:]] for p in own]
    return AssumedLaws(laws.families, np.array(values), laws.shares_floor)


@pytest.mark.parametrize("laws", [APART, SHARED])
@pytest.mark.parametrize(
    "function",
    [
        lambda laws: of_family(laws, "alpha", "b"),
        lambda laws: of_family(laws, "beta", "a"),
        lambda laws: of_family(laws, "a", "b"),
        lambda laws: of_family(laws, "floor", "b"),
        lambda laws: loss_at(laws, "a", 3e20),
        lambda laws: gap_at(laws, 3e20),
        crossing_of,
    ],
)
def test_gradients_are_those_of_the_values(laws, function):
    at, h = coordinates(laws), 1e-6
    found = function(laws)
    for j, derivative in enumerate(found.gradient):
        step = h * (np.arange(len(at)) == j)
        up, down = (function(laws_at(laws, at + s)).value for s in (step, -step))
        assert derivative == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-7)


def test_the_quantities_are_those_of_the_formula():
    """Against a search over N, which knows nothing of closed forms."""
    e, a, b, alpha, beta = TRUTH[0]
    n = np.geomspace(1e6, 1e13, 200_001)
    by_search = min(e + a * n**-alpha + b * (3e20 / 6 / n) ** -beta)
    assert loss_at(ALONE, "a", 3e20).value == pytest.approx(by_search, rel=1e-9)
    assert of_family(ALONE, "a", "a").value == pytest.approx(0.36 / 0.70)
    crossing = crossing_of(APART).value
    assert gap_at(APART, 10**crossing).value == pytest.approx(0, abs=1e-12)
    assert gap_at(APART, 10 ** (crossing - 0.5)).value * gap_at(APART, 1e30).value < 0


def grid(budget):
    """Sizes and tokens of candidates within a budget (6 N D)."""
    n, d = np.meshgrid(np.geomspace(1e6, 3e8, 16), np.geomspace(3e6, 1e10, 24), indexing="ij")
    inside = (d / n >= 1) & (d / n <= 300) & (6 * n * d <= budget)
    return n[inside], d[inside]


def as_candidates(laws, n, d, noise=NOISE):
    """Every cell for every family."""
    rows = np.stack([laws.gradient(f, n, d) for f in laws.families], axis=1) / noise
    families = len(laws.families)
    return Candidates(rows, families * 6 * n * d, np.full(len(n), families))


@pytest.fixture(scope="module")
def design():
    """For a of N* ~ C^a: 24 runs within 1e18 FLOPs."""
    n, d = grid(1e18)
    found = best_design(as_candidates(ALONE, n, d), of_family(ALONE, "a", "a").gradient,
                        Limits(1e18, 24))  # fmt: skip
    taken = found.counts > 0
    return found, n[taken], d[taken]


def test_a_design_keeps_to_its_limits_and_near_its_bound(design):
    found, n, d = design
    assert set(found.counts) == {0.0, 1.0}
    assert len(n) <= 24
    assert 0.9e18 < np.sum(6 * n * d) <= 1e18
    assert 0.95 < found.bound / found.criterion <= 1


@pytest.mark.parametrize("kind", ["log-lsq", "huber"])
def test_the_standard_error_is_that_of_refits(design, kind):
    """400 data sets; their spread is known to 3.5%: 8% are allowed."""
    found, n, d = design
    objective = Objective(kind)
    frame = draw_runs("chinchilla", dict(zip(LAW.parameters, TRUTH[0], strict=True)), n, d)
    model = LAW.build({"params": n, "tokens": d})
    start = model.from_parameters(TRUTH[:1])
    noise = NOISE * np.random.default_rng(0).standard_normal((400, len(n)))
    points, _ = refit(model, objective, np.log(frame.loss) + noise, np.ones_like(noise), start,
                      scale=NOISE)  # fmt: skip
    *_, alpha, beta = model.to_parameters(points).T
    promised = math.sqrt(found.criterion * variance_factor(objective, NOISE))
    assert np.std(beta / (alpha + beta)) == pytest.approx(promised, rel=0.08)


def test_a_shared_floor_promises_what_joint_refits_show():
    n, d = grid(1e18)
    candidates = as_candidates(SHARED, n, d)
    wanted = gap_at(SHARED, 1e21)
    found = best_design(candidates, wanted.gradient, Limits(2e18, 40))
    taken = found.counts > 0
    n, d = n[taken], d[taken]
    rng, at = np.random.default_rng(1), coordinates(SHARED)

    def log_loss(point):
        own = laws_at(SHARED, point)
        return np.log([LAW.loss(own.of(f), {"params": n, "tokens": d}) for f in "ab"]).ravel()

    def slope(point):
        own = laws_at(SHARED, point)
        return np.concatenate([own.gradient(f, n, d) for f in "ab"])

    truth, gaps = log_loss(at), []
    for _ in range(150):
        data = truth + NOISE * rng.standard_normal(len(truth))
        fit = least_squares(
            lambda p, y=data: log_loss(p) - y, at, lambda p: slope(p), x_scale="jac"
        )
        gaps.append(gap_at(laws_at(SHARED, fit.x), 1e21).value)
    assert np.std(gaps) == pytest.approx(math.sqrt(found.criterion), rel=0.2)
    apart = as_candidates(APART, n, d).information(np.ones(len(n)))
    worse = criterion_of(apart, gap_at(APART, 1e21).gradient)
    assert worse > 4 * found.criterion  # a floor of each family's own costs that much


def test_a_design_beats_an_even_grid_of_its_budget(design):
    """18 to 24 runs, evenly spaced in log N and log D / N, as large as the budget allows."""
    found, *_ = design
    gradient, even = of_family(ALONE, "a", "a").gradient, []
    for sizes, ratios in ((6, 4), (4, 6), (6, 3), (4, 5)):
        for largest in np.geomspace(4e6, 3e8, 40):
            n, r = np.meshgrid(np.geomspace(1e6, largest, sizes), np.geomspace(1, 300, ratios))
            n, d = n.ravel(), (n * r).ravel()
            if np.sum(6 * n * d) <= 1e18:
                runs = as_candidates(ALONE, n, d)
                even.append(criterion_of(runs.information(np.ones(len(n))), gradient))
    assert 2 * found.criterion < min(even)


@pytest.mark.parametrize("gradient", [of_family(ALONE, "alpha", "a").gradient, None])
def test_no_set_is_better_than_the_bound_and_few_than_the_design(gradient):
    """All sets of 7 among 13 candidates, one by one."""
    rng = np.random.default_rng(3)
    n, d = grid(1e17)
    some = rng.choice(len(n), 13, replace=False)
    candidates = as_candidates(ALONE, n[some], d[some])
    budget = float(np.sort(candidates.cost)[:9].sum())
    every = []
    for chosen in combinations(range(13), 7):
        counts = np.isin(np.arange(13), chosen).astype(float)
        if counts @ candidates.cost <= budget:
            every.append(criterion_of(candidates.information(counts), gradient))
    found = best_design(candidates, gradient, Limits(budget, 7))
    assert found.bound <= min(every) * (1 + 1e-9)
    assert found.criterion <= min(every) * 1.001


def test_cells_are_repeated_where_that_is_allowed():
    n, d = grid(1e17)
    candidates = as_candidates(ALONE, n, d)
    wanted = of_family(ALONE, "a", "a").gradient
    once, thrice = (best_design(candidates, wanted, Limits(1e17, 20, k)) for k in (1, 3))
    assert max(thrice.counts) == 3
    assert thrice.criterion < once.criterion


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: gap_at(ALONE, 1e20), "between two families"),
        (lambda: crossing_of(AssumedLaws(("a", "b"), TRUTH[[0, 0]])), "cross 0 times"),
        (lambda: AssumedLaws(("a",), np.array([[1.7, 400, -1, 0.3, 0.3]])), "B of a is -1"),
        (lambda: AssumedLaws(("a", "b"), TRUTH + np.array([[0.1], [0]]), True), "assume one floor"),
        (lambda: variance_factor(Objective("lsq"), 0.1), "not of log loss"),
        (lambda: best_design(as_candidates(ALONE, *grid(1e17)), None, Limits(1e17, 3)),
         "3 runs of 1e[+]17 FLOPs leave parameters open"),
        (lambda: best_design(as_candidates(ALONE, np.full(9, 1e7), np.geomspace(1e7, 1e9, 9)),
                             None, Limits(1e19, 9)), "do not determine every parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_designed_is_named(act, message):
    with pytest.raises(ScalingError, match=message) as caught:
        act()
    assert "\n" not in str(caught.value)
