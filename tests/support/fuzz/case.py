"""One trial of the command line, how it ended, and what is wrong with that."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

LONGEST_LINE = 1200
"""Characters of an error's line, its beginning included."""
# Notes for the next time, and the lock of a run that was there before.
_STAYS = re.compile(r"/\.verified\.json$|^run/\.lock$")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
      code: exit code; None: it did not end in time; negative: the signal that ended it.
      out, err: what it wrote.
      seconds: how long it took.
    """

    code: int | None
    out: str
    err: str
    seconds: float


def _no_change(folder: Path) -> None:
    """Leaves the files as they are."""


def _no_opinion(outcome: Outcome, folder: Path) -> str | None:
    """Has nothing to add to what is wrong with every command."""


@dataclass(frozen=True)
class Case:
    """A command to run in a fresh copy of the workplace.

    Attributes:
      argv: arguments of `mmfree`; bytes that are not UTF-8 as surrogates (`os.fsdecode`).
      about: what is done to it, for the report.
      prepare: changes the files first, given the workplace; it draws nothing at random.
      judge: a fault besides those that `faults` finds, given the workplace after the command:
        results that differ without a word, for example.
      own_process: start an interpreter for it, as a shell does.
      may_leave: new files that a refused command may leave (regular expression of their paths).
    """

    argv: tuple[str, ...]
    about: str
    prepare: Callable[[Path], None] = _no_change
    judge: Callable[[Outcome, Path], str | None] = _no_opinion
    own_process: bool = False
    may_leave: str = ""


class Source(Protocol):
    """Draws cases: the same for the same seed, whatever was run before."""

    def __call__(self, seed: int, count: int, workplace: Path) -> Iterator[Case]:
        """Gives `count` cases; the workplace is there to be looked at, not to be changed."""
        ...


def faults(case: Case, outcome: Outcome, before: set[str], after: dict[str, bool]) -> list[str]:
    """What is wrong with how a command ended.

    Args:
      case: what was run.
      outcome: how it ended.
      before: paths of the workplace's files.
      after: those files and new ones, and whether each is as it was.
    """
    found = []
    if outcome.code is None:
        found.append(f"did not end in {outcome.seconds:.0f} s")
    elif outcome.code not in (0, 2):
        found.append(f"exit code {outcome.code}")
    if "Traceback (most recent call last)" in outcome.err + outcome.out:
        found.append("a traceback")
    lines = re.findall(r"^mmfree: .*", outcome.err, re.M)
    # `launch local` passes on what its processes say, behind their numbers.
    lines = lines or re.findall(r"^\[0\] (mmfree: .*)", outcome.out, re.M)
    if any(line.startswith("mmfree: unexpected error") for line in lines):
        found.append("the last resort had to speak")
    elif any("needs more memory than there is" in line for line in lines):
        found.append("memory ran out before it was refused")
    elif outcome.code == 2 and len(lines) != 1:
        found.append(f"{len(lines)} lines of error, not one")
    if outcome.code == 0 and lines:
        found.append("an error, but exit code 0")
    if any(len(line) > LONGEST_LINE for line in lines):
        found.append("a line that nobody reads to its end")
    if any(re.search(r"\.[0-9a-f]{8}\.(tmp|old)(/|$)", path) for path in after):
        found.append("a file that was not finished is left")
    if outcome.code == 2:
        changed = [path for path in sorted(before) if not after.get(path, False)]
        if changed:
            found.append(f"refused, but {changed[0]} is not as it was")
        new = [p for p in sorted(after) if p not in before and not _STAYS.search(p)]
        new = [p for p in new if not (case.may_leave and re.search(case.may_leave, p))]
        if new:
            found.append(f"refused, but {new[0]} was written")
    return found
