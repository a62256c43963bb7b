"""Predictions against formulas and solvers written out here, on laws whose truth is known."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.cli.main import main
from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.fit import fit
from mmfree_jax.experiments.cli.predict import predict as command
from mmfree_jax.experiments.scaling import fit_law, read_runs
from mmfree_jax.experiments.scaling.fitted_law import FittedLaw, fitted_law, read_fits
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.output_files import write_csv, write_json
from mmfree_jax.experiments.scaling.predict import Place, equal_loss, predict
from mmfree_jax.experiments.scaling.predict_report import warnings
from mmfree_jax.experiments.scaling.report import fit_document
from mmfree_jax.experiments.scaling.training_cost import TrainingCost

FLOAT = (1.7, 400.0, 1500.0, 0.34, 0.36)
TERNARY = (1.7, 520.0, 1800.0, 0.34, 0.36)
GADRE = (1.8, 900.0, 3000.0, 0.18)
N, D, C = 2e9, 5e10, 3e21


def chinchilla(p, n, d):
    e, a, b, alpha, beta = p
    return e + a / n**alpha + b / d**beta


def gadre(p, n, d):
    e, a, b, eta = p
    return e + (a * (d / n) ** eta + b * (n / d) ** eta) / (6 * n * d) ** eta


def best(formula, p, c):
    """Size and loss of least loss at C = 6 N D, by search."""
    found = minimize_scalar(lambda x: formula(p, np.exp(x), c / 6 / np.exp(x)),
                            bounds=(np.log(1e5), np.log(1e15)), method="bounded",
                            options={"xatol": 1e-10})  # fmt: skip
    return np.exp(found.x), found.fun


def interval_of(value, refits, level=0.95):
    """Efron's bias-corrected percentiles."""
    z = np.clip(norm.ppf(np.mean(np.array(refits) < value)), -0.75, 0.75)
    return np.quantile(refits, norm.cdf(2 * z + norm.ppf([(1 - level) / 2, (1 + level) / 2])))


def law(p, *, name="chinchilla", source="one", family="float", refits=400, spread=0.01, seed=0):
    """A fitted law at known parameters, its refits scattered around them."""
    rng = np.random.default_rng(seed)
    p = np.array(p)
    scattered = p * np.exp(spread * rng.standard_normal((refits, len(p))))
    return FittedLaw(
        family=family, source=source, law=LAWS[name], parameters=p, resamples=scattered,
        log_residuals=0.01 * rng.standard_normal(200),
        ranges={"params": (1e8, 1e9), "tokens": (1e9, 1e11), "6nd": (6e17, 6e20),
                "tokens_per_param": (1.0, 1000.0)},
        conventions={"params": "total", "flops": "6nd"},
        definitions={"N": "all parameters", "C": "6 N D"}, level=0.95,
    )  # fmt: skip


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


def test_laws_with_further_columns_come_back_from_their_files(fits, tmp_path):
    document = json.loads((fits[0] / "fit.json").read_text())
    names = LAWS["precision"].parameters
    document |= {"law": "precision", "parameters": dict.fromkeys(names, 0.5)}
    document["for_predictions"]["resamples"] = dict.fromkeys(names, "0.5")
    (tmp_path / "fit.json").write_text(json.dumps(document))
    (read,) = read_fits(tmp_path)
    assert read.law.also == ("bits",)


def test_families_that_count_otherwise_are_not_compared():
    other = law(FLOAT, family="other")
    other.conventions["params"] = "non-embedding"
    with pytest.raises(MMFreeError, match="float counts params as total, other as non-embedding"):
        equal_loss(law(FLOAT), other, Place(params=N, tokens=D))


# --- files and the command ---


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    """A single fit and a joint one, by their commands, with the table and the fit in memory."""
    folder = tmp_path_factory.mktemp("fits")
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(18, 21, 5), 5)
    rows = []
    for seed, (name, p) in enumerate((("float", GADRE), ("ternary", (1.8, 1100.0, 3300.0, 0.18)))):
        truth = dict(zip(("E", "a", "b", "eta"), p, strict=True))
        frame = draw_runs("gadre", truth, params, tokens, noise=0.003, seed=seed + 4)
        for n, d, loss in zip(frame.params, frame.tokens, frame.loss, strict=True):
            rows.append({"family": name, "params": n, "tokens": d, "loss": loss})
    write_csv(folder / "runs.csv", rows)
    single = fit_law(read_runs([folder / "runs.csv"], where=["family = float"]), "gadre",
                     resamples=200, profile=False, holdout=False)  # fmt: skip
    write_json(folder / "fit.json", fit_document(single))
    assert fit([str(folder / "runs.csv"), "--joint", "--law", "gadre", "--bootstrap", "100",
                "--no-plot", "--out", str(folder / "joint.json")]) == 0  # fmt: skip
    return folder, single


