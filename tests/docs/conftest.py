"""The flags of all commands; reading records, and comparing documents with lines out of them.

A function of the tests of figures writes lines of one document out of a record, so that it says
which figure comes from which key. A line must stand in the document exactly so; a table of which
one row is known must have known rows only.
"""

import contextlib
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

from mmfree_jax.cli import main
from mmfree_jax.launch.render import PLATFORMS

ROOT = Path(__file__).resolve().parents[2]


class Records:
    """The records under experiments/results."""

    folder = ROOT / "experiments" / "results"

    def __init__(self) -> None:
        self._read: dict[str, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._read:
            self._read[name] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        return self._read[name]

    def text(self, name: str) -> str:
        return (self.folder / name).read_text(encoding="utf-8")

    def row(self, name: str, **wanted: Any) -> dict[str, Any]:
        """The first row of a record with these values."""
        for found in self[name]["rows"]:
            if all(found.get(key) == value for key, value in wanted.items()):
                return found
        raise LookupError(f"{name} has no row with {wanted}")


@pytest.fixture(scope="session")
def records() -> Records:
    return Records()


@pytest.fixture(scope="session")
def fixed() -> Callable[[float, int], str]:
    """Decimals as a person rounds them: 0.1185 is 0.119, whatever its last binary digit is."""

    def write(value: float, digits: int) -> str:
        unit = Decimal(1).scaleb(-digits)
        return f"{Decimal(repr(value)).quantize(unit, ROUND_HALF_UP):,}"

    return write


@pytest.fixture(scope="session")
def compare() -> Callable[[str, Iterable[str]], None]:
    """Fails where a line does not stand in a document, or a table of it has other rows too."""

    def check(document: str, lines: Iterable[str]) -> None:
        text = re.sub(r" *\\\n *", " ", (ROOT / document).read_text(encoding="utf-8"))
        known, wrong = list(lines), []
        for line in known:
            if line not in text:
                close = difflib.get_close_matches(line, text.splitlines(), 1, cutoff=0)
                wrong.append(f"record:   {line}\ndocument: {close[0] if close else '-'}")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
            rows = {row: row.startswith(tuple(known)) for row in table.splitlines()[2:]}
            if any(rows.values()):
                wrong += [f"no record: {row}" for row, found in rows.items() if not found]
        assert wrong == [], "\n".join(wrong)

    return check


@pytest.fixture(scope="session")
def flags() -> set[str]:
    """Every flag that some command explains in its help."""
    known = main.commands()
    lines = [[*name.split(), "--help"] for name in known]
    lines += [["launch", "render", platform, "--help"] for platform in PLATFORMS]
    found: set[str] = {"--help", "--debug"}
    for words in lines:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main._dispatch(words)
        found |= set(re.findall(r"--[\w.-]+", out.getvalue()))
    return found
