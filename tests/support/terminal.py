"""A program on a real pseudo-terminal, and what is then on the screen."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence

CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n\x07])")


class Terminal:
    """Runs a command with its output on a terminal of `columns` columns.

    Attributes:
      output: everything that the command has written so far.
      code: its exit code, once `read` has come to the end.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        env: Mapping[str, str] | None = None,
        stderr: int | None = None,
    ) -> None:
        self._far, near = os.openpty()
        fcntl.ioctl(near, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environ = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
        self.process = subprocess.Popen(
            command, stdin=near, stdout=near, stderr=near if stderr is None else stderr,
            env=environ | {"TERM": "xterm-256color"} | dict(env or {}),
        )  # fmt: skip
        os.close(near)
        self.output = ""
        self.code: int | None = None

    def read(self, until: str | None = None) -> None:
        """Reads to the end, or until the output has a text.

        Raises:
          AssertionError: neither came within two minutes, or the end came before the text.
        """
        while until is None or until not in self.output:
            assert select.select([self._far], [], [], 120)[0], self.output
            try:
                piece = os.read(self._far, 65536)
            except OSError:  # Linux: all that had it open have gone
                piece = b""
            if not piece:
                self.code = self.process.wait()
                os.close(self._far)
                assert until is None, self.output
                return
            self.output += piece.decode(errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the command."""
        self.process.send_signal(number)


def screen(output: str) -> list[str]:
    """The lines that stay of what was written to a terminal wide enough for each."""
    lines, row, column, at = [""], 0, 0, 0
    for match in [*CONTROL.finditer(output), None]:
        text = output[at : match.start() if match else None]
        lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
        column += len(text)
        if match is None:
            break
        at = match.end()
        parameter, letter, control = match.groups()
        if control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif letter == "A":
            row -= int(parameter or 1)
        elif letter == "K":
            lines[row] = "" if parameter == "2" else lines[row][:column]
    return [line.rstrip() for line in lines]


def without_colours(output: str) -> str:
    """What was written, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output)
