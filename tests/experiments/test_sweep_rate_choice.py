"""Which rates a sweep tries and chooses, with a trainer that only pretends."""

import csv
from pathlib import Path

import pytest
from quick_trainer import quiet, starts

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.report import best_rows, status_text
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import RESULTS, read_results


def test_shards_share_the_work_and_the_tuned_rates(make_sweep, trainer):
    sweep = make_sweep(
        tuning={"tokens": 1e4, "sizes": ["rung-1M", "rung-3M"]},
        sizes=["rung-1M", "rung-3M", "rung-7M"],
        rates=(1e-3, 2e-3, 2.667e-3, 4e-3, 8e-3),
        tokens=[1e4, 2e4],
    )
    first = run_sweep(sweep, Options(shard=(0, 2)), say=quiet, command=trainer)
    assert len(first.done) == 5
    assert first.waiting == 3
    second = run_sweep(sweep, Options(shard=(1, 2)), say=quiet, command=trainer)
    assert second.waiting == 0
    third = run_sweep(sweep, Options(shard=(0, 2)), say=quiet, command=trainer)
    done = [*first.done, *second.done, *third.done]
    assert len(done) == len(set(done)) == 10 + 6 - 2  # 2 main runs were tuning runs
    rates = {size: c.rate for (_, size), c in snapshot(sweep).choices.items()}
    assert rates["rung-1M"] == 4e-3
    assert rates["rung-3M"] == 2.667e-3
    # A power law through the two others, by parameters.
    assert 1.5e-3 < rates["rung-7M"] < 2.667e-3
    assert snapshot(sweep).choices["matmulfree", "rung-7M"].is_transferred
    mains = [r for r in read_results(Path(sweep.out)) if r["size"] == "rung-7M"]
    assert {float(r["learning_rate"]) for r in mains} == {rates["rung-7M"]}


def test_a_diverged_rate_loses_but_a_broken_one_blocks(make_sweep, trainer):
    tuning = {"tokens": 1e4}
    sweep = make_sweep(tuning=tuning, rates=(2e-3, 4e-3, 0.5), sizes=["rung-1M"], tokens=[2e4])
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert len(tally.failed) == 1
    assert [
        r["learning_rate"] for r in read_results(Path(sweep.out)) if r["tokens"] == "19968"
    ] == ["0.004"]
    blocked = make_sweep(
        out=sweep.out + "2", tuning=tuning, rates=(2e-3, 4e-3, 0.7), sizes=["rung-1M"]
    )
    assert run_sweep(blocked, Options(), say=quiet, command=trainer).waiting == 1


def test_a_wider_list_of_rates_goes_on_from_the_old_one(make_sweep, trainer):
    tuning = {"tokens": 1e4}
    narrow = make_sweep(tuning=tuning, rates=(1e-3, 2e-3), sizes=["rung-1M"], tokens=[2e4])
    assert len(run_sweep(narrow, Options(), say=quiet, command=trainer).done) == 3
    assert snapshot(narrow).choices["matmulfree", "rung-1M"].at_edge
    wide = make_sweep(
        tuning=tuning, rates=(1e-3, 2e-3, 4e-3, 8e-3), sizes=["rung-1M"], tokens=[2e4]
    )
    assert len(run_sweep(wide, Options(), say=quiet, command=trainer).done) == 3
    choice = snapshot(wide).choices["matmulfree", "rung-1M"]
    assert (choice.rate, choice.at_edge) == (4e-3, False)
    assert [float(r["learning_rate"]) for r in best_rows(snapshot(wide))] == [4e-3]
    assert "5 done; " in status_text(snapshot(wide))


def test_rates_are_added_in_the_call_that_finds_the_best_at_an_end(make_sweep, trainer):
    sweep = make_sweep(tuning={"tokens": 1e4}, rates=(1e-3, 2e-3), sizes=["rung-1M"], tokens=[2e4],
                 widen_rates=3)  # fmt: skip
    tally = run_sweep(sweep, Options(), say=quiet, command=trainer)
    assert sorted(tally.done) == [
        "matmulfree-rung-1M-t19.97K-lr0.004-s0",
        *(f"matmulfree-rung-1M-t9.984K-lr0.00{digit}-s0" for digit in (1, 2, 4, 8)),
    ]
    assert not run_sweep(sweep, Options(), say=quiet, command=trainer).done


def test_paused_runs_go_on_in_the_same_call_and_the_others_stay(make_sweep, trainer):
    rates = (1e-3, 2e-3, 4e-3, 8e-3)
    sweep = make_sweep(tuning={"tokens": 1e4}, rates=rates, sizes=["rung-1M"], tokens=[2e4],
                 halving={"eta": 2, "fraction": 0.25})  # fmt: skip
    tally = run_sweep(sweep, Options(parallel=2), say=quiet, command=trainer)
    name = "matmulfree-rung-1M-t9.984K-lr{}-s0".format
    # Pauses after 10 and 20 of 39 steps; the main run is of the best of them.
    assert sorted(tally.done) == ["matmulfree-rung-1M-t19.97K-lr0.004-s0", name(0.004)]
    legs = {run: len(s) for run, s in starts(sweep).items() if run != tally.done[-1]}
    assert legs == {name(0.001): 1, name(0.002): 2, name(0.004): 3, name(0.008): 1}
    assert len(tally.paused) == 6
    # As after a kill between a pause and its record: it is only recorded.
    out = Path(sweep.out)
    (out / "pauses" / f"{name(0.008)}.json").unlink()
    assert run_sweep(sweep, Options(), say=quiet, command=trainer).paused == [name(0.008)]
    assert sum(map(len, starts(sweep).values())) == 1 + 2 + 3 + 1 + 1


def test_a_size_may_have_rates_of_its_own(make_sweep, trainer):
    own = {"base": "matmulfree", "learning_rates": [1e-3, 2e-3],
           "learning_rates_at": {"rung-3M": [2e-3, 2.667e-3, 4e-3]}}  # fmt: skip
    sweep = make_sweep(families=[own], tuning={"tokens": 1e4}, tokens=[2e4])
    assert len(run_sweep(sweep, Options(), say=quiet, command=trainer).done) == 2 + 3 + 2
    choices = snapshot(sweep).choices
    assert choices["matmulfree", "rung-1M"].rate == 2e-3
    assert choices["matmulfree", "rung-3M"].rate == 2.667e-3
    for wrong, message in (
        ({"rung-7M": [1e-3]}, r"choose among sizes \(rung-1M, rung-3M\)"),
        ({"rung-3M": 1e-3}, "rung-3M is 0.001: give a list of rates"),
        ({"rung-3M": [0.0]}, "use values above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_sweep(families=[own | {"learning_rates_at": wrong}])


def test_one_seed_does_not_choose_for_itself(make_sweep, trainer):
    sweep = make_sweep(rates=(2e-3, 4e-3), sizes=["rung-1M"], seeds=[0, 1])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    table = Path(sweep.out) / RESULTS
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:  # on the second seed the other rate is the better one
        if row["seed"] == "1":
            row["loss"] = "1.0" if float(row["learning_rate"]) == 2e-3 else "5.0"
    with table.open("w", newline="") as stream:
        writer_ = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer_.writeheader()
        writer_.writerows(rows)
    best = best_rows(snapshot(sweep))
    assert {(r["seed"], float(r["learning_rate"])) for r in best} == {("0", 4e-3), ("1", 4e-3)}
