"""Parts of a sweep: the runs are those of the whole."""

import pytest

from mmfree_jax.config_io import from_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.branches import with_trunks
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.parts import part_of
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.planned_run import config_hash

CELLS = [
    {"size": "2x64", "tokens": [1e5, 2e5], "seeds": [0, 1]},
    {"size": "3x96", "tokens": [1e5], "families": ["transformer"]},
    {"size": "4x96", "tokens": [1e5], "families": ["matmulfree", "transformer"]},
]


def sweep(**values):
    base = {
        "families": [{"base": "matmulfree", "learning_rates": [4e-3]},
                     {"base": "transformer", "learning_rates": [1e-3],
                      "learning_rates_at": {"3x96": [2e-3]}}],
        "cells": CELLS, "schedule": "wsd-branched", "warmup_fraction": 0.1,
        "train": {"batch_size": 4, "data": {"paths": ["nowhere"], "seq_len": 64}},
    }  # fmt: skip
    return from_dict(SweepConfig, base | values)


def hashes(found):
    return {run.name: config_hash(run.config) for run in main_runs(found)}


@pytest.mark.parametrize(
    ("chosen", "count", "kept"),
    [
        ({}, 11, lambda name: True),
        ({"families": ["transformer"]}, 6, lambda name: name.startswith("transformer")),
        ({"sizes": ["2x64", "3x96"]}, 9, lambda name: "4x96" not in name),
        ({"seeds": [1]}, 4, lambda name: name.endswith("-s1")),
        ({"families": ["matmulfree"], "sizes": ["2x64"], "seeds": [0]}, 2,
         lambda name: "matmulfree-2x64" in name and name.endswith("-s0")),
    ],
)  # fmt: skip
def test_a_part_has_those_runs_of_the_whole(chosen, count, kept):
    whole, part = hashes(sweep()), hashes(part_of(sweep(), **chosen))
    assert len(part) == count
    assert part == {name: digest for name, digest in whole.items() if kept(name)}


def test_parts_have_the_trunks_of_the_whole():
    whole = {run.name: run.config for run in with_trunks(main_runs(sweep()), set())[0]}
    parts = {}
    for seed in (0, 1):
        part = part_of(sweep(), seeds=[seed])
        parts |= {run.name: run.config for run in with_trunks(main_runs(part), set())[0]}
    assert len(whole) == 4  # two families, two seeds, at the one size with two budgets
    assert parts == whole


@pytest.mark.parametrize(
    ("values", "chosen", "message"),
    [
        ({}, {"families": ["mamba"]}, "families is .*no 'mamba', choose among matmulfree, trans"),
        ({}, {"sizes": ["2x65"]}, "sizes is .*no '2x65'"),
        ({}, {"seeds": [7]}, "seeds is .*no 7, choose among 0, 1"),
        ({}, {"families": ["matmulfree"], "sizes": ["3x96"]}, "none of the sweep's is in this"),
        ({}, {"sizes": ["3x96"], "seeds": [1]}, "none of the sweep's is in this part"),
        ({"tuning": {"tokens": 1e5, "sizes": ["2x64"]}}, {"sizes": ["4x96"]},
         "the rate of one follows from the sizes of tuning.sizes"),
        ({"tuning": {"tokens": 1e5}}, {"seeds": [1]}, "rates are chosen by the runs of seed 0"),
        ({"replicates": {"sizes": ["4x96"], "seeds": [2]}}, {"seeds": [0]}, "with replicates"),
        ({"cells": [], "sizes": ["2x64"], "tokens": [1e5]}, {"sizes": ["3x96"]}, "no '3x96'"),
    ],
)  # fmt: skip
def test_what_is_no_part(values, chosen, message):
    if "cells" in values:  # without the rates of another size
        values = values | {"families": [{"base": "matmulfree", "learning_rates": [4e-3]}]}
    with pytest.raises(ConfigError, match=message):
        part_of(sweep(**values), **chosen)
