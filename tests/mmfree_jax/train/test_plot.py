"""Loss curves."""

import dataclasses
import math
import subprocess

import matplotlib.axes
import numpy as np
import pytest

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.presets import preset
from mmfree_jax.train.flops import count_flops
from mmfree_jax.train.metrics import to_json_line
from mmfree_jax.train.plot import plot_losses, smooth


@pytest.fixture
def runs(tmp_path):
    """Two run directories with a short history each."""
    folders = []
    for i, name in enumerate(("a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_yaml(dataclasses.replace(preset("tiny"))))
        rows = []
        for step in range(1, 11):
            row = {"step": step, "tokens": 100 * step, "time_s": 1.0 * step}
            rows.append(row | {"kind": "train", "loss": 5.0 - 0.1 * step + i})
            if step % 5 == 0:
                rows.append(row | {"kind": "eval", "loss": 5.2 - 0.1 * step + i})
        rows.append({"kind": "train", "step": 11, "tokens": 1100, "skipped_steps": 1})
        (folder / "metrics.jsonl").write_text("".join(map(to_json_line, rows)))
        folders.append(folder)
    return folders


@pytest.fixture
def drawn(monkeypatch):
    """What is handed to matplotlib."""
    lines = []
    real = matplotlib.axes.Axes.plot

    def plot(self, *args, **kwargs):
        lines.append((args[0], args[1], kwargs.get("label")))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", plot)
    return lines


def test_losses_that_are_not_finite_are_counted_and_alone_refused(runs, tmp_path, capsys):
    metrics = runs[0] / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + '{"kind": "train", "step": 12, "tokens": 1200, "loss": NaN}\n')
    command = ["plot", *map(str, runs), "--output", str(tmp_path / "x.png")]
    assert main(command) == 0
    assert f"note: 1 losses of {runs[0]} are not finite" in capsys.readouterr().out
    metrics.write_text('{"kind": "train", "step": 1, "tokens": 1, "loss": NaN}\n')
    assert main(command) == 2
    assert "has no finite loss" in capsys.readouterr().err


def test_smoothing_is_unbiased_and_does_not_lag():
    assert smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3, 3, 3])
    assert smooth([1.0, 2.0, 4.0], 0.0) == pytest.approx([1, 2, 4])
    forward, backward = [1, 7 / 3], [5 / 3, 3]
    assert smooth([1.0, 3.0], 0.5) == pytest.approx(np.mean([forward, backward], axis=0))
    ramp = np.arange(101.0)
    assert smooth(ramp, 0.8)[50] == pytest.approx(50)


def test_what_is_not_finite_leaves_a_gap_and_no_more():
    values = [1.0, math.nan, 3.0, math.inf, -math.inf, 5.0]
    # Forward over 1, 3, 5: 1, 7/3, 27/7. Backward over 5, 3, 1: 5, 11/3, 15/7.
    expected = [(1 + 15 / 7) / 2, math.nan, 3.0, math.nan, math.nan, (27 / 7 + 5) / 2]
    np.testing.assert_allclose(smooth(values, 0.5), expected, rtol=1e-12)
    np.testing.assert_array_equal(smooth([math.inf, 2.0], 0.0), [math.nan, 2.0])
    assert np.isnan(smooth([math.nan] * 3, 0.9)).all()


@pytest.mark.parametrize("x", ["steps", "tokens", "flops"])
def test_curves_of_several_runs(runs, drawn, tmp_path, x):
    plot_losses(runs, tmp_path / "out" / "c.png", x=x, log_x=True, log_y=True, smoothing=0.0)
    assert (tmp_path / "out" / "c.png").read_bytes().startswith(b"\x89PNG")
    labels = [label for _, _, label in drawn]
    assert labels == ["a, training", "a, held-out", "b, training", "b, held-out"]
    config = preset("tiny")
    flops = count_flops(config.model, config.data.seq_len).training
    unit = {"steps": 1, "tokens": 100, "flops": 100 * flops}[x]
    np.testing.assert_allclose(drawn[1][0], [5 * unit, 10 * unit])
    np.testing.assert_allclose(drawn[1][1], [4.7, 4.2])
    assert len(drawn[0][0]) == 10


def test_the_command(runs, tmp_path, capsys):
    assert main(["plot", str(runs[0])]) == 0
    assert (runs[0] / "loss_curve.png").exists()
    output = tmp_path / "both.svg"
    argv = ["plot", *map(str, runs), "--output", str(output), "--x", "tokens", "--log-x"]
    assert main([*argv, "--labels", "one", "two"]) == 0
    assert "one, training" in output.read_text()
    assert str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere"], "/nowhere/metrics.jsonl has no losses"),
        ([], "run"),
        (["RUN", "--smoothing", "1.5"], "smoothing is 1.5"),
        (["RUN", "--labels", "x", "y"], "labels has 2 names"),
        (["RUN", "--output", "/tmp/x.word"], "word"),
        (["RUN", "--x", "seconds"], "seconds"),
    ],
)
def test_bad_input_is_one_line(runs, argv, message, capsys):
    assert main(["plot", *[str(runs[0]) if a == "RUN" else a for a in argv]]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_no_run_at_all(tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        plot_losses([], tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_disk_that_takes_no_picture_is_one_line(runs, make_disk, kind, capsys):
    disk = make_disk(4)
    if kind == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert main(["plot", str(runs[0]), "--output", str(disk / "c.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmfree: error: {disk}/c.png cannot be written (")
    assert error.endswith("make room there, or choose another place\n")
    assert error.count("\n") == 1
    assert list(disk.iterdir()) == []
