"""Precision, repeated data and task accuracy: published numbers, other solvers, refusals."""

import json

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize_scalar
from synthetic_runs import isoflop_design

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.fit import fit
from mmfree_jax.experiments.cli.predict import predict
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.output_files import write_csv
from mmfree_jax.experiments.scaling.precision_law import effective_params
from mmfree_jax.experiments.scaling.repetition_law import effective_count

MUENNIGHOFF = np.array([
    np.exp(0.6254804), np.exp(6.255414), np.exp(7.3049974), 0.3526596, 0.3526596, 15.387756,
    5.309743,
])  # fmt: skip
"""E, A, B, alpha, beta, R*_D, R*_N as their repository's README has them
(github.com/huggingface/datablations, section Parametric Fit), the values below as well."""


def test_published_losses_of_repeated_data():
    x = {"params": np.array([6.34e9, 8.67e9]), "tokens": np.array([242e9, 178e9]),
         "unique_tokens": np.full(2, 25e9)}  # fmt: skip
    got = LAWS["repeated"].loss(MUENNIGHOFF, x)
    np.testing.assert_allclose(got, [2.2256440889984477, 2.2269634075087867], rtol=1e-12)


def test_published_allocation_of_repeated_data():
    """At the compute of 8.67B parameters on 178B tokens, 25B of them unique: 6.8B on 227B."""

    def loss(log_tokens):
        tokens = np.exp(log_tokens)
        x = {"params": np.array([8.67e9 * 178e9 / tokens]), "tokens": np.array([tokens]),
             "unique_tokens": np.array([25e9])}  # fmt: skip
        return float(LAWS["repeated"].loss(MUENNIGHOFF, x)[0])

    tokens = float(np.exp(minimize_scalar(loss, bounds=np.log([30e9, 600e9]), method="bounded").x))
    assert tokens / 1e9 == pytest.approx(227, abs=1)
    assert tokens / 25e9 == pytest.approx(9.1, abs=0.05)
    assert 8.67 * 178 / (tokens / 1e9) == pytest.approx(6.8, abs=0.05)


def test_effective_counts():
    one = np.array([1.0])
    assert effective_params(one, np.array([3.0]), np.array([3.0]))[0] == pytest.approx(
        1 - np.exp(-1)
    )
    assert effective_params(one, np.array([300.0]), np.array([3.0]))[0] == 1
    # 4 passes with R* = 15.39 are worth 3.73 of fresh data, 16 passes 10.6.
    got = effective_count(np.array([0.5, 1, 4, 16]), one, np.array([15.387756]))
    np.testing.assert_allclose(got, [0.5, 1, 3.7257, 10.582], rtol=1e-4)


def runs(name, truth, noise=0.003, seed=5):
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 21, 5), 10)
    rng = np.random.default_rng(seed)
    x = {"params": params, "tokens": tokens}
    if name == "precision":
        x["bits"] = np.resize([1.58, 3.0, 4.0, 6.0, 8.0, 16.0, 2.0], len(params))
    else:
        x["unique_tokens"] = tokens / np.resize(
            [0.5, 1.0, 3.0, 10.0, 30.0, 100.0, 2.0], len(params)
        )
    loss = LAWS[name].loss(np.array(truth), x) * np.exp(noise * rng.standard_normal(len(params)))
    return x, loss


@pytest.mark.parametrize(
    ("name", "truth", "within"),
    [
        ("precision", (1.7, 400.0, 1500.0, 0.34, 0.36, 2.5), (0.05, 1, 1, 0.1, 0.1, 0.05)),
        ("repeated", tuple(MUENNIGHOFF), (0.05, 1, 1, 0.1, 0.1, 0.2, 0.3)),
    ],
)
def test_the_optimum_is_another_solvers(name, truth, within):
    x, loss = runs(name, truth)
    frame = make_frame(**x, loss=loss)
    law = LAWS[name]
    got = fit_law(frame, name, Objective("log-lsq"), resamples=0, profile=False, holdout=False)

    def residual(q):
        with np.errstate(all="ignore"):
            value = np.log(law.loss(np.exp(q), x)) - np.log(loss)
        return np.where(np.isfinite(value), value, 1e3)

    starts = np.log(truth) + 0.2 * np.random.default_rng(1).standard_normal((6, len(truth)))
    ends = [least_squares(residual, s, x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15,
                          max_nfev=400) for s in starts]  # fmt: skip
    best = min(ends, key=lambda end: end.cost)
    assert got.search.objective <= 2 * best.cost * (1 + 1e-9)
    np.testing.assert_allclose(got.vector(), np.exp(best.x), rtol=1e-3)
    for value, true, tolerance in zip(got.vector(), truth, within, strict=True):
        assert value == pytest.approx(true, rel=tolerance)


