"""The commands: the promised files, no number alone, one-line errors."""

import csv
import json
import re

import numpy as np
import pytest
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.cli.crossing import crossing
from mmfree_jax.experiments.cli.fit import fit
from mmfree_jax.experiments.cli.isoflop import isoflop
from mmfree_jax.experiments.scaling.frame import NUMBERS, WORDS
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.output_files import write_csv

ONE = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.35}
TWO = {"E": 1.8, "A": 300.0, "B": 1100.0, "alpha": 0.34, "beta": 0.35}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    params, tokens, budget = isoflop_design(10.0 ** np.linspace(17, 20, 4), 6)
    for name, truth in (("a", ONE), ("b", TWO)):
        frame = draw_runs("chinchilla", truth, params, tokens, noise=0.002, budget=budget, seed=1)
        used = [n for n in NUMBERS if np.isfinite(getattr(frame, n)).any()]
        used += [n for n in WORDS if np.any(getattr(frame, n) != "")]
        rows = [{n: getattr(frame, n)[i].item() for n in used} for i in range(len(frame))]
        write_csv(folder / f"{name}.csv", rows)
    rows = [{"Model Size": r["params"], "Training FLOP": r["flops"], "loss": r["loss"]}
            for r in rows]  # fmt: skip
    write_csv(folder / "renamed.csv", rows)
    both = [{**r, "family": name} for name in "ab"
            for r in csv.DictReader((folder / f"{name}.csv").open())]  # fmt: skip
    write_csv(folder / "both.csv", both)
    return folder


def test_fit_writes_the_promised_json(files, capsys):
    out = files / "fit.json"
    argv = [str(files / "a.csv"), "--law", "chinchilla", "--objective", "huber", "--delta", "1e-3",
            "--bootstrap", "200", "--out", str(out)]  # fmt: skip
    assert fit(argv) == 0
    document = json.loads(out.read_text())
    keys = ["law", "parameters", "objective", "n", "intervals", "warnings"]
    assert list(document)[:6] == keys
    assert document["law"] == "chinchilla"
    assert list(document["parameters"]) == ["E", "A", "B", "alpha", "beta"]
    assert document["n"] == 24
    for name, value in document["parameters"].items():
        assert value == pytest.approx(ONE[name], rel=0.5)
        low, high = document["intervals"][name]
        assert low <= value <= high
    assert document["optimisation"]["starts"] == 4500
    assert document["seed"] == 0
    assert (files / "fit.png").read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader((files / "fit.plot.csv").open()))
    assert sum(r["series"] == "run" for r in rows) == 24
    text = capsys.readouterr().out
    for name in ONE:  # no number stands alone
        assert re.search(rf"^  {name} +\S+ \[\S+, \S+\]", text, re.M)
    # The objective is reported at the reported parameters.
    p = np.array(list(document["parameters"].values()))
    runs = [r for r in rows if r["series"] == "run"]
    assert document["objective"] < 24 * 1e-3 * 0.01
    fitted = [float(r["fitted"]) for r in runs]
    source = list(csv.DictReader((files / "a.csv").open()))
    x = {k: np.array([float(r[k]) for r in source]) for k in ("params", "tokens")}
    np.testing.assert_allclose(fitted, LAWS["chinchilla"].loss(p, x), rtol=1e-9)


def test_fit_without_bootstrap_says_why_there_is_no_interval(files, capsys):
    out = files / "bare.json"
    assert fit([str(files / "renamed.csv"), "--law", "power", "--bootstrap", "0", "--out", str(out),
                "--no-plot"]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "(no interval: see warnings)" in text
    assert "no intervals, for want of a --bootstrap of 1000 or so" in text
    assert json.loads(out.read_text())["intervals"] == {}
    assert not out.with_suffix(".png").exists()


def test_crossing_of_two_families(files, capsys):
    out = files / "cross.json"
    argv = ["--laws", "line", "gadre", "--bootstrap", "100", "--out", str(out)]
    assert crossing([str(files / "both.csv"), str(files / "both.csv"), "--families", "a", "b",
                     *argv]) == 0  # fmt: skip
    document = json.loads(out.read_text())
    assert document["families"] == ["a", "b"]
    assert set(document["laws"]) == {"line", "gadre"}
    for law in document["laws"].values():
        assert 0 <= law["probability_no_crossing"] <= 1
        assert law["interval"] is not None
    text = capsys.readouterr().out
    assert document["conclusion"] in text
    assert "  (N: the parameters that column 'params' counts; C: FLOPs as counted for" in text
    assert document["definitions"]["C"] == "FLOPs as counted for each run (column 'flops')"
    warnings = [line for line in text.splitlines() if line.startswith("  warning: ")]
    assert len(set(warnings)) == len(warnings)
    assert text.count("P(no crossing)") == 2
    assert out.with_suffix(".png").exists()
    assert out.with_suffix(".plot.csv").exists()


def test_isoflop_with_two_approaches(files, capsys):
    out = files / "iso.json"
    assert isoflop([str(files / "a.csv"), "--approach", "isoflop", "parametric", "--bootstrap",
                    "100", "--out", str(out)]) == 0  # fmt: skip
    document = json.loads(out.read_text())["approaches"]
    for approach in ("isoflop", "parametric"):
        low, high = document[approach]["intervals"]["a"]
        assert low <= document[approach]["exponents"]["a"] <= high
    assert len(document["isoflop"]["budgets"]) == 4
    text = capsys.readouterr().out
    assert re.search(r"N\* ~ C\^a +0\.\d+ \[", text)
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        (fit, ["no.csv"], "no.csv: does not exist"),
        (fit, ["a.csv", "--out", "x.txt"], "must end in .json"),
        (fit, ["a.csv", "--out", "nowhere/x.json"], "the folder nowhere does not exist"),
        (fit, ["a.csv", "--bootstrap", "-1"], "--bootstrap is -1: set 0 or more"),
        (fit, ["a.csv", "--level", "95"], "--level is 95.0: set a value in (0, 1)"),
        (fit, ["a.csv", "--delta", "0"], "--delta is 0.0: set a value above 0"),
        (fit, ["a.csv", "--law", "cubic"], "cubic"),
        (
            fit,
            ["both.csv"],
            "2 families (a, b) in one fit, by the column 'family'; choose one with "
            "--where 'family = a', or take all with --columns.family none",
        ),
        (isoflop, ["both.csv"], "2 families (a, b) in one fit, by the column 'family'"),
        (fit, ["a.csv", "--law", "power", "--flops", "energy"], "'params_ternary' is missing"),
        (fit, ["both.csv", "--joint", "--law", "precision"], "fitted to one family at a time"),
        (crossing, ["a.csv"], ""),
        (crossing, ["both.csv", "a.csv"], "holds 2 families (a, b) by the column 'family'"),
        (crossing, ["both.csv", "a.csv", "--families", "c", "a"], "has no family 'c'"),
        (isoflop, ["a.csv", "--approach", "envelope"], "every run has one row"),
    ],
)
def test_errors_are_one_line(files, monkeypatch, command, argv, message):
    monkeypatch.chdir(files)
    with pytest.raises(MMFreeError) as caught:
        command(argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", [fit, crossing, isoflop])
def test_help_explains_every_field(command, capsys):
    with pytest.raises(SystemExit) as caught:
        command(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--size", "--flops", "--bootstrap", "--columns.params", "--where", "--out"):
        assert flag in text
