"""Predictions against formulas and solvers written out here, on laws whose truth is known."""

from dataclasses import replace

import numpy as np
import pytest
from known_laws import FLOAT, GADRE, TERNARY, C, D, N, best, chinchilla, gadre, interval_of, law
from scipy.optimize import brentq, minimize_scalar

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.scaling.predict import Place, equal_loss, predict
from mmfree_jax.experiments.scaling.predict_report import warnings
from mmfree_jax.experiments.scaling.training_cost import TrainingCost


@pytest.mark.parametrize(
    ("name", "formula", "p"), [("chinchilla", chinchilla, FLOAT), ("gadre", gadre, GADRE)]
)
def test_loss_and_optimum_are_those_of_the_formula(name, formula, p):
    fitted = law(p, name=name)
    at = predict(fitted, Place(params=N, tokens=D))
    assert at.loss.value == pytest.approx(formula(p, N, D), rel=1e-12)
    losses = [formula(r, N, D) for r in fitted.resamples]
    assert at.loss.interval == pytest.approx(interval_of(at.loss.value, losses), rel=1e-12)
    assert at.optimum is None
    size, least = best(formula, p, C)
    optimal = predict(fitted, Place(compute=C))
    assert optimal.loss.value == pytest.approx(least, rel=1e-10)
    assert optimal.optimum.params.value == pytest.approx(size, rel=1e-4)
    assert optimal.optimum.tokens.value == pytest.approx(C / 6 / size, rel=1e-4)
    assert optimal.optimum.tokens_per_param.value == pytest.approx(C / 6 / size**2, rel=2e-4)
    few = law(p, name=name, refits=40)
    sizes = [best(formula, r, C)[0] for r in few.resamples]
    interval = predict(few, Place(compute=C), level=0.8).optimum.params.interval
    assert interval == pytest.approx(interval_of(size, sizes, 0.8), rel=1e-4)


def test_refits_of_a_law_on_its_bound_are_not_corrected():
    fitted = replace(law(FLOAT), on_bound=True)
    losses = [chinchilla(r, N, D) for r in fitted.resamples]
    at = predict(fitted, Place(params=N, tokens=D))
    assert at.loss.interval == pytest.approx(np.quantile(losses, [0.025, 0.975]), rel=1e-12)


def test_a_law_of_compute_alone_predicts_at_a_compute():
    fitted = law((1.5, 30.0, 0.08), name="power-floor")
    at = predict(fitted, Place(compute=C))
    assert at.loss.value == pytest.approx(1.5 + 30 / C**0.08, rel=1e-12)
    assert at.optimum is None
    with pytest.raises(MMFreeError, match=r"power-floor .* knows compute alone; give --flops"):
        predict(fitted, Place(params=N, tokens=D))


def test_laws_that_read_more_than_size_and_tokens():
    few = law((*FLOAT, 3.0), name="precision")
    at = predict(few, Place(params=N, tokens=D, bits=4.0))
    expected = chinchilla(FLOAT, N * (1 - np.exp(-4 / 3)), D)
    assert at.loss.value == pytest.approx(expected, rel=1e-12)
    tokens, _ = equal_loss(law(FLOAT), replace(few, source="two"),
                           Place(params=N, tokens=D, bits=4.0))  # fmt: skip
    target = chinchilla(FLOAT, N, D)
    needed = brentq(lambda d: chinchilla(FLOAT, N * (1 - np.exp(-4 / 3)), d) - target, D, 1e13)
    assert tokens.needed.value == pytest.approx(needed, rel=1e-8)
    # A corpus read five times, by a model no larger than it deserves: D' counts for D.
    repeated = law((*FLOAT, 15.0, 5.0), name="repeated")
    at = predict(repeated, Place(params=1e7, tokens=D, unique_tokens=D / 5))
    worth = D / 5 * (1 + 15 * (1 - np.exp(-4 / 15)))
    assert at.loss.value == pytest.approx(chinchilla(FLOAT, 1e7, worth), rel=1e-12)
    for fitted, flag in ((few, "bits: .* give --bits"), (repeated, "give --unique-tokens")):
        with pytest.raises(MMFreeError, match=flag):
            predict(fitted, Place(params=N, tokens=D))
    with pytest.raises(MMFreeError, match=r"precision .* has no best size for a compute"):
        predict(few, Place(compute=C, bits=4.0))
    with pytest.raises(MMFreeError, match="accuracy gives accuracy, not a loss"):
        predict(law((0.25, 0.9, 2.5, 0.2), name="accuracy"), Place(params=N, tokens=D))


