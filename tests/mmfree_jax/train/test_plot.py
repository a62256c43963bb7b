"""Figures of what runs logged."""

import json
import shutil
import subprocess

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.colors import same_color

from mmfree_jax.cli.main import main
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.figures import COLOURS
from mmfree_jax.presets import preset
from mmfree_jax.train.flops import count_flops
from mmfree_jax.train.metrics import to_json_line
from mmfree_jax.train.plot import plot_metrics


@pytest.fixture
def runs(tmp_path):
    """Two run directories with a short history each; the second is longer and has no rate."""
    folders = []
    for i, name in enumerate(("a", "b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(dump_yaml(preset("tiny")))
        rows = []
        for step in range(1, 11 + 10 * i):
            row = {"step": step, "tokens": 100 * step, "time_s": 60.0 * step}
            values = {"loss": 5.0 - 0.1 * step + i} | ({} if i else {"learning_rate": 1e-3 / step})
            rows.append(row | {"kind": "train"} | values)
            if step % 5 == 0:
                rows.append(
                    row | {"kind": "eval", "loss": 5.2 - 0.1 * step + i, "bits_per_byte": 2.0}
                )
        rows.append({"kind": "train", "step": 31, "tokens": 3100, "skipped_steps": 1})
        rows.append({"kind": "sample", "step": 31, "tokens": 3100, "text": "It was"})
        (folder / "metrics.jsonl").write_text("".join(map(to_json_line, rows)))
        folders.append(folder)
    return folders


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved = []
    real = matplotlib.figure.Figure.savefig

    def savefig(self, *args, **kwargs):
        saved.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    return saved


def lines(axes):
    """What a panel shows, by label."""
    return {line.get_label(): line for line in axes.lines if len(line.get_xdata())}


def legend(figure):
    """Its lines by their texts; a blank one fills the row of names."""
    (box,) = figure.legends
    texts = [text.get_text() for text in box.get_texts()]
    return {text: line for text, line in zip(texts, box.get_lines(), strict=True) if text}


@pytest.mark.parametrize("x", ["steps", "tokens", "flops", "time"])
def test_curves_of_several_runs(runs, figures, tmp_path, x):
    output = tmp_path / "out" / "c.png"
    assert plot_metrics(runs, output, x=x, log_x=True, log_y=True, smoothing=0.0) == []
    assert output.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    shown = lines(axes)
    assert set(shown) == {"a, training", "a, held-out", "b, training", "b, held-out"}
    config = preset("tiny")
    flops = count_flops(config.model, config.data.seq_len).training
    unit = {"steps": 1, "tokens": 100, "flops": 100 * flops, "time": 1}[x]
    np.testing.assert_allclose(shown["a, held-out"].get_xdata(), [5 * unit, 10 * unit])
    np.testing.assert_allclose(shown["a, held-out"].get_ydata(), [4.7, 4.2])
    assert len(shown["a, training"].get_xdata()) == 10
    assert len(shown["b, training"].get_xdata()) == 20
    names = {"steps": "step", "tokens": "training tokens", "flops": "training FLOPs"}
    assert axes.get_xlabel() == names.get(x, "training time (min)")
    assert axes.get_ylabel() == "loss (nats per token)"


def test_a_panel_for_each_metric_and_a_legend_that_explains_all(runs, figures, tmp_path):
    notes = plot_metrics(
        runs, tmp_path / "c.png", metrics=("loss", "learning_rate", "bits_per_byte", "loss")
    )
    assert notes == [f"{runs[1]} logged no learning_rate"]
    (figure,) = figures
    keys = legend(figure)
    styles = {"training, smoothed (0.8)", "training, as recorded", "held-out"}
    assert set(keys) == {"a", "b"} | styles
    loss, rate, bits = figure.axes
    assert set(lines(loss)) == {
        f"{run}, {kind}" for run in "ab" for kind in ("recorded", "training", "held-out")
    }
    # What is known exactly is drawn as it is.
    assert set(lines(rate)) == {"a, training"}
    np.testing.assert_allclose(lines(rate)["a, training"].get_ydata(), 1e-3 / np.arange(1, 11))
    assert set(lines(bits)) == {"a, held-out", "b, held-out"}
    # A run has one colour in all panels, and the legend's.
    for axes in figure.axes:
        for label, line in lines(axes).items():
            assert same_color(line.get_color(), COLOURS[0 if label[0] == "a" else 1])
    assert [keys[run].get_color() for run in "ab"] == list(COLOURS[:2])
    # No panel's text lies on another's, and the legend on none.
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    boxes.append(figure.legends[0].get_window_extent())
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert max(box.y1 for box in boxes) <= figure.bbox.y1


def test_more_runs_than_colours_differ_in_their_lines(runs, figures, tmp_path):
    plot_metrics([runs[0]] * 9, tmp_path / "c.png", labels=[f"run {i}" for i in range(9)])
    looks = {
        (line.get_color(), line.get_linestyle())
        for label, line in lines(figures[0].axes[0]).items()
        if label.endswith("training")
    }
    assert len(looks) == 9


def test_names_are_shown_as_they_are_and_tell_runs_apart(runs, figures, tmp_path):
    odd = shutil.copytree(runs[0], tmp_path / "x" / "_1$e^")
    same = shutil.copytree(runs[0], tmp_path / "x" / "a")
    assert plot_metrics([odd, runs[0]], tmp_path / "c.png") == []
    plot_metrics([runs[0], same], tmp_path / "c.svg")
    assert {"_1$e^", "a"} < set(legend(figures[0]))
    assert {"a", "x/a"} < set(legend(figures[1]))
    assert plot_metrics([runs[0]], tmp_path / "c.png", labels=["日本"]) == [
        "the font of figures lacks characters of the names: boxes stand for them"
    ]


def test_what_is_not_finite_is_counted_and_alone_refused(runs, figures, tmp_path, capsys):
    metrics = runs[0] / "metrics.jsonl"
    whole = metrics.read_text()
    more = [(32, "NaN"), (33, "4.0"), (34, "null"), (35, "1e308"), (36, "4.0"), (37, "4.0")]
    row = '{{"kind": "train", "step": {}, "tokens": 1200, "time_s": 1, "loss": {}}}\n'
    metrics.write_text(whole + "".join(row.format(*pair) for pair in more))
    command = ["plot", *map(str, runs), "--output", str(tmp_path / "x.png")]
    assert main(command) == 0
    assert f"note: 3 values of loss of {runs[0]} are not finite" in capsys.readouterr().out
    # A value between two gaps is a dot.
    alone = lines(figures[0].axes[0])["a, alone"]
    assert (list(alone.get_xdata()), list(alone.get_ydata())) == ([33], [4.0])
    for log in ([], ["--log-y"]):
        value = "-1.0" if log else "NaN"
        metrics.write_text(row.format(1, value))
        assert main(["plot", str(runs[0]), *log]) == 2
        above = " above 0" if log else ""
        assert f"has no finite loss{above}: there is nothing" in capsys.readouterr().err


def test_logarithmic_axes_leave_out_what_is_not_above_zero(runs, figures, tmp_path):
    metrics = runs[0] / "metrics.jsonl"
    first = '{"kind": "eval", "step": 0, "tokens": 0, "time_s": 0, "loss": 6.0}\n'
    last = '{"kind": "train", "step": 40, "tokens": 4000, "time_s": 90, "loss": -1}\n'
    metrics.write_text(first + metrics.read_text() + last)
    assert plot_metrics([runs[0]], tmp_path / "c.png", log_x=True, log_y=True) == [
        f"2 values of loss of {runs[0]} are not above 0: gaps on the logarithmic axis"
    ]
    low, high = figures[0].axes[0].get_xlim()
    assert 0.5 < low < 1
    assert 10 < high < 20


def test_a_history_that_goes_back_is_read_as_a_resumed_run_leaves_it(runs, figures, tmp_path):
    metrics = runs[0] / "metrics.jsonl"
    row = {"kind": "train", "step": 8, "tokens": 800, "time_s": 99.0, "loss": 2.0}
    metrics.write_text(metrics.read_text() + to_json_line(row))
    plot_metrics([runs[0]], tmp_path / "c.png", smoothing=0)
    drawn = lines(figures[0].axes[0])["a, training"]
    np.testing.assert_array_equal(drawn.get_xdata(), range(1, 9))
    assert drawn.get_ydata()[-1] == 2.0


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF-"), ("", b"\x89P")],
)
def test_the_suffix_gives_the_format(runs, tmp_path, suffix, begins):
    output = tmp_path / f"c.{suffix}".rstrip(".")
    for _ in range(2):  # a figure of ours is replaced
        plot_metrics(runs, output)
        assert output.read_bytes().startswith(begins)


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(runs[0])]) == 0
    assert (runs[0] / "loss_curve.png").exists()
    before = (runs[0] / "loss_curve.png").read_bytes()
    assert main(["plot", str(runs[0]), "--metrics", "loss", "bits_per_byte"]) == 0
    assert (runs[0] / "metrics.png").exists()
    assert (runs[0] / "loss_curve.png").read_bytes() == before
    assert main(["plot", *map(str, runs)]) == 0
    assert (tmp_path / "loss_curves.png").exists()
    output = tmp_path / "both.svg"
    argv = ["plot", *map(str, runs), "--output", str(output), "--x", "tokens", "--log-x"]
    assert main([*argv, "--labels", "one", "two"]) == 0
    assert "<!-- one -->" in output.read_text()
    assert f"loss curve: {output}" in capsys.readouterr().out