def test_a_fit_comes_back_from_its_file(fits):
    folder, single = fits
    (read,) = read_fits(folder / "fit.json")
    (same,) = read_fits(folder)
    kept = fitted_law(single)
    assert (read.family, read.law.name, read.level) == ("float", "gadre", 0.95)
    assert same.source == read.source
    np.testing.assert_array_equal(read.parameters, list(single.parameters.values()))
    np.testing.assert_allclose(read.resamples, single.bootstrap.parameters, rtol=1e-8)
    np.testing.assert_allclose(read.log_residuals, kept.log_residuals, rtol=1e-8)
    assert {k: pytest.approx(v) for k, v in kept.ranges.items()} == read.ranges
    place = Place(params=N, tokens=D)
    assert predict(read, place).loss.interval == pytest.approx(predict(kept, place).loss.interval)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95% intervals of 12 fits: at least 10 of them, inside the runs and beyond."""
    truth = dict(zip(("E", "a", "b", "eta"), GADRE, strict=True))
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(18, 21, 5), 5)
    held = []
    for seed in range(12):
        frame = draw_runs("gadre", truth, params, tokens, noise=0.003, seed=seed)
        fitted = fitted_law(fit_law(frame, "gadre", resamples=100, profile=False, holdout=False,
                                    restarts=16))  # fmt: skip
        new = np.exp(0.003 * np.random.default_rng(seed).standard_normal())
        found = []
        for n, d in ((3e8, 6e9), (5e9, 1e12)):
            at, loss = predict(fitted, Place(params=n, tokens=d)), gadre(GADRE, n, d)
            found += [(at.loss.interval, loss), (at.new_run, loss * new)]
        size, least = best(gadre, GADRE, C)
        at = predict(fitted, Place(compute=C))
        found += [(at.optimum.params.interval, size), (at.loss.interval, least)]
        held.append([low < value < high for (low, high), value in found])
    assert np.sum(held, axis=0).min() >= 10, np.sum(held, axis=0)


def test_joint_fits_are_compared_row_by_row(fits):
    float_, ternary = read_fits(fits[0] / "joint.json")
    assert (float_.family, ternary.family) == ("float", "ternary")
    assert float_.source == ternary.source
    np.testing.assert_array_equal(float_.resamples[:, 0], ternary.resamples[:, 0])  # E is shared
    _, params = equal_loss(ternary, float_, Place(params=N, tokens=D))
    truth = brentq(lambda n: gadre(GADRE, n, D) - gadre((1.8, 1100.0, 3300.0, 0.18), N, D), 1e6, N)
    low, high = params.multiple.interval
    assert low < truth / N < high
    assert high - low < 0.1


def test_the_command_prints_and_writes(fits, capsys, tmp_path):
    joint, out = str(fits[0] / "joint.json"), tmp_path / "prediction.json"
    argv = [joint, "--params", "2e9", "--tokens", "5e10", "--equal-to", "ternary"]
    assert command([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "at N = 2e+09, D = 5e+10 tokens (95% bootstrap intervals):" in text
    assert len(re.findall(r"loss +[\d.]+ \[[\d.]+, [\d.]+\] nats a token, the mean of such runs; "
                          r"one new run \[", text)) == 2  # fmt: skip
    assert re.search(r"one parameter of ternary equals 0\.\d+ \[0\.\d+, 0\.\d+\] of float", text)
    assert re.search(r"float at the same N needs D = [\d.e+]+ \[[\d.e+]+, [\d.e+]+\] tokens", text)
    assert "(N: the parameters that column 'params' counts" in text
    document = json.loads(out.read_text())
    assert [p["family"] for p in document["predictions"]] == ["float", "ternary"]
    assert [e["what"] for e in document["equivalents"]] == ["tokens", "params"]
    assert document["equal_to"] == "ternary"
    assert command([*argv, "--out", str(out)]) == 0  # its own output is replaced
    capsys.readouterr()
    assert command([joint, "--flops", "1e24", "--level", "0.8", "--equal-to", "float"]) == 0
    text = capsys.readouterr().out
    for label in (r"N\*", r"D\*", r"D\* / N\*", "loss"):
        assert len(re.findall(rf"^    {label} +[\d.e+]+ \[", text, re.M)) == 2
    assert "extrapolates: 6 N D is 3.00 decades above every run's (1e+21)" in text
    assert "80% bootstrap" in text


def test_a_fit_of_an_earlier_version_still_predicts(fits, capsys, tmp_path):
    document = json.loads((fits[0] / "fit.json").read_text())
    for key in ("for_predictions", "definitions"):
        del document[key]
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    assert command([str(old), "--params", "2e9", "--tokens", "5e10"]) == 0
    text = capsys.readouterr().out
    expected = gadre(list(document["parameters"].values()), N, D)
    assert f"loss      {expected:.4g} (no interval: fewer than 20 refits) nats a token" in text
    assert "warning: old: holds no bootstrap resamples and no ranges of its runs" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--params nan --tokens 1e9", "--params is nan: set a finite number"),
        ("--params -1e9 --tokens 1e9", "--params is -1000000000.0: set 1 or more"),
        ("--params 1e9 --tokens 0", "--tokens is 0.0: set 1 or more"),
        ("--flops inf", "--flops is inf"),
        ("--flops 1e21 --params 1e9", "flops: stands for the best size and tokens; give it"),
        ("--params 1e9", "place: give --params and --tokens, or --flops"),
        ("", "place: give --params and --tokens, or --flops"),
        ("--flops 1e21 --level 1", "--level is 1.0: set a value in (0, 1)"),
        ("--flops 1e21 --equal-to octal", "equal-to: 'octal' has to be one of several "
         "families; the fits hold 'float'"),
        ("--flops 1e21 --equal-to float", "equal-to: 'float' has to be one of several"),
        ("--flops 1e21 --out x.txt", "must end in .json"),
        ("--flops 1e21 --out nowhere/x.json", "the folder nowhere does not exist"),
        ("--flops 1e21 --out runs.json", "runs.json is not replaced"),
        ("fit.json --flops 1e21", "the same file is given twice"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_line(fits, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fit.json").write_bytes((fits[0] / "fit.json").read_bytes())
    (tmp_path / "runs.json").write_text('{"mine": 1}')
    with pytest.raises(MMFreeError) as caught:
        command(["fit.json", *argv.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert main(["predict", "fit.json", *argv.split()]) == 2


def _changed(**changes):
    def change(document):
        for path, value in changes.items():
            *folders, key = path.split("__")
            part = document
            for folder in folders:
                part = part[folder]
            part[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(law="cubic"), "'law' is 'cubic', which this version does not know"),
        (_changed(law=["gadre"]), "which this version does not know"),
        (_changed(law="chinchilla"), "is no whole fit: A is missing"),
        (_changed(parameters=[1]), "parameters is not a mapping"),
        (_changed(parameters__E="1.8"), "E is '1.8'"),
        (_changed(parameters__E=float("nan")), "its parameters are not finite"),
        (_changed(interval_level=95), "interval_level is 95, not between 0 and 1"),
        (_changed(conventions__params=None), "params is None"),
        (_changed(definitions=3), "definitions is not a mapping"),
        (_changed(families=["a"]), "families is not a mapping"),
        (_changed(families={}), "families is empty"),
        (_changed(families={"a": 1}), "family 'a': is no whole fit: it is not a mapping"),
        (_changed(for_predictions=None), "for_predictions is not a mapping"),
        (_changed(for_predictions__format=2), "was written by a newer version (format 2; this one"),
        (_changed(for_predictions__format="1"), "format is '1'"),
        (_changed(for_predictions__on_bound=0), "on_bound is 0"),
        (_changed(for_predictions__cost={}), "excess is missing"),
        (_changed(for_predictions__resamples__E="1 2"), "its resamples differ in length"),
        (_changed(for_predictions__resamples__E="1 x"), "resamples.E: could not convert string"),
        (_changed(for_predictions__resamples__E=3), "E is 3"),
        (_changed(for_predictions__ranges__tokens=[2, 1]), "ranges.tokens is [2, 1], no range"),
        (_changed(for_predictions__ranges__tokens=[1]), "ranges.tokens is [1], no range"),
        (_changed(for_predictions__ranges__tokens=2), "ranges.tokens is not a list"),
        (_changed(for_predictions__log_residuals=None), "log_residuals is None"),
    ],
)
def test_damaged_fits_are_told_in_one_line(fits, tmp_path, change, message):
    document = json.loads((fits[0] / "fit.json").read_text())
    change(document)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(document))
    with pytest.raises(MMFreeError) as caught:
        read_fits(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no whole JSON"),
        (b'{"law": "gadre", ', "is no whole JSON"),
        (b"[1]", "is no fit; give the file that mmfree fit wrote"),
        (b'{"families": ["a", "b"]}', "is no fit"),
        (b"\xff\xfe\x00", "is no whole JSON"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_files_that_are_no_fit(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MMFreeError) as caught:
        read_fits(path)
    assert message in str(caught.value)
    with pytest.raises(MMFreeError, match=r"holds no fit\.json; name the file"):
        read_fits(tmp_path)


def test_the_kept_refits_are_compact(fits):
    text = (fits[0] / "fit.json").read_text()
    rows = list(
        csv.reader([json.loads(text)["for_predictions"]["resamples"]["eta"]], delimiter=" ")
    )
    assert len(rows[0]) == 200
    assert len(text) < 200 * 4 * 14 + 8000
