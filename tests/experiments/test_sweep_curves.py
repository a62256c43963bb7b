"""Loss curves: phases of the learning rate, their slopes, and bad input."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from mmfree_jax import experiments
from mmfree_jax.config import OptimizerConfig, TrainConfig
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.experiments.sweep.curves import (
    load_curve,
    phases,
    phases_text,
    plot_phases,
    summarise_phases,
)
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.train.schedule import make_schedule

SHIPPED = Path(experiments.__file__).parent / "results" / "loss_curves"


@pytest.mark.parametrize("schedule", ["paper", "cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [100, 101])
def test_phases_turn_where_the_schedule_does(schedule, steps):
    config = TrainConfig(steps=steps, optimizer=OptimizerConfig(schedule=schedule, warmup_steps=10))
    found = phases(config)
    assert [p.last for p in found[:-1]] == [p.first for p in found[1:]]
    assert (found[0].first, found[0].last, found[-1].last) == (0, 10, steps)
    # The update of step s (from 1) uses the rate at count s - 1.
    rate = np.asarray(make_schedule(config.optimizer, steps)(np.arange(steps)))
    if schedule == "paper":
        jump = int(np.argmin(np.diff(rate))) + 1  # first count of the halved rate
        assert found[1].last == jump
    if schedule == "wsd":
        assert np.all(rate[found[1].first : found[1].last] == rate.max())
        assert rate[found[1].last + 1] < rate.max()


def make_run(folder, losses, config, share=0.05):
    records = [{"kind": "train", "step": i + 1, "tokens": 64 * (i + 1), "time_s": 0.0, "loss": v,
                "learning_rate": 1e-3, "grad_norm": 1.0, "changed_share": share, "zero_share": 0.3}
               for i, v in enumerate(losses)]  # fmt: skip
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.yaml").write_text(dump_yaml(config))
    return folder


def test_slopes_are_those_of_the_loss(tmp_path):
    config = TrainConfig(steps=400, optimizer=OptimizerConfig(schedule="paper"))
    rng = np.random.default_rng(0)
    truth = np.concatenate([5 - 0.004 * np.arange(200), 4.2 - 0.001 * np.arange(200)])
    curve = load_curve(make_run(tmp_path / "r", truth + 0.02 * rng.normal(size=400), config))
    first, second = summarise_phases(curve)
    for summary, slope in ((first, 4.0), (second, 1.0)):
        low, high = summary.interval
        assert low < slope < high
        assert high - low < 0.2
        assert summary.flip_share == pytest.approx(0.05)
    assert first.drop == pytest.approx(0.8, abs=0.05)
    assert "half rate" in phases_text(curve)


def test_the_shipped_runs_can_be_drawn():
    curves = [load_curve(SHIPPED / name) for name in ("matmulfree", "transformer")]
    assert [c.config.model.family for c in curves] == ["matmulfree", "transformer"]
    full, half = summarise_phases(curves[0])[-2:]
    assert half.flip_share < full.flip_share
    figures = [plot_phases(c) for c in curves]
    assert [len(f.axes) for f in figures] == [3, 2]
    texts = [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()]
    assert texts == ["training, as recorded", "training, smoothed (0.8)", "held-out"]
    assert [note.get_text() for note in figures[0].axes[1].texts] == [
        "warm-up", "full rate", "half rate",
    ]  # fmt: skip


def test_bad_run_directories_are_named(tmp_path):
    with pytest.raises(SweepError, match="no training record"):
        load_curve(tmp_path)
    folder = make_run(tmp_path / "r", [1.0, 2.0], dataclasses.replace(TrainConfig(), steps=2))
    (folder / "config.yaml").unlink()
    with pytest.raises(SweepError, match=r"config\.yaml cannot be read"):
        load_curve(folder)
