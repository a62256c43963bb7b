"""The commands of a sweep, with a trainer that only pretends, and what they refuse."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from quick_trainer import TRAINER, quiet

from mmfree_jax.data import writer
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.cli import sweep as cli
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.experiments.sweep.plan import main_runs
from mmfree_jax.experiments.sweep.runner import Options, run_sweep
from mmfree_jax.experiments.sweep.state import read_failures, snapshot


def test_another_sweep_or_other_data_in_the_folder_are_refused(make_sweep, trainer, tmp_path):
    sweep = make_sweep(rates=(4e-3,), sizes=["rung-1M"])
    run_sweep(sweep, Options(), say=quiet, command=trainer)
    train = {"batch_size": 4, "data": sweep.train["data"], "z_loss": 0.1}
    with pytest.raises(SweepError, match="with other settings"):
        snapshot(make_sweep(rates=(4e-3,), sizes=["rung-1M"], train=train))
    other = tmp_path / "other"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    words = {s: [np.arange(200, dtype=np.uint8)] for s in ("train", "heldout")}
    writer.write_dataset(other, words, identity)
    train = {"batch_size": 4, "data": {"paths": [str(other)], "seq_len": 64}}
    with pytest.raises(SweepError, match="on other data"):
        snapshot(make_sweep(rates=(4e-3,), sizes=["rung-1M"], train=train))


def config_file(tmp_path, data, rates="[0.004]"):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"out: {tmp_path / 'cli'}\nfamilies: [{{base: matmulfree, learning_rates: {rates}}}]\n"
        f"sizes: [rung-1M]\ntokens: [1e4]\ntrain:\n  batch_size: 4\n"
        f"  data: {{paths: [{data}], seq_len: 64}}\n"
    )
    return path


def test_the_commands(tmp_path, sweep_data, trainer, monkeypatch, capsys):
    monkeypatch.setattr("mmfree_jax.experiments.sweep.runner.run_sweep.__kwdefaults__",
                        {**run_sweep.__kwdefaults__, "command": trainer})  # fmt: skip
    path = config_file(tmp_path, sweep_data, "[0.002, 0.004, 0.7]")
    script = tmp_path / "repaired.py"
    script.write_text(TRAINER.replace("rate == 0.7", "False"))

    def repaired(config: Path) -> list[str]:
        return [sys.executable, str(script), str(config)]

    assert cli.plan([str(path), "--device", "H100"]) == 0
    text = capsys.readouterr().out
    assert "all: 3 runs," in text
    assert "data sheet" in text
    with pytest.raises(SweepError, match=r"run \S+lr0.7-s0 failed \(exit code 1: RuntimeError"):
        cli.run([str(path), "--device", "H100"])
    text = capsys.readouterr().out
    assert text.index("all: 3 runs") < text.index("[1/3]")  # cost first
    assert cli.status([str(path)]) == 0
    text = capsys.readouterr().out
    assert "2 done, 1 failed" in text
    assert "RuntimeError: a bug" in text
    assert cli.report([str(path)]) == 0
    text = capsys.readouterr().out
    assert "edge" in text
    best = list(csv.DictReader((tmp_path / "cli" / "best.csv").open()))
    assert [float(r["learning_rate"]) for r in best] == [0.004]
    drawn = list(csv.DictReader((tmp_path / "cli" / "report.plot.csv").open()))
    assert [r["series"] for r in drawn] == ["loss matmulfree", "rate matmulfree"]
    assert float(drawn[0]["value"]) == float(best[0]["loss"])
    (tmp_path / "cli" / "report.png").unlink()
    assert cli.report([str(path), "--no-plot"]) == 0
    assert not (tmp_path / "cli" / "report.png").exists()
    # What stands failed is said each time, and how it is tried again.
    with pytest.raises(SweepError, match=r"lr0.7-s0 failed .* a bug\).*--retry-failed tries again"):
        cli.run([str(path), "--device", "H100"])
    text = capsys.readouterr().out
    assert "left: 0 runs" in text
    assert "1 failed before and not tried again" in text
    monkeypatch.setattr("mmfree_jax.experiments.sweep.runner.run_sweep.__kwdefaults__",
                        {**run_sweep.__kwdefaults__, "command": repaired})  # fmt: skip
    assert cli.run([str(path), "--device", "H100", "--retry-failed"]) == 0
    assert "left: 1 runs" in capsys.readouterr().out
    assert cli.run([str(path), "--device", "H100"]) == 0
    assert "nothing was left to do" in capsys.readouterr().out


def test_the_commands_refuse_bad_input(tmp_path, sweep_data, monkeypatch):
    path = config_file(tmp_path, sweep_data)
    with pytest.raises(SweepError, match="device 'abacus' has no known peak rate"):
        cli.plan([str(path), "--device", "abacus"])
    with pytest.raises(ConfigError, match="--parallel is 0"):
        cli.plan([str(path), "--device", "H100", "--parallel", "0"])
    with pytest.raises(ConfigError, match="--max-minutes is -1"):
        cli.run([str(path), "--device", "H100", "--max-minutes", "-1"])
    with pytest.raises(DataError, match="does not exist"):
        cli.run([str(path), "--device", "H100", "--data", str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="which does not exist: run the sweep first"):
        cli.report([str(path)])
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(ConfigError, match="sbatch --array"):
        cli.plan([str(path), "--device", "H100", "--shard", "slurm"])


def test_slurm_arrays_are_shards(tmp_path, sweep_data, monkeypatch, capsys):
    path = config_file(tmp_path, sweep_data, "[0.001, 0.002, 0.004, 0.008, 0.016]")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    cli.plan([str(path), "--device", "H100", "--shard", "slurm"])
    assert "shard 1/2: 2 runs" in capsys.readouterr().out


def test_the_shipped_configs_are_sound():
    from mmfree_jax.experiments.sweep.config import load_sweep
    from mmfree_jax.experiments.sweep.plan import tuning_runs, without_repeats

    folder = Path(cli.__file__).parents[1] / "configs"
    for name, runs in (("tiny-sweep", 4), ("loss-curves", 2), ("ablation", 8), ("study", 88)):
        sweep = load_sweep(folder / f"{name}.yaml")
        found = without_repeats(sweep, [*tuning_runs(sweep), *main_runs(sweep)])
        assert len(found) == runs, name
    assert sum(r.flops for r in found) == pytest.approx(8.68e16, rel=0.01)


@pytest.mark.parametrize(
    "text", ["{", "[]", '"x"', '{"kind": "error"}', '{"kind": 1, "reason": ""}']
)
def test_a_damaged_record_of_a_failure_is_named(tmp_path, text):
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "run.json").write_text(text)
    with pytest.raises(SweepError, match=r"failures/run.json .*; delete it"):
        read_failures(tmp_path)