def test_list_prints_the_names(runs, capsys):
    assert main(["plot", *map(str, runs), "--list"]) == 0
    assert capsys.readouterr().out == (
        f"{runs[0]}: bits_per_byte, learning_rate, loss, skipped_steps\n"
        f"{runs[1]}: bits_per_byte, loss, skipped_steps\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere"], "/nowhere/metrics.jsonl is missing: give the folder of a training run"),
        (["RUN/metrics.jsonl"], "metrics.jsonl is missing: give the folder"),
        ([], "no run to plot"),
        (["--list"], "no run to plot"),
        (["RUN", "--metrics"], "metrics is empty: name at least one, such as loss"),
        (["RUN", "--smoothing", "1.5"], "smoothing is 1.5"),
        (["RUN", "--labels", "x", "y"], "labels has 2 names"),
        (["RUN", "--output", "/tmp/x.word"], "let it end in .png, .svg, .pdf"),
        (["RUN", "--x", "seconds"], "seconds"),
        (
            ["RUN", "--metrics", "los"],
            "no run logged 'los': did you mean 'loss'? There are bits_per_byte, learning_rate,",
        ),
        (["RUN", "--metrics", "loss", "text"], "no run logged 'text': There are bits_per_byte"),
    ],
)
def test_bad_input_is_one_line(runs, argv, message, capsys):
    assert main(["plot", *[a.replace("RUN", str(runs[0])) for a in argv]]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("x", "change", "message"),
    [
        ("steps", {"loss": "low"}, "loss is 'low', not a number"),
        ("steps", {"grad_norm": "low"}, "grad_norm is 'low' in a record, not a number: restore"),
        ("steps", {"grad_norm": True}, "grad_norm is True"),
        ("steps", {"grad_norm": [1.0]}, "grad_norm is [1.0]"),
        ("steps", {"loss": 10**400}, "line 1 is not JSON"),
        ("time", {"step": "two"}, "step is 'two'"),
        ("tokens", {"tokens": {}}, "tokens is {}"),
        ("flops", {"tokens": None}, "train records without tokens: choose another --x"),
        ("time", {"time_s": None}, "train records without time_s: choose another --x"),
        ("steps", {"step": None}, "train records without step: choose another --x"),
        ("steps", {"kind": ["train"]}, "has no metrics"),
    ],
)
def test_damaged_records_are_one_line(runs, x, change, message, capsys):
    row = {"kind": "train", "step": 1, "tokens": 100, "time_s": 1.0, "loss": 4.0}
    row |= {"grad_norm": 1.0} | change
    (runs[0] / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["plot", str(runs[0]), "--x", x, "--metrics", "loss", "grad_norm"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_run_at_all(tmp_path):
    with pytest.raises(ConfigError, match="at least one"):
        plot_metrics([], tmp_path / "x.png")


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
