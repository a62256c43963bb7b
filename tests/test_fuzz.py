"""The short form of `make fuzz`, and what it would find."""

from pathlib import Path

import pytest
from fuzz import commands
from fuzz.case import Case, Outcome, faults
from fuzz.report import fuzz, shell_line
from fuzz.sources import SOURCES

from mmfree_jax.cli import main

LINE = "mmfree: error: x is 1: set 2\n"


def test_a_few_trials_of_every_source(tmp_path):
    report = fuzz(
        SOURCES,
        scratch=tmp_path,
        keep=tmp_path / "wrong",
        seed=1,
        count=12,
        seconds=120,
        exports=False,
    )
    assert report.wrong == [], report.text()
    assert all(report.done[name] > 0 for name in SOURCES)


def test_every_subcommand_is_tried():
    assert set(commands.GOOD) == set(main.commands())
    drawn = {case.argv[: len(name.split())] for case in commands.draw(0, 500, Path())
             for name in commands.GOOD if " ".join(case.argv).startswith(name)}  # fmt: skip
    assert {tuple(name.split()) for name in commands.GOOD} <= drawn


def test_the_same_seed_draws_the_same_commands():
    first = [case.argv for case in commands.draw(3, 50, Path())]
    assert [case.argv for case in commands.draw(3, 50, Path())] == first
    assert [case.argv for case in commands.draw(4, 50, Path())] != first


@pytest.mark.parametrize(
    ("outcome", "after", "found"),
    [
        (Outcome(0, "", "", 0), {"a": True, "new": False}, []),
        (Outcome(2, "", LINE, 0), {"a": True}, []),
        (Outcome(None, "", "", 60), {"a": True}, ["did not end in 60 s"]),
        (Outcome(1, "", LINE, 0), {"a": True}, ["exit code 1"]),
        (Outcome(-11, "", "", 0), {"a": True}, ["exit code -11"]),
        (Outcome(2, "", LINE * 2, 0), {"a": True}, ["2 lines of error, not one"]),
        (Outcome(2, "", "usage: x\n", 0), {"a": True}, ["0 lines of error, not one"]),
        (Outcome(0, "", LINE, 0), {"a": True}, ["an error, but exit code 0"]),
        (Outcome(2, "", LINE, 0), {"a": False}, ["refused, but a is not as it was"]),
        (Outcome(2, "", LINE, 0), {}, ["refused, but a is not as it was"]),
        (Outcome(2, "", LINE, 0), {"a": True, "b": False}, ["refused, but b was written"]),
        (
            Outcome(0, "", "", 0),
            {"a": True, ".b.0123abcd.tmp": False},
            ["a file that was not finished is left"],
        ),
        (
            Outcome(2, "", "mmfree: unexpected error in `mmfree x`\n", 0),
            {"a": True},
            ["the last resort had to speak"],
        ),
        (
            Outcome(2, "", "Traceback (most recent call last):\n" + LINE, 0),
            {"a": True},
            ["a traceback"],
        ),
    ],
)
def test_what_is_a_fault(outcome, after, found):
    assert faults(Case(("x",), "x"), outcome, {"a"}, after) == found


def test_a_failing_command_can_be_pasted():
    argv = ("fit", "a b", "it's", "a\nb'", "\udcff", "日本", "", "*")
    line = "mmfree fit 'a b' 'it'\\''s' $'a\\x0ab\\x27' $'\\xff' '日本' '' '*'"
    assert shell_line(argv) == line
