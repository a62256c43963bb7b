"""Measurements in processes of their own, and the folder that keeps them.

The folder of a study called NAME holds NAME.json (the command and a row a measurement), NAME.md
(tables) and NAME.png, all written anew after each row: a run that is cut short leaves what it
measured. A measurement that fails is a row with its reason under "failed".
"""

import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.children import Children
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.files import check_file, write_text
from mmfree_jax.presets import preset
from mmfree_jax.progress import show_progress
from mmfree_jax.text_files import read_json

Row = dict[str, Any]
Say = Callable[[str], None]

STOP_S = 10.0
"""A measurement whose study was killed is told to stop, and killed after so long (seconds)."""

DOES_NOT_FIT = "does not fit in the device's memory"
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")


def say(line: str) -> None:
    """Shows a line at once, also where the output is a file."""
    print(line, flush=True)


def say_each(rows: Iterable[Row], describe: Callable[[Row], str]) -> list[Row]:
    """Rows as they come, a line printed for each."""
    found = []
    for row in rows:
        print(describe(row), flush=True)
        found.append(row)
    return found


def start(children: Children, command: Sequence[str]) -> subprocess.Popen[str]:
    """A process that reads one task, a line of JSON, from its input."""
    pipe = subprocess.PIPE
    return children.start(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str], task: Row, timeout_s: float | None = None) -> Row:
    """Gives a process its task and waits: the row on its last line, or the task and a reason."""
    try:
        stdout, stderr = process.communicate(json.dumps(task) + "\n", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return task | {"failed": f"no result after {timeout_s:.0f} s"}
    if process.returncode:
        return task | {"failed": reason(process.returncode, stderr)}
    return json.loads(stdout.strip().splitlines()[-1])


def measure_alone(command: Sequence[str], task: Row, timeout_s: float | None = None) -> Row:
    """What a process of its own makes of a task: its row, or the task and a reason."""
    with Children(STOP_S) as children:
        return finish(start(children, command), task, timeout_s)


def reason(code: int, stderr: str) -> str:
    """Why a process ended: its exit code or signal and its last line."""
    if any(text in stderr for text in _OUT_OF_MEMORY):
        return DOES_NOT_FIT
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{how}: {lines[-1].strip()[:300]}"


def cpu_name() -> str:
    """The processor's model as Linux names it, else its architecture."""
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = re.findall(r"^model name\s*:\s*(.+)$", about, re.M)
    return names[0].strip() if names else platform.processor()


def one_of(plan: Any, choices: Iterable[str], *fields: str) -> None:
    """Refuses words of a plan's fields that are not among the choices.

    Raises:
      ConfigError: names the flag and the word.
    """
    for name in fields:
        for word in getattr(plan, name):
            if word not in choices:
                raise ConfigError(
                    f"--{name.replace('_', '-')} has {word!r}: choose from {', '.join(choices)}"
                )


@dataclass(frozen=True)
class Study:
    """How the rows of one kind of measurement are shown.

    Attributes:
      name: of its files.
      describe: a line for a row.
      table: all rows as Markdown.
      draw: the figure of a record, into a PNG.
    """

    name: str
    describe: Callable[[Row], str]
    table: Callable[[Sequence[Row]], str]
    draw: Callable[[Row, Path], None]

    def files(self, out: Path) -> tuple[Path, Path, Path]:
        """The record, the table and the figure."""
        return out / f"{self.name}.json", out / f"{self.name}.md", out / f"{self.name}.png"

    def check(self, out: Path) -> None:
        """Raises OutputError where a file would be replaced that no such measurement made."""
        record, *beside = self.files(out)
        check_file(record, r'\{\s*"commands?"', beside=beside)

    def write(self, record: Row, out: Path) -> None:
        """Writes all three."""
        records, table, figure = self.files(out)
        write_text(records, json.dumps(record, indent=1) + "\n")
        write_text(table, self.table(record["rows"]))
        self.draw(record, figure)

    def collect(
        self,
        about: Row,
        rows: Iterable[Row],
        out: Path,
        say: Say = say,
        kept: Sequence[Row] = (),
    ) -> list[Row]:
        """Keeps rows as they come, behind those `kept`, in a record that begins with `about`."""
        self.check(out)
        record: Row = about | {"rows": [*kept]}
        with show_progress("measuring") as show:
            for number, row in enumerate(rows, len(kept) + 1):
                record["rows"].append(row)
                say(self.describe(row))
                self.write(record, out)
                show.update(number, None, count=f"{number} done")
        return record["rows"]

    def conclude(self, rows: Sequence[Row], out: Path, *, measured: bool = True) -> None:
        """Names the files.

        Raises:
          MMFreeError: the rows were `measured` now, and no measurement succeeded.
        """
        say(", ".join(map(str, self.files(out))) + f": {len(rows)} rows")
        if measured and all("failed" in row for row in rows):
            raise MMFreeError(f"no measurement succeeded: see the reasons in {self.files(out)[0]}")

    def read(self, folder: Path, flag: str) -> tuple[list[str], list[Row]]:
        """The commands and rows of an earlier run's record.

        Args:
          folder: that the run wrote.
          flag: that named it, for the message.

        Raises:
          ConfigError: it has no readable record.
        """
        path = self.files(folder)[0]
        try:
            record = read_json(path)
            commands = record["commands"] if "commands" in record else [record["command"]]
            return [*commands], [*record["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise ConfigError(
                f"{flag} has {folder}, which has no readable {path.name} ({e}): give folders "
                f"that `mmfree bench {self.name} --out` made"
            ) from e

    def join(self, folders: Sequence[Path], out: Path) -> list[Row]:
        """Puts the rows of earlier runs into one record, table and figure.

        Raises:
          ConfigError: a folder without a readable record.
        """
        self.check(out)
        commands: list[str] = []
        rows: list[Row] = []
        for folder in folders:
            more_commands, more_rows = self.read(folder, "--join")
            commands += more_commands
            rows += more_rows
        self.write({"commands": commands, "rows": rows}, out)
        return rows


def markdown(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, words: int | None = None
) -> str:
    """A Markdown table; rows that end early are filled up.

    Args:
      header: names of the columns.
      rows: their cells.
      words: how many columns stand to the left, the others to the right; None: all.
    """
    count = len(header) if words is None else words
    marks = ["---"] * count + ["---:"] * (len(header) - count)
    lines = [header, *([*row, *[""] * (len(header) - len(row))] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|" + "|".join(marks) + "|", *body])


def spread(summary: Mapping[str, float], form: str) -> str:
    """Median, least and greatest in one cell."""
    median, least, most = (format(summary[name], form) for name in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def by_size(size: str) -> float:
    """A key that sorts presets by their parameters, about."""
    model = preset(size).model
    return model.num_layers * model.hidden_size**2


def draw_bars(
    axis: Any,
    rows: Sequence[Row],
    labels: Mapping[str, str],
    value: Callable[[Row], float],
    *,
    number: str = "{:.2g}",
) -> None:
    """A group of bars a size, a bar a form with its number.

    Args:
      axis: matplotlib's.
      rows: one a size and form.
      labels: of the forms, in order.
      value: height of a row's bar.
      number: format of the numbers on the bars.
    """
    sizes = sorted({r["size"] for r in rows}, key=by_size)
    forms = [form for form in labels if any(r["form"] == form for r in rows)]
    step = 0.9 / max(1, len(forms))
    for place, form in enumerate(forms):
        found = {r["size"]: value(r) for r in rows if r["form"] == form}
        bars = axis.bar(
            [sizes.index(size) + step * (place - (len(forms) - 1) / 2) for size in found],
            list(found.values()),
            width=0.94 * step,
            label=labels[form],
            color=f"C{list(labels).index(form) % 10}",
        )
        axis.bar_label(bars, fmt=number, fontsize=7)
    axis.set_xticks(range(len(sizes)), sizes)
