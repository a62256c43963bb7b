"""`mmfree bench coverage`: its counts, its record, and a short form of the measurement."""

import json

import numpy as np
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.coverage import Plan, Trial, _row, measure, true_crossing
from mmfree_jax.experiments.cli.bench_coverage import bench_coverage


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path):
    """60 data sets; the noise that the objective implies instead of the sandwich gives 0.87."""
    plan = Plan(out=tmp_path, designs=("isoflop-48",), methods=("profile", "gap"), repetitions=60)
    rows = list(measure(plan))
    assert [row["method"] for row in rows] == ["profile"] * 5 + ["gap"] * 4
    for row in rows:
        assert 0.88 <= row["coverage"] <= 1, row
    for method in ("profile", "gap"):
        mean = np.mean([row["coverage"] for row in rows if row["method"] == method])
        assert 0.92 <= mean <= 0.985, method


def test_misses_are_counted_by_side_and_open_ends_hold():
    intervals = [(0.0, 2.0), (1.5, 2.0), (0.0, 0.5), (None, 2.0), (1.5, None), None, (None, None)]
    row = _row([Trial("profile", "E", 1.0, interval) for interval in intervals])
    counts = {k: row[k] for k in ("truth_below", "truth_above", "no_interval", "open_ended")}
    assert counts == {"truth_below": 2, "truth_above": 1, "no_interval": 1, "open_ended": 3}
    assert row["coverage"] == pytest.approx(3 / 7, abs=1e-4)
    assert row["standard_error"] == pytest.approx(0.187, abs=1e-3)


def test_the_record_says_what_was_measured(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--designs", "grid-20", "--methods", "crossing,gap"]
    assert bench_coverage([*argv, "--repetitions", "2", "--resamples", "30"]) == 0
    record = json.loads((tmp_path / "coverage.json").read_text())
    assert record["command"].startswith("mmfree bench coverage --out")
    assert record["level"] == 0.95
    assert set(record["versions"]) == {"python", "mmfree-jax", "numpy", "scipy"}
    assert "20 runs" in record["designs"]["grid-20"]
    assert [row["quantity"] for row in record["rows"]] == [
        "log10 C", "centre", "per_size", "per_tokens", "per_both",
    ]  # fmt: skip
    assert record["rows"][0]["truth"] == pytest.approx(21.33, abs=0.01)
    assert record["rows"][0]["no_interval"] == 0
    assert "| crossing | log10 C |" in (tmp_path / "coverage.md").read_text()
    assert "grid-20, gap of centre" in capsys.readouterr().out


def test_the_true_crossing_is_where_both_laws_agree():
    """Least E + A / N^alpha + B / D^beta over N at C = 6 N D, on a fine grid of N."""
    c = 10 ** true_crossing()
    n = np.geomspace(1e7, 1e12, 400_001)
    losses = [
        (e + a * n**-0.34 + b * (c / 6 / n) ** -0.36).min()
        for e, a, b in ((1.75, 420, 1900), (1.70, 470, 2100))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_unknown_words_name_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="--designs has 'mine': choose from isoflop-48"):
        bench_coverage(["--out", str(tmp_path), "--designs", "mine"])
    with pytest.raises(ConfigError, match="--methods has 'wald': choose from profile"):
        bench_coverage(["--out", str(tmp_path), "--methods", "wald"])
