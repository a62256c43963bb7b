"""Which settings of a run may change when it is resumed."""

import dataclasses
from pathlib import Path

import pytest

from mmfree_jax.config import OptimizerConfig, TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import ConfigError
from mmfree_jax.train.same_run import check_same_run


def _prolong(step, *, old=100, new=200, **optimizer):
    """Goes on at `step` of a run of `old` steps with `new` steps."""
    before = TrainConfig(steps=old, optimizer=OptimizerConfig(**optimizer))
    after = dataclasses.replace(before, steps=new)
    check_same_run(Path("run"), to_dict(before), after, step)


def test_steps_may_change_where_the_past_does_not():
    _prolong(100, schedule="constant", warmup_steps=10)
    _prolong(80, schedule="wsd", decay_fraction=0.2)
    _prolong(0, schedule="cosine")
    with pytest.raises(ConfigError, match=r"steps 100 -> 200 \(the 'wsd' schedule"):
        _prolong(90, schedule="wsd", decay_fraction=0.2)
    with pytest.raises(ConfigError, match="steps 100 -> 200"):
        _prolong(10, schedule="cosine")
    with pytest.raises(ConfigError, match="already made 60"):
        _prolong(60, schedule="constant", new=50)


def test_a_field_newer_than_the_checkpoint_has_its_default():
    saved = to_dict(TrainConfig())
    del saved["model"]["short_conv"]
    check_same_run(Path("run"), saved, TrainConfig(), 5)
    saved["model"]["unknown"] = 1
    with pytest.raises(ConfigError, match=r"model\.unknown"):
        check_same_run(Path("run"), saved, TrainConfig(), 5)
