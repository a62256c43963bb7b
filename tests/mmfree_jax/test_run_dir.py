"""Who may write to a run directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.presets import preset
from mmfree_jax.saved.run_directory import load_config, lock_run_dir, write_config

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
