"""What records look like on the terminal, and in TensorBoard (W&B: test_wandb.py)."""

import io

from rich.console import Console

from mmfree_jax.readable import format_count, format_seconds
from mmfree_jax.train.sinks import (
    PlainProgress,
    RichProgress,
    Silent,
    TensorBoard,
    format_record,
    make_progress,
)

TRAIN = {
    "kind": "train",
    "step": 20,
    "tokens": 2048,
    "time_s": 3.0,
    "loss": 2.5,
    "grad_norm": 1.25,
    "learning_rate": 4e-3,
    "tokens_per_s": 12_345.0,
    "mfu": 0.371,
    "eta_s": 3725.0,
    "zero_share": 0.31,
    "changed_share": 0.012,
    "skipped_steps": 0,
}
EVAL = {"kind": "eval", "step": 20, "loss": 2.0, "perplexity": 7.39, "bits_per_byte": 1.1}
SAMPLE = {"kind": "sample", "step": 20, "prompt": "we", "text": "we\nhold [bold]"}


def test_plain_lines():
    stream = io.StringIO()
    progress = PlainProgress(1000, stream)
    for record in (TRAIN, EVAL, SAMPLE):
        progress.write(record)
    progress.close()
    train, evaluated, sample = stream.getvalue().splitlines()
    assert train == (
        "step   20/1000  loss 2.5000  grad 1.25  lr 4.00e-03  12.3k tok/s  MFU 37.1%  "
        "zero 31.0%  changed 1.20%  ETA 1h02m"
    )
    assert evaluated.endswith("held-out loss 2.0000  perplexity 7.39  1.1000 bits/byte")
    assert sample.endswith(r"sample: 'we\nhold [bold]'")


def test_a_window_of_skipped_steps_has_no_loss():
    line = format_record({"kind": "train", "step": 5, "skipped_steps": 2, "learning_rate": 0.1}, 9)
    assert line == "step 5/9  skipped 2  lr 1.00e-01"


def test_rich_progress_shows_loss_and_does_not_read_markup():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160)
    progress = RichProgress(1000, 0, console)
    for record in (TRAIN, EVAL, SAMPLE):
        progress.write(record)
    progress.message("[red]plain[/red]")
    progress.close()
    text = stream.getvalue()
    for part in ("loss 2.5000", "ETA 1h02m", "held-out loss 2.0000", "[bold]", "[red]plain"):
        assert part in text


def test_units():
    assert [format_count(x) for x in (12, 1500, 2.5e6, 3e9)] == ["12", "1.5k", "2.5M", "3.0B"]
    assert [format_seconds(x) for x in (5, 65, 3725, 200_000)] == ["5s", "1m05s", "1h02m", "2d07h"]


def test_which_display(monkeypatch):
    assert isinstance(make_progress("none", 1, 0), Silent)
    assert isinstance(make_progress("plain", 1, 0), PlainProgress)
    assert isinstance(make_progress("auto", 1, 0), PlainProgress)  # pytest is no terminal


def test_tensorboard_events(tmp_path):
    sink = TensorBoard(tmp_path, restored_step=0)
    for record in (TRAIN, EVAL, SAMPLE):
        sink.write(record)
    sink.close()
    (events,) = tmp_path.iterdir()
    data = events.read_bytes()
    for tag in (b"train/loss", b"train/zero_share", b"eval/bits_per_byte", b"sample"):
        assert tag in data
