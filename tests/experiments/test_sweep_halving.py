"""Successive halving of tuning runs: who pauses, who goes on, and that it is decided once."""

import math
from pathlib import Path

import pytest
from sweep_results import finish

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.halving import HalvingConfig
from mmfree_jax.experiments.sweep.notes import plan_notes
from mmfree_jax.experiments.sweep.pauses import halve, record_pause
from mmfree_jax.experiments.sweep.plan import shard, tuning_runs
from mmfree_jax.experiments.sweep.report import rates_text, status_text
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.watch import standing

RATES = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def make(tmp_path, **values):
    base = {
        "out": str(tmp_path),
        "families": [{"base": "matmulfree", "learning_rates": RATES}],
        "sizes": ["1x64"],
        "tokens": [4e4],
        "tuning": {"tokens": 2e4},
        "halving": {"eta": 2, "fraction": 0.25},
        "train": {"batch_size": 4, "data": {"paths": ["nowhere"], "seq_len": 64}},
    }  # 78 steps of tuning, with pauses after 20 and 39
    return from_dict(SweepConfig, {**base, **values})


def loss(run, best=2.2e-3):
    return 3 + math.log(run.learning_rate / best) ** 2


def pause_due(sweep, loss_of=loss):
    """Makes each run's next leg to its pause; returns the rates of those that had one."""
    found = snapshot(sweep)
    due = [run for run in found.tuning if run.name in found.halved.next_pause]
    for run in due:
        record_pause(Path(sweep.out), run, found.halved.next_pause[run.name], loss_of(run))
    return {run.learning_rate: found.halved.next_pause[run.name] for run in due}


def statuses(sweep):
    found = snapshot(sweep)
    return {run.learning_rate: found.status(run) for run in found.tuning}


def test_the_best_half_goes_on_at_each_pause_and_the_winner_is_used(tmp_path):
    sweep = make(tmp_path)
    assert pause_due(sweep) == dict.fromkeys(RATES, 20)
    assert pause_due(sweep) == dict.fromkeys([1e-3, 2e-3, 4e-3], 39)
    assert statuses(sweep) == {
        5e-4: "dropped", 1e-3: "dropped", 8e-3: "dropped", 1.6e-2: "dropped",
        2e-3: "pending", 4e-3: "pending",
    }  # fmt: skip
    assert pause_due(sweep) == {}
    assert not any(run.rate_known for run in snapshot(sweep).main)
    finish(sweep, snapshot(sweep).tuning, loss)
    found = snapshot(sweep)
    assert [run.learning_rate for run in found.main] == [2e-3]
    choice = found.choices["matmulfree", "1x64"]
    assert not choice.at_edge
    assert choice.dropped == (5e-4, 1e-3, 8e-3, 1.6e-2)
    text = rates_text(found, found.choices.values())
    assert "0.001: ended early, 0.002: 3.0091, 0.004: 3.3574, 0.008: ended early" in text
    assert status_text(found).startswith("4 dropped, 2 done, 1 pending; ")
    finish(sweep, found.main, loss)
    over = standing(snapshot(sweep))
    assert (over.is_over, over.flops_share) == (True, 1.0)
    assert over.line == "3/7 runs done, 4 dropped; 100% of the FLOPs"


def test_nobody_goes_on_before_all_have_come_as_far(tmp_path):
    sweep = make(tmp_path)
    runs = {run.learning_rate: run for run in tuning_runs(sweep)}
    for rate in RATES[:5]:
        record_pause(tmp_path, runs[rate], 20, loss(runs[rate]))
    assert statuses(sweep) == dict.fromkeys(RATES[:5], "paused") | {1.6e-2: "pending"}


def test_a_run_that_diverges_loses_and_one_that_was_made_before_keeps_its_place():
    sweep = make(Path("nowhere"))
    runs = tuning_runs(sweep)
    ends = {5e-4: 9.0, 2e-3: math.inf, 4e-3: math.inf}
    halved = halve(
        runs,
        HalvingConfig(eta=3),
        lambda run, step: None if run.learning_rate in ends else loss(run),
        lambda run: ends.get(run.learning_rate),
    )
    dropped = {run.learning_rate for run in runs if run.name in halved.dropped}
    assert dropped == {8e-3, 1.6e-2}  # two of six go on: the one made before, and 1e-3
    assert not halved.next_pause


def test_pauses_are_eta_times_as_far_each(tmp_path):
    assert HalvingConfig(eta=3).pauses == pytest.approx([1 / 3])
    assert HalvingConfig(eta=3, fraction=1 / 27).pauses == pytest.approx([1 / 27, 1 / 9, 1 / 3])
    assert HalvingConfig(eta=2, fraction=0.3).pauses == pytest.approx([0.3, 0.6])
    assert HalvingConfig().pauses == ()
    sweep = make(tmp_path)
    runs = tuning_runs(sweep)
    # Of six runs three end after a quarter and one of the others after a half.
    saved = runs[0].flops * (3 * 0.75 + 1 * 0.5)
    (note,) = plan_notes(sweep, runs, None)
    assert f"saves {saved:.3g} FLOPs" in note


def test_a_size_is_one_shards_and_widening_goes_on_from_the_winner(tmp_path):
    rates = [1e-3, 2e-3, 4e-3]
    family = {"base": "matmulfree", "learning_rates": rates}
    sweep = make(tmp_path, families=[family], sizes=["1x64", "1x128"], widen_rates=1,
                 halving={"eta": 3})  # fmt: skip
    parts = [{run.size for run in shard(sweep, tuning_runs(sweep), i, 2)} for i in (0, 1)]
    assert parts == [{"1x64"}, {"1x128"}]

    def steep(run):
        return loss(run, 9e-3)

    pause_due(sweep, steep)
    finish(sweep, [r for r in snapshot(sweep).tuning if r.learning_rate == 4e-3], steep)
    assert statuses(sweep) == {1e-3: "dropped", 2e-3: "dropped", 4e-3: "done", 8e-3: "pending"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tuning": {}}, "halving.eta is 2: set tuning.tokens as well"),
        ({"halving": {"eta": 1}}, "halving.eta is 1"),
        ({"halving": {"fraction": 0.5}}, "halving.fraction is 0.5: give halving.eta"),
        ({"halving": {"eta": 2, "fraction": 1.0}}, "halving.fraction is 1"),
        ({"train": {"stop_at": 5}}, "train.stop_at is 5: leave it out"),
    ],
)
def test_what_cannot_be_halved_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **change)


def test_a_record_of_a_pause_that_is_damaged_or_of_another_run_is_named(tmp_path):
    sweep = make(tmp_path)
    pause_due(sweep)
    path = next((tmp_path / "pauses").iterdir())
    other = make(tmp_path, train={**sweep.train, "z_loss": 0.1})
    with pytest.raises(SweepError, match="was run with other settings"):
        snapshot(other)
    for text in ("{", '{"config_hash": "a"}', '{"config_hash": "a", "losses": [[1]]}'):
        path.write_text(text)
        with pytest.raises(SweepError, match=r"pauses/.*\.json .*; delete it, and the run pauses"):
            snapshot(sweep)
