"""Axes of a sweep beside the rate: batch size, beta2, weight decay, warm-up."""

import csv
import math
from pathlib import Path

import pytest
from sweep_results import finish

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.axes import Setting
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.plan import main_runs, tuning_runs
from mmfree_jax.experiments.sweep.planned_run import config_hash
from mmfree_jax.experiments.sweep.report import best_rows, plan_text, rates_text, write_report
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import COLUMNS, RESULTS, read_results

AXES = {"batch_size": [4, 6], "b2": [0.95, 0.99]}


def make(tmp_path, **values):
    base = {
        "out": str(tmp_path),
        "families": [{"base": "matmulfree", "learning_rates": [1e-3, 2e-3]}],
        "sizes": ["1x64", "1x128"],
        "tokens": [2e4],
        "axes": AXES,
        "train": {"data": {"paths": ["nowhere"], "seq_len": 64}},
    }
    return from_dict(SweepConfig, {**base, **values})


def loss_of(run):
    """Lowest at batch 6, b2 0.99 and the rate 2e-3; every batch size at another loss."""
    return (
        3
        + math.log(run.learning_rate / 2e-3) ** 2
        - 0.01 * run.config.batch_size
        - run.config.optimizer.b2
    )


def test_every_rate_is_tried_at_every_setting_on_the_same_tokens(tmp_path):
    sweep = make(tmp_path, axes=AXES | {"weight_decay": [0.1], "warmup_fraction": [0.0, 0.25]})
    runs = [r for r in main_runs(sweep) if r.size == "1x64"]
    assert len(runs) == len({r.name for r in runs}) == len({config_hash(r.config) for r in runs})
    assert len(runs) == 2 * 2 * 2 * 1 * 2
    # 2e4 tokens are 26.04 times the 12 rows of 64 tokens that both batch sizes divide.
    assert {r.tokens for r in runs} == {26 * 12 * 64}
    assert {(r.config.batch_size, r.config.steps) for r in runs} == {(4, 78), (6, 52)}
    assert {r.config.optimizer.weight_decay for r in runs} == {0.1}
    assert {(r.config.steps, r.config.optimizer.warmup_steps) for r in runs} == {
        (78, 0), (78, 20), (52, 0), (52, 13),
    }  # fmt: skip
    assert "matmulfree-1x64-t19.97K-lr0.001-b6-b2_0.99-wd0.1-warm0.25-s0" in {r.name for r in runs}
    assert "52, 78" in plan_text(runs, None)


def test_the_best_setting_is_tuned_with_the_rate_and_carried_to_other_sizes(tmp_path):
    sweep = make(tmp_path, tuning={"tokens": 2e4, "sizes": ["1x64"]}, tokens=[4e4])
    assert not any(run.rate_known for run in snapshot(sweep).main)
    finish(sweep, tuning_runs(sweep), loss_of)
    found = snapshot(sweep)
    assert len(found.tuning) == 8
    assert {(r.size, r.learning_rate, r.setting) for r in found.main} == {
        ("1x64", 2e-3, Setting(batch_size=6, b2=0.99)),
        ("1x128", 2e-3, Setting(batch_size=6, b2=0.99)),
    }
    assert all(r.config.batch_size == 6 and r.config.optimizer.b2 == 0.99 for r in found.main)
    assert "b6 b2_0.99" in rates_text(found, found.choices.values())


def test_without_tuning_one_setting_of_each_cell_counts(tmp_path):
    sweep = make(tmp_path, seeds=[0, 1])
    finish(
        sweep,
        main_runs(sweep),
        lambda run: 9 + loss_of(run) - 9 * (run.seed and run.setting.b2 < 0.97),
    )
    rows = best_rows(snapshot(sweep))
    assert len(rows) == 2 * 2
    assert {r["run"].split("lr")[1] for r in rows} == {"0.002-b6-b2_0.99-s0", "0.002-b6-b2_0.99-s1"}
    write_report(snapshot(sweep))
    with open(tmp_path / "rates.csv") as stream:
        chosen = list(csv.DictReader(stream))
    assert [(r["batch_size"], r["b2"], r["weight_decay"]) for r in chosen] == [
        ("6", "0.99", "")
    ] * 2


def test_each_setting_has_its_rates_widened(tmp_path):
    sweep = make(tmp_path, axes={"b2": [0.95, 0.99]}, sizes=["1x64"], widen_rates=1)
    best = {0.95: 4e-3, 0.99: 1.2e-3}
    finish(sweep, main_runs(sweep), lambda r: math.log(r.learning_rate / best[r.setting.b2]) ** 2)
    added = [r for r in snapshot(sweep).main if r.learning_rate not in (1e-3, 2e-3)]
    assert {(r.setting.b2, r.learning_rate) for r in added} == {(0.95, 4e-3), (0.99, 5e-4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"b2": [0.9, 0.9]}}, r"axes.b2 is \[0.9, 0.9\]: give each value once"),
        ({"axes": {"b2": [1.0]}}, "axes.b2"),
        ({"axes": {"batch_size": [0]}}, "axes.batch_size"),
        ({"axes": {"z_loss": [0.1]}}, "axes.z_loss"),
        ({"train": {"batch_size": 4}}, "axes.batch_size is .*: leave it out of train"),
        (
            {"families": [{"learning_rates": [1e-3], "train": {"optimizer": {"b2": 0.9}}}]},
            r"axes.b2 is .*: leave it out of families\[0\].train",
        ),
        (
            {"axes": {"warmup_fraction": [0.1]}, "warmup_fraction": 0.1},
            "warmup_fraction is 0.1: leave it out, or axes.warmup_fraction",
        ),
    ],
)
def test_axes_that_are_set_twice_or_cannot_be_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **change)


def test_a_table_from_before_there_were_axes_is_read_and_goes_on(tmp_path):
    sweep = make(tmp_path, axes={}, train={"batch_size": 4, **make(tmp_path).train})
    finish(sweep, main_runs(sweep)[:1], loss_of)
    path = Path(sweep.out) / RESULTS
    rows = list(csv.reader(path.open()))
    end = rows[0].index("finished_at") + 1  # the last column then
    assert {"batch_size", "b2", "weight_decay", "warmup_steps"} <= set(rows[0][end:])
    path.write_text("".join(",".join(row[:end]) + "\n" for row in rows))
    (row,) = read_results(tmp_path)
    assert row["batch_size"] == ""
    assert row["loss"] == rows[1][COLUMNS.index("loss")]
    finish(sweep, main_runs(sweep)[:2], loss_of)
    assert len(read_results(tmp_path)) == 2