def test_a_new_run_scatters_as_the_runs_do():
    """Exact parameters and residuals of 1%: mean times exp(-+1.96 x 0.01 sqrt(200 / 195))."""
    fitted = law(FLOAT, spread=0.0)
    at = predict(fitted, Place(params=N, tokens=D))
    mean = chinchilla(FLOAT, N, D)
    assert at.loss.interval == pytest.approx((mean, mean))
    half = 1.96 * np.std(fitted.log_residuals) * np.sqrt(200 / 195)
    assert np.log(np.array(at.new_run) / mean) == pytest.approx([-half, half], abs=0.004)
    few = replace(fitted, log_residuals=np.tile([-0.01, 0.01], 6))  # 12 runs, 5 parameters
    wide = np.log(np.array(predict(few, Place(params=N, tokens=D)).new_run) / mean)
    assert wide == pytest.approx(np.array([-0.01, 0.01]) * np.sqrt(12 / 7), rel=1e-9)
    none = replace(fitted, log_residuals=np.zeros(5))
    assert predict(none, Place(params=N, tokens=D)).new_run is None


def test_equal_loss_at_a_size_and_tokens():
    one, other = law(TERNARY, family="ternary"), law(FLOAT, family="float", seed=1)
    tokens, params = equal_loss(one, other, Place(params=N, tokens=D))
    target = chinchilla(TERNARY, N, D)
    needed = brentq(lambda d: chinchilla(FLOAT, N, d) - target, 1e6, D, xtol=1)
    assert (tokens.what, tokens.base) == ("tokens", D)
    assert tokens.needed.value == pytest.approx(needed, rel=1e-8)
    assert tokens.multiple.value == pytest.approx(needed / D, rel=1e-8)
    size = brentq(lambda n: chinchilla(FLOAT, n, D) - target, 1e6, N, xtol=1)
    assert params.needed.value == pytest.approx(size, rel=1e-8)
    ratios = [
        brentq(lambda n, p=p, q=q: chinchilla(p, n, D) - chinchilla(q, N, D), 1e4, 1e13) / N
        for p, q in zip(other.resamples, one.resamples, strict=True)
    ]
    assert params.multiple.interval == pytest.approx(interval_of(size / N, ratios), rel=1e-6)
    # By powers: with one floor and tokens alike, A_t N^-alpha + (B_t - B_f) D^-beta = A_f n^-alpha.
    left = 520 * N**-0.34 + 300 * D**-0.36
    assert size == pytest.approx((400 / left) ** (1 / 0.34), rel=1e-6)


def test_equal_loss_at_a_compute():
    one, other = law(FLOAT), law(TERNARY, family="ternary")
    (only,) = equal_loss(one, other, Place(compute=C))
    target = best(chinchilla, FLOAT, C)[1]
    needed = brentq(lambda x: best(chinchilla, TERNARY, 10**x)[1] - target, 20, 26)
    assert only.what == "compute"
    assert np.log10(only.needed.value) == pytest.approx(needed, abs=1e-6)
    assert only.multiple.interval[0] < 10**needed / C < only.multiple.interval[1]


