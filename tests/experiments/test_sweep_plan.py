"""Plans: which runs a config asks for, what they cost, and what it refuses."""

import dataclasses
import math

import pytest

from mmfree_jax.config import replace_model
from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.axes import AS_GIVEN
from mmfree_jax.experiments.sweep.config import SweepConfig, load_sweep
from mmfree_jax.experiments.sweep.cost import DeviceRate, device_from_name, estimate
from mmfree_jax.experiments.sweep.plan import (
    flops_per_token,
    main_runs,
    parameters,
    parse_shard,
    shard,
    tuning_runs,
    without_repeats,
)
from mmfree_jax.experiments.sweep.planned_run import config_hash
from mmfree_jax.experiments.sweep.rates import Choice, best_rate, choose_rates, transfer

TRAIN = {"batch_size": 4, "data": {"paths": ["nowhere"], "seq_len": 64}}
BOTH = [
    {"base": "matmulfree", "learning_rates": [4e-3, 8e-3]},
    {"base": "transformer", "learning_rates": [1e-3, 2e-3]},
]


def make(**values):
    base = {"families": BOTH, "sizes": ["rung-1M", "rung-3M"], "tokens": [1e5], "train": TRAIN}
    return from_dict(SweepConfig, {**base, **values})


def test_a_grid_is_the_product_of_its_axes():
    sweep = make(tokens=[1e5, 3e5], seeds=[0, 1], replicates={"sizes": ["rung-3M"], "seeds": [7]})
    runs = main_runs(sweep)
    assert len(runs) == 2 * 2 * 2 * (2 + 3)  # families, budgets, rates, seeds of the two sizes
    assert len({r.name for r in runs}) == len(runs)
    assert len({config_hash(r.config) for r in runs}) == len(runs)
    for run in runs:
        target = min((1e5, 3e5), key=lambda t: abs(t - run.tokens))
        assert abs(run.tokens - target) <= 4 * 64 / 2
        assert run.flops == pytest.approx(flops_per_token(run.config) * run.tokens)
        assert run.config.data.seed == run.config.seed == run.seed
    assert {r.seed for r in runs if r.size == "rung-1M"} == {0, 1}
    assert [r.flops for r in runs] == sorted(r.flops for r in runs)


def test_tokens_per_parameter_follow_the_size():
    sweep = make(tokens=[], tokens_per_parameter=[2.0], count="total")
    for run in main_runs(sweep):
        assert run.tokens / parameters(run.config, "total") == pytest.approx(2, rel=1e-3)


def test_flop_budgets_are_spent_at_each_size():
    sweep = make(tokens=[], flop_budgets=[1e13, 4e13])
    runs = main_runs(sweep)
    assert {r.budget for r in runs} == {1e13, 4e13}
    for run in runs:
        assert run.flops == pytest.approx(run.budget, rel=1e-2)


def test_a_range_of_ratios_leaves_sizes_out():
    runs = main_runs(make(tokens=[], flop_budgets=[1e14], tokens_per_parameter=[3, 30]))
    assert {r.size for r in runs} == {"rung-1M"}  # 3M would get 0.8 tokens a parameter


def test_cells_have_budgets_families_and_seeds_of_their_own():
    cells = [{"size": "rung-1M", "tokens": [1e5, 3e5]},
             {"size": "3x96", "tokens": [2e5], "families": ["transformer"],
              "seeds": [0, 1]}]  # fmt: skip
    sweep = make(sizes=[], tokens=[], cells=cells, tuning={"tokens": 1e5})
    found = {(r.family, r.size, r.tokens, r.seed) for r in main_runs(sweep)}
    assert found == {
        ("matmulfree", "rung-1M", 100096, 0), ("matmulfree", "rung-1M", 300032, 0),
        ("transformer", "rung-1M", 100096, 0), ("transformer", "rung-1M", 300032, 0),
        ("transformer", "3x96", 199936, 0), ("transformer", "3x96", 199936, 1),
    }  # fmt: skip
    tuned = {(r.family, r.size) for r in tuning_runs(sweep)}
    assert tuned == {(family, size) for family, size, _, _ in found}


