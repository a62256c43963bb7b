"""`mmfree bench train` on a tiny model."""

import json
import math

import jax
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.cli import bench


def test_bench_train_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "sub" / "bench.json"
    argv = ["--preset", "tiny", "--batch-size", "8", "--data.seq-len", "16", "--out", str(out)]
    assert bench.train([*argv, "--groups", "2", "--steps-per-group", "1"]) == 0
    record = json.loads(out.read_text())
    result = record["measurement"]
    assert result["family"] == "matmulfree"
    assert result["devices"] == jax.device_count()
    # The rate and the median step time are one measurement.
    assert result["tokens_per_s"] == pytest.approx(8 * 16 / (result["step_ms"] / 1e3))
    assert 0 < result["loss"] < 1.1 * math.log(264)
    assert record["command"].startswith("mmfree bench train --preset tiny")
    assert "tokens/s" in capsys.readouterr().out


def test_bench_train_refuses_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match="batch_size"):
        bench.train(["--preset", "tiny", "--batch-size", "3", "--data.seq-len", "16"])
