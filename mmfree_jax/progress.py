"""What a command is doing while it works: a live line on a terminal, plain lines elsewhere.

Every command that may take longer than a few seconds shows its work here. The line holds the
stage, how much of it is done, and values; it is gone at the end, however the end comes, so that
what stays on the screen is what was said. A file or a pipe gets lines without control codes,
and so does a terminal that cannot move its cursor (TERM=dumb).
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from mmfree_jax.readable import format_seconds

Kind = Literal["auto", "rich", "plain", "none"]
_LINE_SECONDS = 10.0  # between lines on how far a stage is
_BAR = (5, 30)  # narrowest and widest, in columns


@dataclass(frozen=True)
class State:
    """What is happening.

    Attributes:
      stage: in words.
      began: when, on the monotonic clock (seconds).
      count: how much of it is done, in words; empty where that is not known.
      share: the same from 0 to 1.
      values: what else there is to say, the most important first.
    """

    stage: str
    began: float
    count: str = ""
    share: float | None = None
    values: tuple[str, ...] = ()


class Display:
    """Shows nothing; its kinds below show something.

    Attributes:
      is_live: whether what changes is shown in place, so that it need not be said in lines.
    """

    is_live = False

    def __init__(self) -> None:
        self.state = State("", time.monotonic())

    def stage(self, text: str) -> None:
        """Says what begins now; the count begins anew."""
        self.state = State(text, time.monotonic())

    def update(self, done: float, total: float | None, *values: str, count: str = "") -> None:
        """Says how far the stage is.

        Args:
          done: so much of it, in any unit.
          total: all of it; None where nobody knows.
          values: what else there is to say, the most important first.
          count: `done` of `total` in words; empty: the percentage, and the time that is left.
        """
        state = self.state
        share = None if not total else min(1.0, done / total)
        if share is not None and not count:
            count = f"{share:.0%}"
            if share > 0:
                seconds = (time.monotonic() - state.began) * (1 - share) / share
                values = (*values[:1], f"ETA {format_seconds(seconds)}", *values[1:])
        self.state = State(state.stage, state.began, count, share, values)

    def counting(self, total: float | None, words: Callable[[int], str]) -> Callable[[int], None]:
        """What to call with the amount done since its last call.

        Args:
          total: all of it; None where nobody knows.
          words: the amount done so far, in words.
        """
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self.update(done, total, words(done))

        return advance

    @contextlib.contextmanager
    def during(self, text: str) -> Iterator[None]:
        """A stage within another, which goes on behind it."""
        before = self.state
        self.stage(text)
        try:
            yield
        finally:
            self.state = before

    def line(self, text: str) -> None:
        """Says something that stays."""

    def notice(self, text: str) -> None:
        """Says something from a signal handler: nothing here waits for a lock."""

    def close(self) -> None:
        """Ends the display; a second time does nothing."""


class Lines(Display):
    """A stage that lasts is a line, and so is how far it is, now and then."""

    def __init__(self, stream: TextIO, patience: float) -> None:
        """A stage is said once it has lasted `patience` seconds; 0: at once; infinite: never."""
        super().__init__()
        self._stream, self._patience = stream, patience
        self._timer: threading.Timer | None = None
        self._said_at = time.monotonic()

    def stage(self, text: str) -> None:
        """See `Display`."""
        super().stage(text)
        self._say_in(self._patience, text)

    @contextlib.contextmanager
    def during(self, text: str) -> Iterator[None]:
        """See `Display`."""
        before = self.state
        super().stage(text)
        self._say_in(max(self._patience, _LINE_SECONDS), text)
        try:
            yield
        finally:
            self.state = before
            self._cancel()

    def update(self, done: float, total: float | None, *values: str, count: str = "") -> None:
        """See `Display`."""
        super().update(done, total, *values, count=count)
        if time.monotonic() - max(self._said_at, self.state.began) >= _LINE_SECONDS:
            state = self.state
            self.line("  ".join(filter(None, (state.stage, state.count, *state.values))))

    def line(self, text: str) -> None:
        """See `Display`."""
        self._said_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            print(text, file=self._stream, flush=True)

    def notice(self, text: str) -> None:
        """See `Display`."""
        with contextlib.suppress(OSError, ValueError):  # no file behind it, or it is closed
            os.write(self._stream.fileno(), (text + "\n").encode())

    def close(self) -> None:
        """See `Display`."""
        self._cancel()

    def _say_in(self, seconds: float, text: str) -> None:
        self._cancel()
        if seconds <= 0:
            self.line(text)
            return
        if seconds == math.inf:
            return
        self._timer = threading.Timer(seconds, self.line, [text])
        self._timer.daemon = True
        self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class LiveLine(Display):
    """One line at the bottom of a terminal, drawn anew a few times a second."""

    is_live = True

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live

        self._notice = ""
        self._console = Console(file=stream, highlight=False)
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=5,
            transient=True,
            # What is written to another file must get there.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._live.start()
        self._console.show_cursor(True)  # a process that is killed cannot show it again
        _open.append(self)

    def stage(self, text: str) -> None:
        """See `Display`."""
        super().stage(text)
        self._live.refresh()  # a stage shorter than the time between two drawings is seen too

    def _draw(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        state = self.state
        seconds = time.monotonic() - state.began
        values = state.values
        if not state.count and not values and seconds >= 1:
            values = (format_seconds(seconds),)
        label = " ".join(filter(None, (state.stage, state.count)))
        if self._notice:
            label = f"{self._notice} ({label})" if label else self._notice
        label, bar, text = fit(self._console.width - 1, label, state.share is not None, values)
        row = Table.grid(padding=(0, 1))
        cells: list[Any] = [Text(label, no_wrap=True)] if label else []
        if bar:
            cells.append(ProgressBar(total=1.0, completed=state.share or 0.0, width=bar))
        if text:
            cells.append(Text(text, no_wrap=True))
        if cells:
            row.add_row(*cells)
        return row

    def line(self, text: str) -> None:
        """See `Display`."""
        from rich.text import Text

        # The terminal breaks long lines: copied, they are whole.
        self._console.print(Text(text), soft_wrap=True)

    def notice(self, text: str) -> None:
        """See `Display`."""
        self._notice = text

    def close(self) -> None:
        """See `Display`."""
        if self in _open:
            _open.remove(self)
            self._live.stop()


_open: list[LiveLine] = []


def close_all() -> None:
    """Takes every live line off the terminal, before a process ends without unwinding."""
    for display in list(_open):
        display.close()


def fit(width: int, label: str, has_bar: bool, values: Sequence[str]) -> tuple[str, int, str]:
    """What of a line has room in `width` columns: the label, the bar's width, the values.

    The least important values go first, then the bar, then the others.
    """
    from rich.cells import cell_len, set_cell_size

    kept = list(values)

    def room() -> int:
        parts = [label, "  ".join(kept)]
        return width - sum(cell_len(part) + 1 for part in parts if part)

    while len(kept) > 2 and room() < (2 * _BAR[0] if has_bar else -1):
        kept.pop()
    bar = min(room(), _BAR[1]) if has_bar and room() >= _BAR[0] else 0
    while kept and room() - bar < -1:
        kept.pop()
    if cell_len(label) > width:
        label = set_cell_size(label, max(0, width - 1)) + "…"
    return label, bar, "  ".join(kept)


def is_capable(stream: TextIO) -> bool:
    """Whether the stream is a terminal that can draw a line anew."""
    try:
        return stream.isatty() and os.environ.get("TERM", "dumb").lower() not in ("dumb", "unknown")
    except ValueError:  # closed
        return False


def open_display(kind: Kind, stream: TextIO, patience: float) -> Display:
    """A display on `stream`: "none" shows nothing, "plain" lines, the others what it can do.

    `patience` is for lines: seconds that a stage lasts before it is said.
    """
    if kind == "none":
        return Display()
    if kind == "plain" or not is_capable(stream):
        return Lines(stream, patience)
    return LiveLine(stream)


@contextlib.contextmanager
def show_progress(
    stage: str, *, is_shown: bool = True, patience: float = math.inf
) -> Iterator[Display]:
    """A display on standard error for the time of the block, beside results on standard output.

    It begins with `stage`, if there is one yet; where not `is_shown` it shows nothing. In a file
    there are only lines on how far something long is, so that an error stays one line, and on
    stages that last longer than `patience` (seconds).
    """
    display = open_display("auto" if is_shown else "none", sys.stderr, patience)
    try:
        if stage:
            display.stage(stage)
        yield display
    finally:
        display.close()