def test_tuning_comes_first_and_gives_the_rates():
    sweep = make(tuning={"tokens": 1e5, "sizes": ["rung-1M"]}, tokens=[1e5, 2e5])
    tuning = tuning_runs(sweep)
    assert {(r.family, r.learning_rate) for r in tuning} == {
        ("matmulfree", 4e-3), ("matmulfree", 8e-3), ("transformer", 1e-3), ("transformer", 2e-3),
    }  # fmt: skip
    blind = main_runs(sweep)
    assert not any(r.rate_known for r in blind)
    # Of 8 main runs, 2 (one a family) will be the winners of the tuning stage.
    assert len(without_repeats(sweep, [*tuning, *blind])) == 4 + 8 - 2
    choices = {
        (family, size): Choice(family, size, 1e6, rate, 2.0, False)
        for family, rate in (("matmulfree", 8e-3), ("transformer", 1e-3))
        for size in sweep.sizes
    }
    known = main_runs(sweep, choices)
    assert len(without_repeats(sweep, [*tuning, *known])) == 4 + 8 - 2
    assert [r.name.replace("lrtuned", "") for r in blind] == [
        r.name.replace("lr0.008", "").replace("lr0.001", "") for r in known
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_shards_are_disjoint_and_complete(count):
    sweep = make(tokens=[1e5, 3e5], seeds=[0, 1, 2])
    runs = main_runs(sweep)
    parts = [shard(sweep, runs, i, count) for i in range(count)]
    names = [r.name for part in parts for r in part]
    assert sorted(names) == sorted(r.name for r in runs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["2/2", "1", "a/2", "-1/2", "1/0", "1/2/3"])
def test_bad_shards_are_refused(text):
    with pytest.raises(ConfigError, match="shard is"):
        parse_shard(text)


def test_the_hash_ignores_where_and_keeps_what():
    config = main_runs(make())[0].config
    elsewhere = dataclasses.replace(
        config, run_dir="x", data=dataclasses.replace(config.data, paths=("y",))
    )
    assert config_hash(elsewhere) == config_hash(config)
    other = dataclasses.replace(config, batch_size=8)
    assert config_hash(other) != config_hash(config)
    wider = replace_model(config, mup=True)
    assert config_hash(wider) != config_hash(config)
    assert config_hash(replace_model(wider, mup_base_width=64)) != config_hash(wider)
    assert config_hash(replace_model(config, head_dim=32)) != config_hash(config)
    # As an earlier version wrote it into its tables, which knew neither branches nor muP.
    assert config_hash(config) == "96ccc31dbbc164c6"


def test_the_estimate_adds_up():
    runs = main_runs(make())
    sweep = make(utilisation=0.5, overhead_seconds=10.0)
    fast = DeviceRate("H100 SXM", 1, 1e15, False)
    cost = estimate(sweep, runs, [], fast)
    assert cost.flops == pytest.approx(sum(r.flops for r in runs))
    training = sum(r.flops / (1e15 * 0.5 * r.config.model.hidden_size / 1024) for r in runs)
    assert cost.seconds == pytest.approx(training + 10 * len(runs))
    assert "data sheet" in cost.basis
    assert estimate(sweep, runs, [], fast, 4).seconds == pytest.approx(training + 2.5 * len(runs))
    measured = DeviceRate("cpu", 1, 1e11, True)
    over_four = estimate(sweep, runs, [], fast, 1, gpus=4)
    assert over_four.seconds == pytest.approx((training + 10 * len(runs)) / 4)
    assert "4 GPUs" in over_four.basis
    longest = max(r.flops / (1e15 * 0.5 * r.config.model.hidden_size / 1024) for r in runs)
    many = estimate(sweep, runs, [], fast, 1, gpus=99)
    assert many.seconds == pytest.approx(10 + longest)
    assert "measured here" in estimate(sweep, runs, [], measured).basis
    rows = [{"device": "H100 SXM", "parallel": "1", "family": r.family, "size": r.size,
             "tokens": str(r.tokens), "tokens_per_s": "1000", "wall_s": str(r.tokens / 1000 + 5)}
            for r in runs]  # fmt: skip
    again = estimate(sweep, runs, rows, fast)
    assert again.seconds == pytest.approx(sum(r.tokens for r in runs) / 1000 + 5 * len(runs))
    assert "finished runs" in again.basis
    assert device_from_name("NVIDIA H100 80GB HBM3").flops == pytest.approx(989.4e12)


def test_the_best_rate_is_the_lowest_loss():
    assert best_rate({1e-3: 3.0, 2e-3: 2.8, 4e-3: 2.9}, "grid") == (2e-3, 2.8, False)
    assert best_rate({1e-3: 2.8, 2e-3: 2.8}, "grid") == (1e-3, 2.8, True)
    assert best_rate({1e-3: 2.8, 2e-3: math.inf}, "grid") == (1e-3, 2.8, True)
    rates = [1e-3, 2e-3, 4e-3]
    truth = 2.3e-3
    losses = {r: 2.0 + 0.1 * math.log(r / truth) ** 2 for r in rates}
    rate, _, at_edge = best_rate(losses, "parabola")
    assert rate == pytest.approx(truth, rel=1e-3)
    assert not at_edge
    with pytest.raises(ValueError, match="every rate diverged"):
        best_rate({1e-3: math.inf}, "grid")


def test_a_rate_is_carried_to_other_sizes_by_a_power_law():
    def losses(best):
        return {best * f: 2.0 + abs(math.log(f)) for f in (0.5, 1.0, 2.0)}

    params = {("a", "1"): 1e6, ("a", "4"): 4e6, ("a", "16"): 16e6, ("b", "16"): 16e6}
    tried = {("a", "1"): {AS_GIVEN: losses(8e-3)}, ("a", "4"): {AS_GIVEN: losses(4e-3)}}
    found = choose_rates(tried, params, "grid")
    assert found["a", "16"].rate == pytest.approx(2e-3, rel=1e-3)  # slope -1/2
    assert found["a", "16"].is_transferred
    assert ("b", "16") not in found
    assert transfer([found["a", "1"]], 1e9) == pytest.approx(8e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": ["tiny"]}, "unknown config key 'size': did you mean 'sizes'"),
        ({"families": []}, "families is"),
        ({"families": [{"bse": "transformer"}]}, r"families\[0\].bse"),
        ({"families": [{"base": "mamba"}]}, "choose one of matmulfree, transformer"),
        ({"families": [*BOTH, BOTH[0]]}, "give each value once"),
        ({"sizes": ["rung-2M"]}, "sizes is 'rung-2M'"),
        ({"sizes": ["3x96", "03x96"]}, "sizes is '03x96': give LAYERSxWIDTH"),
        ({"sizes": []}, "sizes is"),
        ({"tokens": []}, "budgets is"),
        ({"tokens": [-1]}, "tokens is .*: set a value above 0"),
        ({"tokens": "many"}, "tokens is 'many': give a list"),
        ({"flop_budgets": [1e15]}, "budgets is"),
        ({"train": {"steps": 5}}, "train.steps is 5: leave it out"),
        (
            {"train": {"optimizer": {"learning_rate": 1}}},
            "families.learning_rates, warmup_fraction stand for it",
        ),
        # As flags spell them.
        ({"train": {"stop-at": 5}}, "train.stop_at is 5: leave it out"),
        ({"families": [{"train": {"max-minutes": 5}}]}, "train.max_minutes is 5: leave it out"),
        (
            {"train": {"optimizer": {"learning-rate": 1}}},
            r"train\.optimizer\.learning_rate is 1: families\.learning_rates, warmup_fraction",
        ),
        (
            {"axes": {"weight_decay": [0, 1]}, "train": {"optimizer": {"weight-decay": 1}}},
            "axes.weight_decay is .*: leave it out of train",
        ),
        (
            {"train": {"batch-size": 5, "batch_size": 6}},
            "'train.batch_size' occurs twice, as 'batch_size' too",
        ),
        ({"train": {"batchsize": 5}}, "train.batchsize"),
        ({"train": {"model": {"mixer": "x"}}}, "model.mixer is 'x': choose one of mlgru, at"),
        ({"train": {"model": {"remat": "x"}}}, "train.model.remat is 'x'"),
        ({"tuning": {"sizes": ["rung-1M"]}}, "tuning.sizes"),
        ({"tuning": {"tokens": 1e5, "sizes": ["tiny"]}}, "choose among sizes"),
        ({"tuning": {"tokens": 1e5}, "families": [{}]}, "tuning needs rates"),
        ({"replicates": {"sizes": ["rung-1M"], "seeds": [0]}}, "use seeds that `seeds` lacks"),
        ({"families": [{}], "sizes": ["3x96"]}, "has no preset rate"),
        ({"seeds": []}, "seeds is"),
        ({"cells": [{"size": "tiny", "tokens": [1e5]}]}, "budgets is"),
        ({"tokens": [], "cells": [{"size": "tiny", "tokens": [1e5]}]}, "cells name theirs"),
        (
            {"tokens": [], "sizes": [], "cells": [{"size": "big", "tokens": [1e5]}]},
            "sizes is 'big'",
        ),
        ({"tokens": [], "sizes": [], "cells": [{"size": "tiny", "tokens": []}]}, "cells.tokens"),
        (
            {"tokens": [], "sizes": [], "cells": [{"size": "tiny", "tokens": [1e5]}] * 2},
            "cells is 'tiny at 100000 tokens': give it once for matmulfree and seed 0",
        ),
        (
            {"tokens": [], "sizes": [], "cells": [{"size": "tiny", "tokens": [1e5], "seeds": [1]}]},
            "keep 0, the first of",
        ),
        (
            {
                "tokens": [],
                "sizes": [],
                "cells": [{"size": "tiny", "tokens": [1e5], "families": ["mamba"]}],
            },
            "choose among families",
        ),
    ],
)
def test_bad_configs_are_refused_in_one_line(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(**change)
    assert "\n" not in str(caught.value)


def test_budgets_of_too_few_steps_or_too_alike_are_refused():
    with pytest.raises(ConfigError, match=r"are 4 steps .* raise the budget or lower"):
        main_runs(make(tokens=[1e3]))
    with pytest.raises(ConfigError, match="occurs twice"):
        main_runs(make(tokens=[1e5, 1.00001e5]))


def test_files_are_read_strictly(tmp_path):
    path = tmp_path / "s.yaml"
    with pytest.raises(ConfigError, match=r"s\.yaml: No such file"):
        load_sweep(path)
    path.write_text("sizes: [rung-1M\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_sweep(path)
    path.write_text("families: [{base: matmulfree}]\nsizes: [rung-1M]\ntokens: [1e6]\n")
    sweep = load_sweep(path, out="there", data=("some",))
    assert sweep.out == "there"
    assert main_runs(sweep)[0].config.data.paths == ("some",)
    assert main_runs(sweep)[0].learning_rate == 1.6e-2  # the preset's
