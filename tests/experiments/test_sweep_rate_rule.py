"""A rule of the learning rate: fitted by one sweep's report, followed by another sweep."""

import json
import math

import pytest
from sweep_results import finish

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.notes import plan_notes
from mmfree_jax.experiments.sweep.plan import main_runs, parameters, tuning_runs
from mmfree_jax.experiments.sweep.rate_fit import fit_rules
from mmfree_jax.experiments.sweep.rate_rule import read_rule
from mmfree_jax.experiments.sweep.report import grid_choices, write_report
from mmfree_jax.experiments.sweep.state import snapshot

RATES = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def make(tmp_path, rates=RATES, **values):
    base = {
        "out": str(tmp_path / "first"),
        "families": [{"base": "matmulfree", "learning_rates": rates}],
        "sizes": ["1x64", "1x128", "2x128"],
        "tokens": [2e4, 8e4],
        "train": {"batch_size": 4, "data": {"paths": ["nowhere"], "seq_len": 64}},
    }
    return from_dict(SweepConfig, {**base, **values})


def true_rate(run):
    return 60 * parameters(run.config, "non-embedding") ** -0.7 * run.tokens**-0.2


def loss_of(run):
    return 3 + math.log(run.learning_rate / true_rate(run)) ** 2


def follow(tmp_path, **rule):
    family = {"name": "big", "rate_rule": rule}
    return make(tmp_path, out=str(tmp_path / "second"), families=[family], sizes=["4x256"])


def test_a_sweep_takes_its_rates_from_the_rule_that_another_one_fitted(tmp_path):
    first = make(tmp_path)
    finish(first, main_runs(first), loss_of)
    text, paths = write_report(snapshot(first))
    path = tmp_path / "first" / "rate_rule.json"
    assert path in paths
    assert "matmulfree: c 59.2, a -0.699 [-0.703, -0.696], b -0.199 [-0.204, -0.195]" in text
    rule = read_rule(str(path), "matmulfree")
    assert rule.params_exponent == pytest.approx(-0.7, abs=3e-3)  # rates have three digits
    assert rule.tokens_exponent == pytest.approx(-0.2, abs=3e-3)

    second = follow(tmp_path, file=str(path), family="matmulfree", around=[0.5, 1.0, 2.0])
    runs = main_runs(second)
    assert len(runs) == 2 * 3
    for run in runs:
        ratio = run.learning_rate / true_rate(run)
        assert min(abs(ratio / factor - 1) for factor in (0.5, 1.0, 2.0)) < 0.02
    (note,) = plan_notes(second, runs, None)
    assert note.startswith("note: the rate rule of big was fitted to ")


def test_winners_at_an_end_are_left_out(tmp_path):
    first = make(tmp_path, rates=[1e-3, 2e-3, 4e-3])
    finish(first, main_runs(first), loss_of)
    (rule,) = fit_rules(grid_choices(snapshot(first)))
    assert (rule.law, len(rule.winners)) == (None, 1)
    assert rule.note.startswith("5 of 6 winners are left out")


@pytest.mark.parametrize(("sizes", "tokens", "known"), [
    (["1x64", "1x128", "2x128"], [2e4], "params"), (["1x128"], [1e4, 2e4, 8e4], "tokens"),
])  # fmt: skip
def test_what_does_not_vary_has_no_exponent(tmp_path, sizes, tokens, known):
    sweep = make(tmp_path, sizes=sizes, tokens=tokens)
    finish(sweep, main_runs(sweep), loss_of)
    text, _ = write_report(snapshot(sweep))
    (rule,) = json.loads((tmp_path / "first" / "rate_rule.json").read_text())["families"]
    truth = {"params": -0.7, "tokens": -0.2}
    for name, value in truth.items():
        expected = value if name == known else 0.0
        assert rule[f"{name}_exponent"] == pytest.approx(expected, abs=4e-3)
    assert f"{'tokens' if known == 'params' else 'params'} did not vary" in text


def test_tuning_at_one_budget_a_parameter_gives_the_exponent_along_that_line(tmp_path):
    sweep = make(tmp_path, tuning={"tokens_per_parameter": 0.5})
    finish(sweep, tuning_runs(sweep), loss_of)
    (rule,) = fit_rules(snapshot(sweep).choices.values())
    assert rule.law is not None
    assert rule.law.x == ("params",)
    assert rule.exponent("params") == pytest.approx(-0.9, abs=0.01)  # D is in proportion to N
    assert "did not vary apart" in rule.note


def test_coefficients_in_the_config_are_a_rule(tmp_path):
    sweep = follow(tmp_path, coefficient=60.0, params_exponent=-0.7, tokens_exponent=-0.2)
    for run in main_runs(sweep):
        assert run.learning_rate == float(f"{true_rate(run):.3g}")


def test_a_rule_taken_at_one_ratio_gives_a_size_one_rate(tmp_path):
    sweep = follow(tmp_path, coefficient=60.0, params_exponent=-0.7, tokens_exponent=-0.2,
                   tokens_per_parameter=20)  # fmt: skip
    runs = main_runs(sweep)
    params = parameters(runs[0].config, "non-embedding")
    assert len({run.tokens for run in runs}) == 2
    assert {run.learning_rate for run in runs} == {
        float(f"{60 * params**-0.7 * (20 * params) ** -0.2:.3g}")
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"file": "none.json"}, "file none.json cannot be read"),
        ({"file": "bad.json"}, r"file bad.json is no rate rule \(families is missing\): give a"),
        ({"file": "rule.json"}, "file rule.json has no rule of 'big': set .* one of small"),
        ({"file": "rule.json", "family": "small"}, "file rule.json: .*coefficient is -1"),
        ({"file": "rule.json", "coefficient": 1.0}, "leave it out, or coefficient"),
        ({"params_exponent": -0.3}, "coefficient is None: give it"),
        ({"coefficient": 1.0, "around": []}, r"around is \[\]: give each"),
        ({"coefficient": 1.0, "params_exponent": 10.0}, "tokens gives the rate inf: use other"),
        ({"coefficient": 1.0, "params_exponent": -9.9}, "tokens gives the rate .*: use other"),
        ({"coefficient": 1e-3, "around": [1.0, 1.0001]}, "differ in their first three digits"),
        ({"coefficient": 1.0, "family": "x"}, "give a file as well"),
        ({"tokens_per_parameter": 20}, "tokens_per_parameter is 20: give a file or a coeff"),
        ({"coefficient": float("nan")}, "rate_rule.coefficient is nan"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(tmp_path, monkeypatch, rule, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    fields = {"coefficient": -1, "params_exponent": 0, "tokens_exponent": 0, "params_range": [],
              "tokens_range": []}  # fmt: skip
    (tmp_path / "rule.json").write_text(json.dumps({"families": [{"family": "small", **fields}]}))
    with pytest.raises(ConfigError, match=message):
        main_runs(follow(tmp_path, **rule))


def test_rates_are_listed_or_by_a_rule(tmp_path):
    family = {"learning_rates": [1e-3], "rate_rule": {"coefficient": 1.0}}
    with pytest.raises(ConfigError, match=r"learning_rates is .*: leave it out, or"):
        make(tmp_path, families=[family])
