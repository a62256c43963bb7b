"""Who may write to a run directory."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.config import OptimizerConfig, TrainConfig
from mmfree_jax.config_io import to_dict
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.presets import preset
from mmfree_jax.saved.run_directory import check_same_run, load_config, lock_run_dir, write_config

ROOT = Path(__file__).parents[2]

_HOLD = """
import sys, time
from pathlib import Path
from mmfree_jax.saved.run_directory import lock_run_dir
with lock_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_dies_with_its_process(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(CheckpointError, match=f"in use by another job.*{process.pid}"),
            lock_run_dir(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with lock_run_dir(tmp_path):
        pass


def test_the_lock_is_let_go_at_the_end(tmp_path):
    for _ in range(2):
        with lock_run_dir(tmp_path / "new" / "run"):
            assert (tmp_path / "new" / "run").is_dir()


def test_the_config_comes_back(tmp_path):
    write_config(tmp_path, preset("370M"))
    assert load_config(tmp_path) == preset("370M")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_missing_or_malformed_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match="give the folder of a training run"):
        load_config(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path)


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