def test_huber_has_no_lower_point_nearby():
    from scipy.special import huber

    x, loss = runs("precision", (1.7, 400.0, 1500.0, 0.34, 0.36, 2.5), noise=0.01)
    got = fit_law(make_frame(**x, loss=loss), "precision", resamples=0, profile=False,
                  holdout=False)  # fmt: skip

    def objective(q):
        return huber(1e-3, np.log(LAWS["precision"].loss(np.exp(q), x) / loss)).sum()

    best = np.log(got.vector())
    assert got.search.objective == pytest.approx(objective(best), rel=1e-9)
    steps = np.random.default_rng(0).standard_normal((300, 6))
    for size in (1e-5, 1e-3, 1e-1):
        assert min(objective(best + size * s) for s in steps) > got.search.objective


def accuracies(noise=0.0):
    loss = np.linspace(2.0, 3.6, 30)
    truth = np.array([0.82, 2.7, 0.15])
    chance = np.full(30, 0.25)
    value = 0.25 + 0.57 / (1 + np.exp((loss - 2.7) / 0.15))
    value = value + noise * np.random.default_rng(2).standard_normal(30)
    return truth, loss, chance, value


def test_accuracy_is_another_solvers_and_recovers_its_truth():
    truth, loss, chance, value = accuracies(0.01)
    frame = make_frame(loss=loss, accuracy=value, chance=chance)
    got = fit_law(frame, "accuracy", resamples=300, holdout=False)

    def residual(q):
        return 0.25 + (q[0] - 0.25) / (1 + np.exp((loss - q[1]) / q[2])) - value

    other = least_squares(residual, truth, xtol=1e-15, ftol=1e-15, gtol=1e-15)
    np.testing.assert_allclose(got.vector(), other.x, rtol=1e-6)
    for name, true in zip(("ceiling", "L_half", "width"), truth, strict=True):
        low, high = got.intervals[name]
        assert low < true < high


def test_accuracy_on_the_command_line(tmp_path, capsys):
    _, loss, _, value = accuracies(0.005)
    rows = [{"loss": a, "acc": b} for a, b in zip(loss, value, strict=True)]
    write_csv(tmp_path / "x.csv", rows)
    out = tmp_path / "fit.json"
    argv = [str(tmp_path / "x.csv"), "--law", "accuracy", "--bootstrap", "60", "--out", str(out)]
    with pytest.raises(MMFreeError, match=r"'chance' is missing .* with --chance"):
        fit(argv)
    assert fit([*argv, "--chance", "0.25"]) == 0
    assert json.loads(out.read_text())["parameters"]["ceiling"] == pytest.approx(0.82, abs=0.02)
    assert out.with_suffix(".png").exists()
    assert "(L_fit - L)^2, L the accuracy, n = 30" in capsys.readouterr().out
    with pytest.raises(MMFreeError, match="the law accuracy gives accuracy, not a loss"):
        predict([str(out), "--params", "1e8", "--tokens", "1e10"])
    write_csv(tmp_path / "x.csv", [{**row, "acc": 100 * row["acc"]} for row in rows])
    with pytest.raises(MMFreeError, match=r"in x\.csv, row 2; write a share from 0 to 1"):
        fit([*argv, "--chance", "0.25"])


def test_what_the_data_cannot_tell_is_said():
    x, loss = runs("precision", (1.7, 400.0, 1500.0, 0.34, 0.36, 2.5))
    quick = {"resamples": 0, "profile": False, "holdout": False, "restarts": 0}
    x["bits"] = np.full(len(loss), 4.0)
    warnings = fit_law(make_frame(**x, loss=loss), "precision", **quick).warnings
    assert "all runs have the same bits: gamma cannot be told from A" in warnings
    with pytest.raises(MMFreeError, match=r"'bits' is missing .*--columns\.bits"):
        fit_law(make_frame(params=x["params"], tokens=x["tokens"], loss=loss), "precision", **quick)
    x, loss = runs("repeated", tuple(MUENNIGHOFF))
    x["unique_tokens"] = x["tokens"]
    warnings = " ".join(fit_law(make_frame(**x, loss=loss), "repeated", **quick).warnings)
    assert "no run sees its data more than 1 times: R_D is set by the noise" in warnings
