"""What commands show of their work, on pseudo-terminals and in files."""

import re
import signal
import subprocess
import sys

import pytest
from terminal import Terminal, screen, without_colours

from mmfree_jax.cli.generate import GenerateConfig, _Printer
from mmfree_jax.cli.prompts import Prompt
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.progress import Display, Lines, fit

# Goes through two stages and stays in the second if it is told to. What is said within a stage is
# drawn at the next of the drawings that come by themselves: where there are any, it waits for that.
_PROGRAM = """
import sys, time
from mmfree_jax import progress
drawn, draw = [], progress.LiveLine._draw
def noted(self):
    state, row = self.state, draw(self)
    drawn.extend([state] if self.state is state else [])
    return row
progress.LiveLine._draw = noted
with progress.show_progress("reading books") as show:
    show.line("read 3 books")
    show.stage("training")
    for done in (85, 150):
        show.update(done, 150, "loss 2.5", "grad 1.25", count=f"{done}/150")
        while show.is_live and show.state not in drawn:
            time.sleep(0.01)
    print("a line on standard output")
    print("a warning", file=sys.stderr)
    while "stay" in sys.argv:
        time.sleep(0.1)
print("the result")
"""
STAYS = ["read 3 books", "a line on standard output", "a warning", "the result"]


def on_terminal(*arguments, **options):
    return Terminal([sys.executable, "-c", _PROGRAM, *arguments], **options)


@pytest.mark.parametrize("columns", [200, 80, 40, 20, 8])
def test_the_line_fits_and_is_gone_at_the_end(columns):
    terminal = on_terminal(columns=columns)
    terminal.read()
    assert terminal.code == 0
    # What is printed is broken at words where a terminal is narrow.
    assert " ".join(screen(terminal.output)).split() == " ".join(STAYS).split()
    drawn = without_colours(terminal.output)
    if columns >= 40:
        assert "reading books" in drawn
        assert "training 85/150" in drawn
        assert "loss 2.5" in drawn
        assert drawn.count("85/150") == drawn.count("training 85/150")  # once in a line
    # Each drawing of the line is from a return to a clearing: none is wider than the terminal.
    for piece in drawn.replace("\n", "\r").split("\r"):
        text = piece.partition("\x1b[")[0]
        assert len(text) < columns or text in " ".join(STAYS), text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_an_end_leaves_the_cursor_visible_and_an_interrupt_no_line(number):
    terminal = on_terminal("stay")
    terminal.read(until="a warning")
    terminal.send(number)
    terminal.read()
    assert terminal.output.rfind("\x1b[?25h") > terminal.output.rfind("\x1b[?25l")
    if number == signal.SIGINT:
        assert "training" not in "\n".join(screen(terminal.output))
        assert "KeyboardInterrupt" in screen(terminal.output)[-2]


def test_a_stage_shorter_than_the_time_between_two_drawings_is_seen():
    program = """
from mmfree_jax.progress import show_progress
with show_progress("") as show:
    for stage in ("opening", "reading", "closing"):
        show.stage(stage)
"""
    terminal = Terminal([sys.executable, "-c", program])
    terminal.read()
    drawn = without_colours(terminal.output)
    places = [drawn.index(stage) for stage in ("opening", "reading", "closing")]
    assert places == sorted(places)


def test_no_color_takes_colours_and_nothing_else():
    terminal = on_terminal(env={"NO_COLOR": "1"})
    terminal.read()
    assert "training 85/150" in terminal.output
    assert "\x1b[3" not in terminal.output  # colours are 30 to 37 and 38;..., 90 to 97
    assert "\x1b[9" not in terminal.output
    assert [line for line in screen(terminal.output) if line] == STAYS


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines():
    terminal = on_terminal(env={"TERM": "dumb"})
    terminal.read()
    assert "\x1b" not in terminal.output
    assert terminal.output.split("\r\n") == [*STAYS, ""]


def test_what_goes_to_a_file_has_no_control_codes():
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True)
    assert done.stdout == "a line on standard output\nthe result\n"
    assert done.stderr == "read 3 books\na warning\n"


