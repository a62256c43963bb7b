"""What records look like on the terminal."""

import sys

import pytest
from run_records import EVAL, TRAIN

from mmfree_jax.progress import Display, Lines, open_display
from mmfree_jax.readable import format_count, format_seconds, printable
from mmfree_jax.train.run_display import TRAINING, RunDisplay, format_record

SAMPLE = {"kind": "sample", "step": 20, "prompt": "we", "text": "we\nhold [bold]\x1b[2J"}


class Live(Display):
    """Keeps what is drawn in place."""

    is_live = True

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_plain_lines(capsys):
    progress = RunDisplay(Lines(sys.stdout, 0.0), 1000)
    for record in (TRAIN, EVAL, SAMPLE):
        progress.write(record)
    progress.close()
    assert capsys.readouterr().out == (
        "step   20/1000  loss 2.5000  grad 1.25  lr 4.00e-03  12.3k tok/s  MFU 37.1%  "
        "zero 31.0%  changed 1.20%  ETA 1h02m\n"
        "step   20/1000  held-out loss 2.0000  perplexity 7.39  1.1000 bits/byte\n"
        "step   20/1000  sample:\n  we\n  hold [bold]\\x1b[2J\n"
    )


def test_a_window_of_skipped_steps_has_no_loss():
    line = format_record({"kind": "train", "step": 5, "skipped_steps": 2, "learning_rate": 0.1}, 9)
    assert line == "step 5/9  skipped 2  lr 1.00e-01"


def test_steps_are_counted_in_place_and_the_last_one_stays():
    display = Live()
    progress = RunDisplay(display, 150)
    progress.stage(TRAINING)
    progress.write(TRAIN | {"step": 85})
    assert display.state.count == "85/150"
    assert display.state.values == (
        "loss 2.5000", "ETA 1h02m", "12.3k tok/s", "MFU 37.1%", "grad 1.25", "lr 4.00e-03",
        "zero 31.0%", "changed 1.20%",
    )  # fmt: skip
    progress.step(86)
    assert (display.state.count, display.state.share) == ("86/150", 86 / 150)
    with progress.during("evaluating"):
        progress.part(1, 4)
        progress.step(87)  # read late: it is not the evaluation's
        assert (display.state.stage, display.state.count) == ("evaluating", "25%")
    assert (display.state.stage, display.state.count) == ("training", "86/150")
    assert display.lines == []
    progress.write(TRAIN | {"step": 150})
    assert display.lines == [format_record(TRAIN | {"step": 150}, 150)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("naïve 日本 🙂\n\tpeace\r\n", "naïve 日本 🙂\n\tpeace\n"),
        ("\x1b]0;title\x07\x9b2J", "\\x1b]0;title\\x07\\x9b2J"),
        ("over\rwritten\x08\x7f", "over\\rwritten\\x08\\x7f"),
        ("a\u202eb\u2066\u2028\ud800", "a\\u202eb\\u2066\\u2028\\ud800"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("a\\n", "a\\n"),  # what looks escaped is the text's own
    ],
)
def test_a_text_moves_no_cursor_and_is_else_as_it_is(text, shown):
    assert printable(text) == shown


def test_units():
    assert [format_count(x) for x in (12, 1500, 2.5e6, 3e9)] == ["12", "1.5k", "2.5M", "3.0B"]
    assert [format_seconds(x) for x in (5, 65, 3725, 200_000)] == ["5s", "1m05s", "1h02m", "2d07h"]


def test_which_display():
    assert type(open_display("none", sys.stdout, 0.0)) is Display
    for kind in ("plain", "auto", "rich"):  # pytest is no terminal
        assert type(open_display(kind, sys.stdout, 0.0)) is Lines