def test_a_loss_that_no_amount_reaches():
    """A floor above the target: infinite, and so in every refit; half of them with a near one."""
    high = law((3.0, *FLOAT[1:]), family="high", spread=0.0)
    tokens, params = equal_loss(law(FLOAT, spread=0.0), high, Place(params=N, tokens=D))
    assert np.isinf(tokens.needed.value)
    assert np.isinf(params.needed.value)
    assert tokens.needed.never == 1
    assert tokens.needed.interval == (None, None)
    target = chinchilla(FLOAT, N, D)
    floors = np.where(np.arange(400) < 100, target, 1.7)
    half = law(FLOAT, family="half", source="two", spread=0.0)
    half.resamples[:, 0] = floors
    tokens, _ = equal_loss(law(FLOAT, spread=0.0), half, Place(params=N, tokens=D))
    assert tokens.needed.never == 0.25
    assert tokens.needed.interval[0] == pytest.approx(D, rel=1e-9)
    assert tokens.needed.interval[1] is None
    assert tokens.multiple.interval[1] is None


def test_a_family_equals_itself_exactly_where_its_refits_belong_together():
    one, same = law(FLOAT), law(FLOAT, family="same")
    tokens, params = equal_loss(one, same, Place(params=N, tokens=D))
    assert tokens.multiple.interval == pytest.approx((1, 1), abs=1e-9)
    apart = equal_loss(one, law(FLOAT, family="same", source="two"), Place(params=N, tokens=D))
    low, high = apart[1].multiple.interval
    assert low < 0.9 < 1.1 < high
    assert params.multiple.value == pytest.approx(1, abs=1e-9)


def test_refits_without_an_optimum_are_counted():
    fitted = law(FLOAT)
    fitted.resamples[:100, 3] = -0.1
    optimal = predict(fitted, Place(compute=C))
    assert optimal.optimum.params.undefined == 0.25
    assert optimal.loss.undefined == 0.25
    assert all(np.isfinite(optimal.optimum.params.interval))


def test_what_lies_beyond_the_runs_is_told_by_decades():
    inside = predict(law(FLOAT), Place(params=5e8, tokens=1e11))
    assert inside.beyond == {}
    outside = predict(law(FLOAT), Place(params=1e10, tokens=1e8)).beyond
    assert outside == pytest.approx({"params": 1, "tokens": -1, "tokens_per_param": -2})
    assert predict(law(FLOAT), Place(compute=6e22)).beyond["6nd"] == pytest.approx(2)


def test_flops_that_are_not_six_n_d_are_told():
    fitted = law(FLOAT)
    assert warnings([predict(fitted, Place(compute=6e19))]) == []
    fitted.ranges["flops_per_6nd"] = (1.02, 1.5)
    said = "float: C is taken to be 6 N D, but the runs' FLOPs are 1.02 to 1.5 times that"
    assert warnings([predict(fitted, Place(compute=6e19))]) == [said]
    assert warnings([predict(fitted, Place(params=5e8, tokens=1e11))]) == []


def test_a_compute_is_shared_out_at_the_flops_of_the_runs():
    """FLOPs a token of 6 N (1 + 300 / N^0.4): the least loss by search over N."""
    cost = TrainingCost(300.0, 0.4, 0.001)
    found = minimize_scalar(
        lambda x: chinchilla(FLOAT, np.exp(x), C / 6 / np.exp(x) / (1 + 300 * np.exp(-0.4 * x))),
        bounds=(np.log(1e6), np.log(1e13)), method="bounded", options={"xatol": 1e-10},
    )  # fmt: skip
    at = predict(replace(law(FLOAT), cost=cost), Place(compute=C))
    assert at.optimum.params.value == pytest.approx(np.exp(found.x), rel=1e-5)
    assert at.loss.value == pytest.approx(found.fun, rel=1e-9)
    assert "C is 6 N D (1 + 300 / N^0.4), from the fitted runs (within 0.1%)" in warnings([at])[-1]


def test_families_that_count_otherwise_are_not_compared():
    other = law(FLOAT, family="other")
    other.conventions["params"] = "non-embedding"
    with pytest.raises(MMFreeError, match="float counts params as total, other as non-embedding"):
        equal_loss(law(FLOAT), other, Place(params=N, tokens=D))


# --- files and the command ---
