"""Two tiny runs through the real trainer, to the fitter's table and the loss curves."""

import os
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax.data import writer
from mmfree_jax.experiments.cli import sweep as cli
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.sweep.curves import load_curve
from mmfree_jax.experiments.sweep.table import read_results


@pytest.mark.slow
def test_two_runs_from_config_to_fit(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"we hold these truths to be self evident ", np.uint8)
    splits = {s: [np.tile(letters, int(rng.integers(5, 40))) for _ in range(n)]
              for s, n in (("train", 40), ("heldout", 8))}  # fmt: skip
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    writer.write_dataset(tmp_path / "data", splits, identity)
    path = tmp_path / "sweep.yaml"
    path.write_text(f"""
out: {tmp_path / "out"}
families:
  - {{base: matmulfree, learning_rates: [1e-2]}}
  - {{base: transformer, learning_rates: [3e-3]}}
sizes: [1x32]
tokens: [4096]
train:
  batch_size: 8
  model: {{vocab_size: 256, intermediate_size: 32, compute_dtype: float32, remat: none}}
  data: {{paths: [{tmp_path / "data"}], seq_len: 32}}
  eval: {{every_steps: 8, batches: 2, sample_tokens: 0}}
  log: {{every_steps: 1, ternary_every_steps: 4, tensorboard: false, progress: none}}
""")
    # One device, whatever this process simulates.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert cli.run([str(path)]) == 0
    text = capsys.readouterr().out
    assert "measured here" in text
    out = tmp_path / "out"
    rows = read_results(out)
    assert {r["family"] for r in rows} == {"matmulfree", "transformer"}
    for row in rows:
        assert row["tokens"] == "4096"
        assert float(row["loss"]) < np.log(256)
        assert float(row["wall_s"]) > 0
    assert cli.report([str(path)]) == 0
    frame = read_runs([out / "best.csv"])
    assert len(frame) == 2
    # The table and the trainer's own directories tell the same.
    direct = read_runs([out / "runs"])
    order = np.argsort(frame.run), np.argsort(direct.run)
    np.testing.assert_allclose(frame.loss[order[0]], direct.loss[order[1]], rtol=1e-8)
    np.testing.assert_array_equal(frame.params[order[0]], direct.params[order[1]])
    np.testing.assert_allclose(frame.flops[order[0]], direct.flops[order[1]])
    name = next(r["run"] for r in rows if r["family"] == "matmulfree")
    curve = load_curve(Path(out / "runs" / name))
    assert len(curve.loss) == 16
    assert len(curve.flip_share) == 3
    assert os.listdir(out / "cache")
    assert cli.run([str(path)]) == 0
    assert "nothing was left to do" in capsys.readouterr().out
