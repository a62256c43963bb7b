"""What a law misses, in the study's gaps and intervals: tables of known losses, in short."""

import dataclasses
import json

import numpy as np
import pytest

from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.study import misfit_coverage, synthetic_tables
from mmfree_jax.experiments.study.misfit_coverage import BY_CELL, IN, NO_LAW, OUT, Truth
from mmfree_jax.experiments.study.trunk_noise import TrunkNoise


def law_at(fits):
    """The study's law, whose fits begin at parameters in place of thousands of points."""
    starts = np.array(fits)
    return dataclasses.replace(
        get_law("chinchilla"), starts=lambda model, x, y: model.from_parameters(starts)
    )


FITS = [(2.2, 180.0, 560.0, 0.335, 0.36), (2.2, 150.0, 529.0, 0.33, 0.36)]


def trials(truth, count, methods):
    found = []
    for seed in range(count):
        table = synthetic_tables.draw_table(truth, 100, np.random.default_rng([7, seed]),
                                            rates_known=True)  # fmt: skip
        for row in misfit_coverage.trial(truth, law_at(FITS), table, seed, methods):
            if row["level"] == 0.95:
                found.append(row)
    return found


def of(found, method, quantity, ratio=20):
    return [
        x for x in found if (x["method"], x["quantity"], x["ratio"]) == (method, quantity, ratio)
    ]


@pytest.fixture(scope="module")
def missed():
    """Losses with a term in N D of twice the size of the record's."""
    return trials(Truth("", product=(1.2, -0.6)), 4, [OUT, IN])


def test_intervals_hold_the_truth_that_the_law_cannot_express(missed):
    for quantity in ("gap at the smallest", "slope"):
        rows = of(missed, IN, quantity)
        assert sum(x["holds"] for x in rows) >= 3, quantity
    assert not any(x["holds"] for x in of(missed, OUT, "gap at the smallest"))


def test_what_residuals_tell_takes_the_bias_away(missed):
    for ratio in (20, 80):
        without, with_it = (
            np.mean([x["error"] for x in of(missed, method, "gap at the smallest", ratio)])
            for method in (OUT, IN)
        )
        assert abs(with_it) < 0.4 * abs(without), ratio


def test_far_from_the_runs_the_interval_is_as_wide_as_the_misfit_says(missed):
    without, with_it = (
        np.median([x["width"] for x in of(missed, method, "gap at 1e20")]) for method in (OUT, IN)
    )
    assert with_it > 3 * without


def test_a_law_that_is_true_costs_little():
    found = trials(Truth(""), 3, [OUT, IN])
    for quantity in ("gap at the smallest", "gap at the largest", "slope"):
        without, with_it = (
            np.median([x["width"] for x in of(found, method, quantity)]) for method in (OUT, IN)
        )
        assert 0.6 * without < with_it < 1.7 * without, quantity


def test_true_losses_are_written_out():
    truth = Truth("", floor=(0.1, 0.0), product=(0.5, 0.0), bend=(0.01, 0.0), steeper=(0.2, 0.0))
    n, d = np.array([2e6]), np.array([4e7])
    size = 180 / 2e6**0.335 * np.exp(0.01 * np.log(2e6 / 6e6) ** 2)
    data = 560 / 4e7**0.36 * (1 + 4e7 / 1.5e8) ** -0.2
    expected = 2.3 + size + data + 0.5 * np.sqrt(size * data)
    assert truth.loss("matmulfree", n, d) == pytest.approx([expected])
    assert Truth("").loss("transformer", n, d) == pytest.approx(
        [2.2 + 150 / 2e6**0.33 + 529 / 4e7**0.36]
    )
    repeated = Truth("", worth=5.0).run_loss("transformer", n, np.array([3 * 176.7e6]))
    worth = 176.7e6 * (1 + 5 * (1 - np.exp(-2 / 5)))
    assert repeated == pytest.approx([2.2 + 150 / 2e6**0.33 + 529 / worth**0.36])


def test_synthetic_tables_are_those_of_the_plan(pytestconfig):
    record = json.loads(
        (pytestconfig.rootpath / "experiments/results/study2/data.json").read_text()
    )
    heldout = [source["heldout"] for source in record["sources"].values()]
    assert [count for count, _ in synthetic_tables.HELDOUT] == [h["documents"] for h in heldout]
    assert [tokens for _, tokens in synthetic_tables.HELDOUT] == pytest.approx(
        [h["tokens"] for h in heldout], abs=1e3
    )
    unique = sum(source["train"]["tokens"] for source in record["sources"].values())
    assert pytest.approx(unique, rel=1e-3) == synthetic_tables.UNIQUE
    table = synthetic_tables.draw_table(Truth(""), 40, np.random.default_rng(0))
    for name, runs in table.families.items():
        assert len(runs.rows) == 58
        assert {row["family"] for row in runs.rows} == {name}
        assert len({row["trunk"] for row in runs.rows}) == 11
        assert runs.draws.shape == (40, 58)
    assert table.noise.freedom == 12
    assert table.noise.trunk == pytest.approx(TrunkNoise().trunk, rel=0.6)


def test_shares_have_an_interval():
    low, high = misfit_coverage.score_interval(95, 100)
    assert (low, high) == pytest.approx((0.888, 0.978), abs=1e-3)  # Wilson 1927
    assert misfit_coverage.score_interval(10, 10)[1] == pytest.approx(1.0)


def test_rows_count_what_the_intervals_held():
    trials = [
        {"ratio": 20, "level": 0.95, "method": IN, "quantity": "slope", "truth": 1.0,
         "holds": holds, "width": width, "error": error}
        for holds, width, error in ((True, 1.0, 0.1), (False, 2.0, -0.3), (True, 4.0, -0.1))
    ]  # fmt: skip
    (row,) = misfit_coverage.summary("law", trials)
    assert (row["holds"], row["of"], row["median_width"]) == (2, 3, 2.0)
    assert row["bias"] == pytest.approx(-0.1)
    assert row["rms_error"] == pytest.approx(np.sqrt(0.11 / 3), abs=1e-5)


def test_the_truths_have_names_and_known_methods():
    assert set(misfit_coverage.METHODS) == {OUT, IN, BY_CELL}
    assert NO_LAW not in misfit_coverage.METHODS
