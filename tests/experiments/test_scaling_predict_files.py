"""Predictions from the files of fits, by the command and by what reads them."""

import csv
import json
import re

import numpy as np
import pytest
from known_laws import GADRE, C, D, N, best, gadre
from scipy.optimize import brentq
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.cli.main import main
from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.fit import fit
from mmfree_jax.experiments.cli.predict import predict as command
from mmfree_jax.experiments.scaling import fit_law, read_runs
from mmfree_jax.experiments.scaling.fitted_law import fitted_law, read_fits
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.output_files import write_csv, write_json
from mmfree_jax.experiments.scaling.predict import Place, equal_loss, predict
from mmfree_jax.experiments.scaling.report import fit_document


def test_laws_with_further_columns_come_back_from_their_files(fits, tmp_path):
    document = json.loads((fits[0] / "fit.json").read_text())
    names = LAWS["precision"].parameters
    document |= {"law": "precision", "parameters": dict.fromkeys(names, 0.5)}
    document["for_predictions"]["resamples"] = dict.fromkeys(names, "0.5")
    (tmp_path / "fit.json").write_text(json.dumps(document))
    (read,) = read_fits(tmp_path)
    assert read.law.also == ("bits",)


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
