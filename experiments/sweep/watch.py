"""`mmfree sweep status --watch`: a sweep as it goes on, wherever its runs are.

What it shows is read from the sweep's folder alone, so that it may be watched from another
machine that shares it: a table drawn anew on a terminal, lines elsewhere.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.cost import relative_seconds
from mmfree_jax.experiments.sweep.folder import open_folder
from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.state import Snapshot, Status, run_folder, snapshot
from mmfree_jax.progress import is_capable
from mmfree_jax.readable import format_seconds
from mmfree_jax.saved.history import read_history

if TYPE_CHECKING:
    from rich.table import Table

_LINE_SECONDS = 60.0  # between lines while nothing but time has changed
_LONGEST_SLEEP = 86_400.0
_ORDER: tuple[Status, ...] = (
    "done", "running", "pending", "waiting", "paused", "cut off", "dropped", "failed",
)  # fmt: skip
_ENDED = ("done", "dropped", "failed")


@dataclass(frozen=True)
class Underway:
    """A run that some process is at."""

    name: str
    first: int
    """The step that it begins at: above 0 for a branch of a trunk."""
    step: int
    """Last recorded; `first` before that."""
    steps: int
    loss: float | None
    """Training loss at that step (nats a token)."""
    tokens_per_s: float | None
    seconds: float
    """In the trainer, over all its restarts, at that step."""

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return min(1.0, max(0, self.step - self.first) / (self.steps - self.first))

    @property
    def eta(self) -> float | None:
        """Seconds to its last step at the pace so far; None before its first record."""
        return self.seconds * (1 - self.share) / self.share if self.share else None


@dataclass(frozen=True)
class Standing:
    """How far a sweep has come."""

    counts: dict[Status, int]
    flops_share: float
    """Of all runs' training FLOPs, those of finished runs and of steps already made."""
    underway: tuple[Underway, ...]
    eta: float | None
    """Seconds to the end, if as many runs go on at a time; None where none has told its pace."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way or left to start."""
        return not any(n for state, n in self.counts.items() if state not in _ENDED)

    @property
    def line(self) -> str:
        """In a line."""
        total = sum(self.counts.values())
        parts = [f"{self.counts.get('done', 0)}/{total} runs done"]
        parts += [f"{self.counts[s]} {s}" for s in _ORDER[1:] if self.counts.get(s)]
        text = f"{', '.join(parts)}; {self.flops_share:.0%} of the FLOPs"
        return text if self.eta is None else f"{text}, ETA {format_seconds(self.eta)}"


def standing(found: Snapshot) -> Standing:
    """How far a sweep has come, by its folder.

    The time that is left is the work that is left, by FLOPs and width (`relative_seconds`), at
    the pace of finished runs and of those under way, shared by as many runs as are under way now.

    Raises:
      TrainingError: a run's metrics.jsonl is damaged.
    """
    states: dict[str, Status] = {run.name: found.status(run) for run in found.runs}
    underway = {run.name: _progress(Path(found.sweep.out), run) for run in found.runs
                if states[run.name] == "running"}  # fmt: skip
    work = seconds = left = flops = 0.0
    for run in found.runs:
        state, whole = states[run.name], relative_seconds(run)
        done = 1.0 if state == "done" else underway[run.name].share if run.name in underway else 0.0
        flops += done * run.own_flops
        if state not in ("failed", "dropped"):
            left += (1 - done) * whole
        spent = underway[run.name].seconds if run.name in underway else _spent(found, run)
        if done and spent:
            work, seconds = work + done * whole, seconds + spent
    eta = None
    if underway and work:
        alone = [u.eta for u in underway.values() if u.eta is not None]
        eta = max([left * seconds / work / len(underway), *alone])
    total = sum(run.own_flops for run in found.runs if states[run.name] != "dropped")
    return Standing(dict(collections.Counter(states.values())), flops / total,
                    tuple(underway.values()), eta)  # fmt: skip


def _spent(found: Snapshot, run: PlannedRun) -> float:
    """Seconds that a finished run took, with its start where that is known; 0: not known."""
    row = found.rows.get(run.name)
    if row is None:
        return 0.0
    return max(float(row["wall_s"] or 0), float(row["train_s"] or 0))


def _progress(out: Path, run: PlannedRun) -> Underway:
    first = 0 if run.trunk is None else run.full_rate_steps
    records = read_history(run_folder(out, run) / "metrics.jsonl")
    last = next((r for r in reversed(records) if r.get("kind") == "train"), {})
    rate = last.get("tokens_per_s")
    return Underway(
        run.name, first, int(last.get("step") or first), run.config.steps, last.get("loss"),
        rate if isinstance(rate, int | float) else None, float(last.get("time_s") or 0),
    )  # fmt: skip


def table(found: Standing) -> "Table":
    """The runs under way, a row each, over the line on all."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False, caption=found.line, caption_justify="left",
                 caption_style="")  # fmt: skip
    view.add_column("under way", overflow="ellipsis", no_wrap=True)
    for name in ("step", "done", "loss", "tokens/s", "ETA"):
        view.add_column(name, justify="right", no_wrap=True)
    for run in found.underway:
        view.add_row(
            run.name, f"{run.step}/{run.steps}", f"{run.share:.0%}",
            "" if run.loss is None else f"{run.loss:.3f}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
            "starting" if run.eta is None else format_seconds(run.eta),
        )  # fmt: skip
    return view


def watch(
    sweep: SweepConfig,
    stream: TextIO,
    *,
    every: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows how far a sweep is until it is over, or until it is interrupted (Ctrl-C).

    On a terminal a table is drawn anew; elsewhere there is a line whenever a run has changed its
    state, and once a minute.

    Args:
      sweep: the config.
      stream: where to.
      every: seconds between looks at the folder.
      clock: seconds from any origin.
      sleep: waits so many seconds.

    Raises:
      SweepError: the folder is damaged, or holds another sweep.
    """
    display = _live(stream) if is_capable(stream) else _lines(stream, clock)
    with (
        open_folder(sweep, trusting=True) as folder,
        display as show,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while not show(standing(snapshot(folder.sweep))).is_over:
            sleep(min(every, _LONGEST_SLEEP))
            folder.refresh()


@contextlib.contextmanager
def _live(stream: TextIO) -> Iterator[Callable[[Standing], Standing]]:
    """Draws the table anew; the last one stays."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream, highlight=False)
    with Live(console=console, auto_refresh=False) as live:
        console.show_cursor(True)  # a process that is killed cannot show it again

        def show(found: Standing) -> Standing:
            live.update(table(found), refresh=True)
            return found

        yield show


@contextlib.contextmanager
def _lines(stream: TextIO, clock: Callable[[], float]) -> Iterator[Callable[[Standing], Standing]]:
    """A line where the states have changed, and now and then."""
    said: tuple[dict[Status, int], float] | None = None

    def show(found: Standing) -> Standing:
        nonlocal said
        if said is None or found.counts != said[0] or clock() - said[1] >= _LINE_SECONDS:
            print(found.line, file=stream, flush=True)
            said = found.counts, clock()
        return found

    yield show
