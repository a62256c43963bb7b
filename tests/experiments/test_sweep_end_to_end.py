"""A branched sweep through the real trainer, to the fitter's table and the loss curves."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quick_compilation

from mmfree_jax.config_io import dump_yaml
from mmfree_jax.data import writer
from mmfree_jax.experiments.cli import sweep as cli
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.sweep.branches import kept_steps
from mmfree_jax.experiments.sweep.config import load_sweep
from mmfree_jax.experiments.sweep.curves import load_curve
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.process import child_environment
from mmfree_jax.experiments.sweep.state import snapshot
from mmfree_jax.experiments.sweep.table import read_results

# Trains a config until it kills itself after step 20, once the checkpoint of step 8 is whole.
_KILLED = """
import os, pathlib, signal, sys, time
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.train.training import train
def kill(step):
    if step == 20:
        while not pathlib.Path(sys.argv[2], "checkpoints", "8", "manifest.json").is_file():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
train(resolve_config(["--config", sys.argv[1], "--run-dir", sys.argv[2]]), on_step=kill)
"""


@pytest.mark.slow
def test_a_branched_sweep_from_config_to_fit(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"we hold these truths to be self evident ", np.uint8)
    splits = {s: [np.tile(letters, int(rng.integers(5, 40))) for _ in range(n)]
              for s, n in (("train", 40), ("heldout", 8))}  # fmt: skip
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    writer.write_dataset(tmp_path / "data", splits, identity)

    def config_file(name, schedule, tokens, optimizer):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"""
out: {tmp_path / name}
families: [{{base: matmulfree, learning_rates: [1e-2]}}]
sizes: [1x32]
tokens: {tokens}
schedule: {schedule}
warmup_fraction: 0.2
train:
  batch_size: 8
  model: {{intermediate_size: 32, compute_dtype: float32, remat: none}}
  optimizer: {optimizer}
  data: {{paths: [{tmp_path / "data"}], seq_len: 32}}
  eval: {{every_steps: 8, batches: 2, sample_tokens: 0}}
  log: {{every_steps: 1, ternary_every_steps: 4, tensorboard: false, progress: none}}
""")
        return path

    # 10 and 40 steps of 256 tokens, of which 8 and 32 are the trunk's.
    path = config_file("out", "wsd-branched", [2560, 10240], "{}")
    out, (trunk,) = tmp_path / "out", snapshot(load_sweep(path)).trunks
    # One device, whatever this process simulates; one cache for all.
    monkeypatch.setenv("XLA_FLAGS", quick_compilation.FLAGS)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "trunk.yaml").write_text(dump_yaml(trunk.config))
    command = [sys.executable, "-c", _KILLED, tmp_path / "trunk.yaml", out / "trunks" / trunk.name]
    killed = subprocess.run(command, env=child_environment(), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert kept_steps(out / "trunks" / trunk.name) == [8]

    assert cli.run([str(path)]) == 0
    text = capsys.readouterr().out
    assert "measured here" in text
    assert "branched: 1 trunks carry 2 decays" in text
    assert "without trunks: 2 runs, " in text
    rows = {row["tokens"]: row for row in read_results(out)}
    assert {t: row["trunk_tokens"] for t, row in rows.items()} == {"2560": "2048", "10240": "8192"}
    for row in rows.values():
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
    curve = load_curve(Path(out / "runs" / rows["10240"]["run"]))
    assert list(curve.steps) == list(range(33, 41))
    assert len(curve.flip_share)
    assert cli.run([str(path), "--device", "H100"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out

    # Alone, with the warm-up of 2 steps and a pause after 20, the longer run is the same.
    alone = config_file("alone", "train", [10240], "{schedule: wsd}")
    text = alone.read_text().replace("warmup_fraction: 0.2", "warmup_fraction: 0.05")
    text = text.replace("[1e-2]", "[1e-2, 1e-5]")
    alone.write_text(text + "tuning: {tokens: 10240}\nhalving: {eta: 2}\n")
    assert cli.run([str(alone), "--device", "H100"]) == 0
    assert "lr1e-05-s0: loss" in (said := capsys.readouterr().out)
    assert said.count("at step 20 of 40, where it pauses") == 2
    (row,) = read_results(tmp_path / "alone")
    there = rows["10240"]
    same = ("run", "config_hash", "tokens", "flops", "loss", "train_loss", "warmup_steps")
    assert {name: row[name] for name in same} == {name: there[name] for name in same}
    assert row["trunk"] == ""
    one = load_curve(tmp_path / "alone" / "runs" / row["run"])
    np.testing.assert_array_equal(one.loss[32:], curve.loss)
    np.testing.assert_array_equal(one.grad_norm[32:], curve.grad_norm)
    np.testing.assert_array_equal(one.rate[32:], curve.rate)
    assert os.listdir(tmp_path / "cache")

    # Nothing branches from a trunk that has seen other data.
    (out / "results.csv").unlink()
    assert snapshot(load_sweep(path)).trunks
    shutil.rmtree(tmp_path / "data")
    writer.write_dataset(tmp_path / "data", {s: rows[::-1] for s, rows in splits.items()}, identity)
    with pytest.raises(SweepError, match="is a trunk that was trained on other data"):
        snapshot(load_sweep(path))
