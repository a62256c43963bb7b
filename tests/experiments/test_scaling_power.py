"""Powers between columns: other solvers, exact intervals, best values found in what was tried."""

import json

import numpy as np
import pytest
from scipy.stats import linregress, t

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.fit_power import fit_power as command
from mmfree_jax.experiments.cli.predict import predict
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.output_files import write_csv
from mmfree_jax.experiments.scaling.power_relation import best_of, fit_power

SIZES, TOKENS = (a.ravel() for a in np.meshgrid(10.0 ** np.arange(6, 10), 10.0 ** np.arange(9, 12)))


def test_one_power_is_scipys_regression():
    """N* ~ C^a from given optima."""
    c = 10.0 ** np.linspace(17, 22, 7)
    n = 0.3 * c**0.47 * np.exp(0.05 * np.random.default_rng(0).standard_normal(7))
    got = fit_power({"N": n, "C": c}, "N", ["C"], level=0.9)
    other = linregress(np.log(c), np.log(n))
    half = t.ppf(0.95, 5) * other.stderr
    assert got.exponents["C"] == pytest.approx(other.slope, rel=1e-10)
    assert got.intervals["C"] == pytest.approx((other.slope - half, other.slope + half), rel=1e-9)
    assert got.coefficients[0] == pytest.approx(other.intercept, rel=1e-9)
    # At x far out: the textbook's standard errors of the line and of one more point.
    x, far = np.log(c), np.log(1e24)
    s = np.sqrt(((np.log(n) - other.intercept - other.slope * x) ** 2).sum() / 5)
    leverage = 1 / 7 + (far - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    middle = other.intercept + other.slope * far
    at = got.at({"C": 1e24})
    assert np.log(at.value) == pytest.approx(middle, rel=1e-9)
    for ends, width in ((at.interval, leverage), (at.further, 1 + leverage)):
        half = t.ppf(0.95, 5) * s * np.sqrt(width)
        assert np.log(ends) == pytest.approx([middle - half, middle + half], rel=1e-9)


def test_two_powers_recover_their_truth_and_cover_it():
    """lr ~ N^a D^b; Student's intervals of six rows hold the truth 95 times in a hundred."""
    rng = np.random.default_rng(1)
    truth = 30.0 * SIZES**-0.3 * TOKENS**-0.1
    exact = fit_power({"lr": truth, "N": SIZES, "D": TOKENS}, "lr", ["N", "D"])
    assert exact.exponents == pytest.approx({"N": -0.3, "D": -0.1})
    assert np.exp(exact.coefficients[0]) == pytest.approx(30.0)
    some = np.array([0, 3, 4, 7, 8, 11])
    inside = 0
    for _ in range(600):
        columns = {"N": SIZES[some], "D": TOKENS[some],
                   "lr": truth[some] * np.exp(0.2 * rng.standard_normal(6))}  # fmt: skip
        low, high = fit_power(columns, "lr", ["N", "D"]).intervals["N"]
        inside += low < -0.3 < high
    assert 0.93 < inside / 600 < 0.97


def tried(sizes, edge=()):
    """Losses of seven rates at every size, with the least one at 0.5 N^-0.4."""
    n = np.repeat(sizes, 7)
    best = 0.5 * n**-0.4
    rate = best * np.tile(2.0 ** np.arange(-3, 4), len(sizes))
    rate = np.where(np.isin(n, edge), rate * 16, rate)
    return {"N": n, "lr": rate, "loss": 3 + 0.02 * np.log(rate / best) ** 2}


def test_best_values_are_found_and_edges_named():
    sizes = [1e6, 1e7, 1e8, 1e9]
    columns, warnings = best_of(tried(sizes, edge=[1e8]), "lr", ["N"], "loss")
    np.testing.assert_array_equal(columns["N"], [1e6, 1e7, 1e9])
    np.testing.assert_allclose(columns["lr"], 0.5 * columns["N"] ** -0.4, rtol=1e-9)
    assert warnings == ["N 1e+08: no best lr, since the lowest loss is at an edge of what was "
                        "tried; left out"]  # fmt: skip
    with pytest.raises(ScalingError, match="none of 1 combinations of N has a best lr"):
        best_of(tried([1e8], edge=[1e8]), "lr", ["N"], "loss")


def test_what_rows_cannot_tell_is_said():
    two = fit_power({"y": np.array([1.0, 2]), "x": np.array([1.0, 3])}, "y", ["x"])
    assert two.intervals == {}
    assert two.at({"x": 3.0}).interval is None
    assert "passes through every one" in two.warnings[0]
    x = np.array([1.0, 2, 4, 8])
    with pytest.raises(ScalingError, match="'a' does not vary apart from the others"):
        fit_power({"y": x, "a": x, "b": x**2}, "y", ["a", "b"])
    with pytest.raises(ScalingError, match="'a' does not vary, so it has no exponent"):
        fit_power({"y": x, "a": np.ones(4)}, "y", ["a"])
    with pytest.raises(ScalingError, match="rows: 1 cannot determine the 2 coefficients"):
        fit_power({"y": x[:1], "a": x[:1]}, "y", ["a"])
    near = x**2 * np.array([1, 1.01, 0.99, 1])
    notes = fit_power({"y": x, "a": x, "b": near}, "y", ["a", "b"]).warnings
    assert "their exponents can hardly be told apart" in " ".join(notes)


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tried([1e6, 1e7, 1e8, 1e9])
    rng = np.random.default_rng(3)
    rows = [{"family": "a", "N": n, "lr": r, "loss": loss + 1e-4 * rng.standard_normal()}
            for n, r, loss in zip(*data.values(), strict=True)]  # fmt: skip
    write_csv(tmp_path / "x.csv", rows)
    argv = ["x.csv", "--y", "lr", "--x", "N", "--best", "loss"]
    assert command([*argv, "--at", "1e10", "--out", "p.json"]) == 0
    document = json.loads((tmp_path / "p.json").read_text())
    low, high = document["intervals"]["N"]
    assert low < document["parameters"]["N"] < high
    assert document["parameters"]["N"] == pytest.approx(-0.4, abs=0.01)
    assert document["estimate"]["value"] == pytest.approx(0.5 * 1e10**-0.4, rel=0.05)
    assert document["n"] == 4
    text = capsys.readouterr().out
    assert "lr = k N^a  (columns as the file counts them)" in text
    assert "  at N 1e+10: lr " in text
    assert (tmp_path / "p.png").exists()
    assert command([*argv, "--out", "p.json", "--no-plot"]) == 0  # replaces its own
    with pytest.raises(MMFreeError, match="is a power between columns"):
        predict(["p.json", "--params", "1e8", "--tokens", "1e10"])
    write_csv(tmp_path / "two.csv", [*rows, {**rows[0], "family": "b"}])
    write_csv(tmp_path / "bad.csv", [*rows, {**rows[0], "N": -1}])
    for argv, told in (
        (["no.csv", "--y", "lr", "--x", "N"], "no.csv: does not exist"),
        ([".", "--y", "lr", "--x", "N"], "is a directory; give a CSV"),
        (["x.csv", "--y", "rate", "--x", "N"], "has no column 'rate'; found 'family', 'N', 'lr'"),
        (["x.csv", "--y", "lr", "--x", "lr"], "a column is named twice"),
        (["x.csv", "--y", "lr", "--x", "N", "--at", "1", "2"], "2 values for 1 columns of x (N)"),
        (["two.csv", "--y", "lr", "--x", "N"], "2 families (a, b) by the column 'family'; choose"),
        (["bad.csv", "--y", "lr", "--x", "N"], "column 'N', row 30: -1 must be positive"),
    ):
        with pytest.raises(MMFreeError) as caught:
            command(argv)
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    assert command(["two.csv", "--y", "lr", "--x", "N", "--family", "none", "--no-plot"]) == 0
