"""Turns what happens in a run into records, and hands them to the history and the sinks."""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.config import TrainConfig, tokens_per_step
from mmfree_jax.errors import TrainingError
from mmfree_jax.saved.goodput import NO_TIME, RECORD, Goodput, up_to_now
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.origin import FROM_NOTHING, Origin
from mmfree_jax.saved.run_directory import CHECKPOINTS, METRICS
from mmfree_jax.storage import Url
from mmfree_jax.train.flops import find_device, utilisation
from mmfree_jax.train.held_out import HeldOutLosses
from mmfree_jax.train.metrics import (
    SECTIONS,
    History,
    Record,
    Stopwatch,
    Window,
)
from mmfree_jax.train.run_display import RunDisplay
from mmfree_jax.train.schedule import recorded_rate
from mmfree_jax.train.sinks import Sink


class Recorder:
    """Keeps the running sums of one run; only process 0 writes.

    `settle` waits for a checkpoint that is being written.

    Attributes:
      watch: where the time goes; the loop opens its sections.
      last: the newest record of each kind.
      kept_as: the file with the records of an earlier start that saved nothing; None: no such.
      progress: what is shown; the loop says its stages there.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        *,
        place: Path | Url | None = None,
        restored_step: int,
        origin: Origin = FROM_NOTHING,
        meter: dict[str, Any] | None,
        sinks: Sequence[Sink],
        progress: RunDisplay,
        settle: Callable[[], None],
        saved_goodput: Goodput = NO_TIME,
        watch: Stopwatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._settle = settle
        self._place = place or run_dir
        self._clock = clock
        self._start = self._loop_start = clock()
        self._start_step, self._origin = restored_step, origin
        self.watch = watch or Stopwatch(clock)
        self._earlier = _earlier(run_dir, restored_step, saved_goodput)
        self._history = History(run_dir / METRICS, restored_step) if _is_writer() else None
        self.kept_as = self._history.kept_as if self._history else None
        self._before = self._history.seconds if self._history else 0.0
        self._sinks, self.progress = list(sinks), progress
        meter = meter or {}
        self._window = Window(meter.get("window"))
        self._skipped = int(meter.get("skipped", 0))
        self._skipped_in_a_row = int(meter.get("skipped_in_a_row", 0))
        self._positions = self._all_positions = 0
        self._device = jax.devices()[0].device_kind
        self.last = dict(self._history.last) if self._history else {}
        self.total_seconds: dict[str, float] = dict.fromkeys((*SECTIONS, "total"), 0.0)
        if find_device(self._device) is None:
            self.message(
                f"no peak rate is known for device {self._device!r}: MFU is left out of the metrics"
            )
        self.goodput_record(restored_step)

    def start(self) -> None:
        """Call when the loop begins, so that its rates leave compilation out."""
        self.goodput_record(self._start_step)
        self.watch.take()
        self._loop_start = self._clock()

    @property
    def meter(self) -> dict[str, Any]:
        """The running sums, for the checkpoint."""
        return {
            "window": dict(self._window.state),
            "skipped": self._skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def check_learnt(self, step: int) -> None:
        """Refuses to call a run of `step` steps complete of which every one was skipped.

        Raises:
          TrainingError: says so.
        """
        if 0 < step <= self._skipped:
            raise TrainingError(
                f"all {step} steps were skipped, as loss or gradient was not finite: nothing was "
                f"learnt; set --optimizer.learning-rate below "
                f"{self._config.optimizer.learning_rate:g}, check the data and --init-from, and "
                "train in another --run-dir"
            )

    @property
    def seconds(self) -> float:
        """Time that the run has taken, over all its restarts."""
        return self._before + self._clock() - self._start

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metrics of step `step` (counted from 1).

        Raises:
          TrainingError: they are not finite and the policy says to stop.
        """
        self._window.add(metrics, tokens_per_step(self._config))
        self.progress.step(step)
        self._positions += tokens_per_step(self._config)
        self._all_positions += tokens_per_step(self._config)
        if metrics["finite"]:
            self._skipped_in_a_row = 0
            return
        self._skipped += 1
        self._skipped_in_a_row += 1
        config = self._config
        first = self._origin.row_at(step - 1, config.batch_size)
        what = (
            f"loss {metrics['loss']:g} and gradient norm {metrics['grad_norm']:g} at step {step} "
            f"(rows {first} to {first + config.batch_size - 1} of the shuffled order)"
        )
        self.event(step, f"not finite: {what}")
        if config.on_nonfinite == "stop":
            raise TrainingError(
                f"training is not finite: {what}; {self._way_on()}, or run again with "
                "--on-nonfinite skip"
            )
        if self._skipped_in_a_row > config.max_skips:
            raise TrainingError(
                f"training is not finite: {what}, and {self._skipped_in_a_row} updates in a row "
                f"were skipped, more than max_skips ({config.max_skips}); {self._way_on()}"
            )

    def _way_on(self) -> str:
        """The last good checkpoint, and how to train on from it at a lower rate."""
        self._settle()  # a save under way may be the one to name
        rate = f"--optimizer.learning-rate below {self._config.optimizer.learning_rate:g}"
        folder = self._place / CHECKPOINTS
        steps = checkpoint_steps(folder)
        if not steps:
            return f"no checkpoint was saved: train in another --run-dir with {rate}"
        return (
            f"the last good checkpoint is {folder / str(steps[-1])}: go on from it with "
            f"--branch-from {self._place} --run-dir NEW and {rate}"
        )

    def train_record(self, step: int, extra: Record) -> None:
        """Writes the means since the last train record."""
        taken = self.watch.take()
        for name, seconds in taken.items():
            self.total_seconds[name] += seconds
        busy = taken["data"] + taken["step"]
        rate = self._positions / busy if busy > 0 else None
        self._positions = 0
        config = self._config
        record: Record = self._window.take()
        # The optimiser counts the updates it made; skipped ones are not among them.
        updates = max(0, step - 1 - self._skipped)
        record["learning_rate"] = recorded_rate(config.optimizer, config.steps, updates)
        if not config.quantizer.is_immediate:
            record["quantizer_strength"] = config.quantizer.strength(step - 1, config.steps)
        record["tokens_per_s"] = rate
        record["mfu"] = self.utilisation(rate)
        for name in SECTIONS:
            record[f"{name}_s"] = taken[name]
            record[f"{name}_share"] = taken[name] / taken["total"] if taken["total"] > 0 else 0.0
        here = step - self._start_step
        if here > 0:
            each = (self._clock() - self._loop_start) / here
            record["eta_s"] = each * (config.steps - step)
        self._write("train", step, record | extra)

    @property
    def mean_rate(self) -> float | None:
        """Tokens a second of data and step time since the program was started."""
        busy = self.total_seconds["data"] + self.total_seconds["step"]
        return self._all_positions / busy if busy > 0 else None

    def utilisation(self, rate: float | None) -> float | None:
        """Model FLOPs utilisation at `rate` tokens a second; None on an unknown device."""
        if rate is None:
            return None
        config = self._config
        return utilisation(
            config.model, config.data.seq_len, rate, self._device, jax.device_count()
        )

    def eval_record(self, step: int, losses: HeldOutLosses) -> None:
        """Writes an evaluation on held-out text."""
        self._write("eval", step, losses.record())

    @property
    def goodput(self) -> Goodput:
        """Where the run's time has gone, over all its attempts."""
        return self._earlier.plus(self.watch.totals)

    def goodput_record(self, step: int) -> Goodput:
        """Writes where the time has gone, and returns it."""
        goodput = self.goodput
        self._write(RECORD, step, goodput.to_record() | {"unix_time": time.time()})
        return goodput

    def tasks_record(self, step: int, numbers: dict[str, float]) -> None:
        """Writes scores on tasks."""
        self._write("tasks", step, numbers)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Writes a sample text."""
        self._write("sample", step, {"prompt": prompt, "text": text})

    def event(self, step: int, text: str, **values: Any) -> None:
        """Writes something that happened."""
        self._write("event", step, {"event": text, **values})

    def message(self, text: str) -> None:
        """Shows a line without recording it."""
        if _is_writer():
            self.progress.message(text)

    def _write(self, kind: str, step: int, values: Record) -> None:
        record = {
            "kind": kind,
            "step": step,
            "tokens": self._origin.tokens_at(step, tokens_per_step(self._config)),
            "time_s": self.seconds,
            **values,
        }
        self.last[kind] = record
        if self._history is not None:
            self._history.write(record)
            for sink in self._sinks:
                sink.write(record)
            self.progress.write(record)

    def sync(self) -> None:
        """Forces the history to disk."""
        if self._history is not None:
            self._history.sync()

    def close(self) -> None:
        """Closes the history, the sinks and the display."""
        self.progress.close()
        for sink in self._sinks:
            sink.close()
        if self._history is not None:
            self._history.close()


def _is_writer() -> bool:
    return jax.process_index() == 0


def _earlier(run_dir: Path, restored_step: int, saved: Goodput) -> Goodput:
    """What the attempts before this one left; only who writes the history knows of the dead."""
    history = []
    if _is_writer():
        with contextlib.suppress(TrainingError):  # which a fresh start replaces
            history = read_history(run_dir / METRICS)
    return up_to_now(history, restored_step, saved, time.time())