def test_what_is_redirected_gets_where_it_should(tmp_path):
    with (tmp_path / "err").open("w") as err:
        terminal = on_terminal(stderr=err.fileno())
        terminal.read()
    assert (tmp_path / "err").read_text() == "read 3 books\na warning\n"
    assert terminal.output == "a line on standard output\r\nthe result\r\n"


def test_a_stage_that_lasts_and_how_far_it_is_are_lines(capsys, monkeypatch):
    monkeypatch.setattr("mmfree_jax.progress._LINE_SECONDS", 0.0)
    lines = Lines(sys.stdout, patience=0.0)
    lines.stage("packing")
    lines.update(1, 4, "layer 2", count="1/4")
    lines.close()
    assert capsys.readouterr().out == "packing\npacking  1/4  layer 2\n"


def test_what_has_no_room_goes_the_least_important_first():
    values = ("loss 2.5", "ETA 3s", "12.3k tok/s", "grad 1.25")
    assert fit(79, "training 85/150", True, values) == (
        "training 85/150", 22, "loss 2.5  ETA 3s  12.3k tok/s  grad 1.25"
    )  # fmt: skip
    assert fit(50, "training 85/150", True, values) == (
        "training 85/150", 17, "loss 2.5  ETA 3s"
    )  # fmt: skip
    assert fit(36, "training 85/150", True, values)[1:] == (0, "loss 2.5  ETA 3s")
    assert fit(27, "training 85/150", True, values)[1:] == (0, "loss 2.5")
    assert fit(9, "training 85/150", True, values) == ("training…", 0, "")
    assert fit(30, "読む本.txt", False, ("90 MB/s",)) == ("読む本.txt", 0, "90 MB/s")


def test_a_run_interrupted_on_a_terminal_says_so_and_leaves_no_line(small_run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(dump_yaml(small_run).replace("progress: plain", "progress: auto"))
    command = [sys.executable, "-m", "mmfree_jax", "train", "--config", str(config), "--run-dir"]
    flags = "--steps 100000 --mesh.fsdp 1 --eval.batches 0 --checkpoint.every-steps 100000"
    terminal = Terminal([*command, str(tmp_path / "run"), *flags.split()], columns=100)
    # Which steps are drawn depends on the machine: one whose number begins with 2 comes at last.
    terminal.read(until="training 2")
    terminal.send(signal.SIGINT)
    terminal.read()
    assert terminal.code == 130
    drawn = without_colours(terminal.output)
    stages = ["starting JAX", "building the model", "compiling the training step", "training 2"]
    places = [drawn.index(stage) for stage in stages]
    assert places == sorted(places)
    assert "SIGINT: saving after this step; a second one ends at once" in drawn
    *said, last = [line for line in screen(terminal.output) if line]
    assert last.startswith("  summary ")
    assert not [line for line in said if re.match(r"training|compiling|starting|\^C", line)]
    assert any(line.startswith("SIGINT: saved step ") for line in said)


def test_a_preparation_on_a_terminal_leaves_its_summary(tmp_path):
    (tmp_path / "books.jsonl").write_text('{"text": "we the people"}\n' * 2000)
    command = [
        "-m",
        "mmfree_jax",
        "data",
        "prepare",
        "--tokenizer",
        "byte",
        "--heldout-fraction",
        "0",
        "--workers",
        "1",
    ]
    paths = ["--input", str(tmp_path / "books.jsonl"), "--out", str(tmp_path / "out")]
    terminal = Terminal([sys.executable, *command, *paths], columns=60)
    terminal.read()
    assert terminal.code == 0
    assert "preparing 100%" in without_colours(terminal.output)
    said = [line for line in screen(terminal.output) if line]
    assert said[0].startswith("data set")
    assert said[-1].startswith("prepared in ")


@pytest.mark.parametrize(("is_terminal", "written"), [(True, "p\\x1b[2Jhi"), (False, "p\x1b[2Jhi")])
def test_an_answer_moves_no_cursor_and_a_file_has_it_as_it_is(
    capsys, monkeypatch, is_terminal, written
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    config = GenerateConfig(model="x", prompt="p", stream=True)
    printer = _Printer(config, [Prompt(0, "p")], False, None, Display())
    printer.on_text(0, "\x1b[2Jhi")
    assert capsys.readouterr().out == written
