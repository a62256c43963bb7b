"""Sizes that a sweep derives from budgets and ratios: one list of shapes for all families."""

import pytest

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.notes import plan_notes
from mmfree_jax.experiments.sweep.plan import derived_sizes, main_runs, parameters

FAMILIES = [
    {"base": "matmulfree", "learning_rates": [4e-3]},
    {"base": "transformer", "learning_rates": [1e-3]},
]
RATIOS = [5.0, 10.0, 20.0, 40.0, 80.0]
BUDGETS = [1e17, 3e17, 1e18, 3e18, 1e19]


def make(budgets=BUDGETS, ratios=RATIOS, **values):
    base = {
        "families": FAMILIES,
        "flop_budgets": budgets,
        "tokens_per_parameter": ratios,
        "train": {
            "batch_size": 64,
            "data": {"paths": ["nowhere"], "seq_len": 512},
            "model": {"vocab_size": 8192},
        },
    }
    return from_dict(SweepConfig, {**base, **values})


def test_families_and_budgets_share_one_list_of_shapes():
    runs = main_runs(make())
    assert len(runs) == 2 * 5 * 5
    pairs = {label: {(r.budget, r.size) for r in runs if r.family == label}
             for label in ("matmulfree", "transformer")}  # fmt: skip
    assert len(pairs["matmulfree"]) == 25
    assert pairs["matmulfree"] == pairs["transformer"]
    # N spans a factor of 10 x 4, in steps of a root of 2 or more: 12 shapes would do at the least.
    assert len({r.size for r in runs}) <= 15


def test_a_shape_is_near_the_n_asked_for_in_every_family():
    sweep = make()
    asked = {(d.budget, d.size): d.ratio for d in derived_sizes(sweep).sizes}
    for run in main_runs(sweep):
        assert run.budget is not None
        assert run.flops == pytest.approx(run.budget, rel=1e-2)
        ratio = run.tokens / parameters(run.config, "non-embedding")
        off = ratio / asked[run.budget, run.size]
        # At a budget tokens a parameter go as N^-2 at the most, and N is within 1.25.
        assert 1 / 1.57 < off < 1.57
        layers, width = map(int, run.size.split("x"))
        assert 28 <= width / layers <= 56


def test_more_budgets_leave_the_shapes_of_smaller_ones():
    few = derived_sizes(make(budgets=[1e17, 3e17])).sizes
    more = derived_sizes(make(budgets=[1e18, 1e17, 3e17])).sizes
    assert more[: len(few)] == few
    assert [d.budget for d in more] == [1e17] * 5 + [3e17] * 5 + [1e18] * 5


def test_fewer_than_three_sizes_at_a_budget_are_refused():
    small = {"model": {"vocab_size": 258}, "data": {"seq_len": 64}, "batch_size": 1}
    with pytest.raises(ConfigError, match="leave 1 of 3 sizes, 3 are the fewest") as caught:
        main_runs(make(budgets=[2e10, 6e10], ratios=[1, 3, 9], train=small))
    text = str(caught.value)
    assert text.startswith("flop_budgets: 2e+10 FLOPs")
    assert "the nearest shape, 2x32, has" in text
    assert "raise the budget, change tokens_per_parameter, or name sizes" in text
    assert "\n" not in text
    with pytest.raises(ConfigError, match=r"tokens_per_parameter is \[10.0, 20.0\]: give 3 or"):
        main_runs(make(ratios=[10, 20]))


def test_a_ratio_out_of_reach_is_left_out_in_words():
    small = {"batch_size": 1, "model": {"vocab_size": 258}, "data": {"seq_len": 64}}
    sweep = make(budgets=[1e12], ratios=[2, 4, 12, 200], train=small)
    found = derived_sizes(sweep)
    assert [d.ratio for d in found.sizes] == [2, 4, 12]
    (note,) = plan_notes(sweep, main_runs(sweep), None)
    assert note.startswith("note: flop_budgets: 1e+12 FLOPs: 200 tokens a parameter ask for N = ")
    assert note.endswith("left out")


def test_passes_over_the_corpus_are_said():
    sweep = make(budgets=[1e17])
    runs = main_runs(sweep)
    most = max(r.tokens for r in runs)
    assert plan_notes(sweep, runs, {("nowhere",): most}) == []
    half = {("nowhere",): most // 2}
    (warning,) = plan_notes(sweep, runs, half)
    again = sum(r.tokens > most // 2 for r in runs)
    assert f"warning: {again} of 10 runs see their corpus more than once, up to 2 times" in warning
    named = make(flop_budgets=[], ratios=[20], sizes=["2x64"])
    assert plan_notes(named, main_runs(named), {("nowhere",): 10**12}) == []


def test_named_sizes_too_few_for_a_parabola_are_said():
    sweep = make(budgets=[1e16], ratios=[], sizes=["rung-3M", "rung-7M"], families=FAMILIES[:1])
    assert plan_notes(sweep, main_runs(sweep), None) == [
        "note: flop_budgets: matmulfree spends 1e+16 FLOPs at rung-3M, rung-7M alone; a parabola "
        "takes 3 sizes"
    ]
    three = make(budgets=[1e16], ratios=[], sizes=["rung-3M", "rung-7M", "2x64"])
    assert plan_notes(three, main_runs(three), None) == []
