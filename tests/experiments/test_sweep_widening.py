"""Rates that are added where the best one is at an end of its list."""

import math

import pytest
from sweep_results import finish

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import shard
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.widening import widened_rates


def valley(lowest):
    return lambda rate: math.log(rate / lowest) ** 2


def test_the_next_rate_follows_the_ratio_at_its_end_until_the_best_is_inside():
    given = (1e-3, 2e-3, 8e-3)
    # Lowest at 2e-4, so that 2.5e-4 is inside once 1.25e-4 is tried.
    assert widened_rates(given, valley(2e-4), 5) == (
        1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 8e-3,
    )  # fmt: skip
    assert widened_rates(given, valley(6e-2), 5) == (1e-3, 2e-3, 8e-3, 3.2e-2, 0.128)
    assert widened_rates(given, valley(2e-3), 5) == given
    assert widened_rates(given, valley(1e-9), 2) == (2.5e-4, 5e-4, *given)
    assert widened_rates((2e-3,), valley(1e-9), 2) == (2e-3,)


def test_one_rate_is_added_at_a_time():
    losses = {1e-3: 2.0, 2e-3: 3.0}
    assert widened_rates((1e-3, 2e-3), losses.get, 3) == (5e-4, 1e-3, 2e-3)
    assert widened_rates((1e-3, 2e-3, 4e-3), losses.get, 3) == (1e-3, 2e-3, 4e-3)


def test_a_diverged_rate_is_an_end_that_was_tried():
    assert widened_rates((1e-3, 2e-3), {1e-3: 3.0, 2e-3: 2.0, 4e-3: math.inf}.get, 3) == (
        1e-3, 2e-3, 4e-3,
    )  # fmt: skip
    every = {1e-3: math.inf, 2e-3: math.inf}
    assert widened_rates((1e-3, 2e-3), every.get, 3) == (5e-4, 1e-3, 2e-3)


def make(tmp_path, **values):
    base = {
        "out": str(tmp_path),
        "families": [{"base": "matmulfree", "learning_rates": [1e-3, 2e-3]}],
        "sizes": ["rung-1M", "rung-3M"],
        "tokens": [1e4],
        "widen_rates": 2,
        "train": {"batch_size": 4, "data": {"paths": ["nowhere"], "seq_len": 64}},
    }
    return from_dict(SweepConfig, {**base, **values})


def rates(runs, size):
    return sorted({r.learning_rate for r in runs if r.size == size})


def test_main_runs_wait_until_the_best_rate_of_their_size_is_inside(tmp_path):
    sweep = make(tmp_path, tuning={"tokens": 1e4}, tokens=[2e4])
    best = {"rung-1M": 3e-4, "rung-3M": 1.4e-3}

    def loss_of(run):
        return valley(best[run.size])(run.learning_rate)

    finish(sweep, snapshot(sweep).tuning, loss_of)
    found = snapshot(sweep)
    assert rates(found.tuning, "rung-1M") == [5e-4, 1e-3, 2e-3]
    assert not any(run.rate_known for run in found.main if run.size == "rung-1M")
    finish(sweep, found.tuning, loss_of)
    finish(sweep, snapshot(sweep).tuning, loss_of)
    found = snapshot(sweep)
    assert rates(found.tuning, "rung-1M") == [2.5e-4, 5e-4, 1e-3, 2e-3]  # the bound of 2
    assert found.choices["matmulfree", "rung-1M"].rate == 2.5e-4
    assert found.choices["matmulfree", "rung-1M"].at_edge
    assert rates(found.main, "rung-1M") == [2.5e-4]
    assert rates(found.tuning, "rung-3M") == [5e-4, 1e-3, 2e-3]
    assert not found.choices["matmulfree", "rung-3M"].at_edge


def test_without_tuning_the_first_seed_widens_for_all_and_a_cell_stays_in_its_shard(tmp_path):
    sweep = make(tmp_path, seeds=[0, 1], tokens=[1e4, 2e4])
    before = {i: {r.name for r in shard(sweep, snapshot(sweep).main, i, 3)} for i in range(3)}
    finish(sweep, snapshot(sweep).main, lambda run: valley(5e-4 + run.seed)(run.learning_rate))
    main = snapshot(sweep).main
    assert {r.seed for r in main if r.learning_rate == 5e-4} == {0, 1}
    assert rates(main, "rung-3M") == [5e-4, 1e-3, 2e-3]
    after = {i: {r.name for r in shard(sweep, main, i, 3)} for i in range(3)}
    assert all(before[i] < after[i] or not before[i] for i in range(3))
    assert sum(map(len, after.values())) == len(main) == 4 * 3 * 2


def test_a_list_of_one_rate_cannot_be_widened(tmp_path):
    with pytest.raises(ConfigError, match="widen_rates is 2: give each family two rates"):
        make(tmp_path, families=[{"base": "matmulfree", "learning_rates": [1e-3]}])
