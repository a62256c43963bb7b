"""How the runs of a sweep end: what is kept of each, and the line that says so."""

from collections.abc import Callable
from typing import Any

from mmfree_jax.experiments.sweep.branches import TRUNKS
from mmfree_jax.experiments.sweep.folder import SweepFolder
from mmfree_jax.experiments.sweep.options import Tally
from mmfree_jax.experiments.sweep.pauses import PAUSES, record_pause
from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.process import Outcome, code_version
from mmfree_jax.experiments.sweep.record import make_row, trained_on, write_failure
from mmfree_jax.experiments.sweep.state import Snapshot, run_folder, snapshot
from mmfree_jax.experiments.sweep.table import append_result


def look(folder: SweepFolder) -> Snapshot:
    """The runs as they stand now."""
    folder.refresh()
    return snapshot(folder.sweep)


class Endings:
    """What is written and said of each run that ends.

    Attributes:
      ended: runs so far.
      total: runs that were to be started.
    """

    def __init__(self, folder: SweepFolder, tally: Tally, say: Callable[[str], None]) -> None:
        self.ended = self.total = 0
        self._folder, self._tally, self._say = folder, tally, say
        self._code = code_version()

    def without_result(self, run: PlannedRun, result: Outcome, code: int) -> None:
        """A run that was stopped, failed, or is under way elsewhere.

        Args:
          run: the run.
          result: what became of it.
          code: its process's exit code.
        """
        self.ended += 1
        if result.end == "elsewhere":
            self._tally.elsewhere.append(run.name)
            self._tell(run, "under way elsewhere")
        elif result.end == "stopped":
            self._tally.stopped.append(run.name)
            self._tell(run, f"{result.reason}; it goes on when the sweep is run again")
        else:
            self._fail(run, result, code)

    def with_result(
        self, run: PlannedRun, summary: dict[str, Any], *, wall: float | None, sharing: int,
        pause: int | None,
    ) -> None:  # fmt: skip
        """A run that came to its end, or to a pause.

        Args:
          run: the run.
          summary: as the trainer wrote it.
          wall: time of the process that finished it (s); None if that is not known.
          sharing: how many runs shared the device.
          pause: the step after which it pauses; None: it is at its end.
        """
        self.ended += 1
        seconds = "" if wall is None else f", {wall:.0f} s"
        if run.stage == "trunk":
            self._end_well(run, f"trunk of {len(run.config.checkpoint.at_steps)} branches{seconds}")
            return
        loss = summary.get("eval_loss")
        if loss is None:
            self._fail(run, Outcome("failed", "error", "no held-out loss in summary.json: set "
                                    "train.eval.batches above 0"), 0)  # fmt: skip
            return
        if pause is not None:
            record_pause(self._folder.path, run, pause, loss, data=trained_on(summary))
            self._folder.publish(f"{PAUSES}/{run.name}.json")
            self._tally.paused.append(run.name)
            self._tell(run, f"loss {loss:.4f} at step {pause} of {run.config.steps}, where it "
                       f"pauses{seconds}")  # fmt: skip
            return
        append_result(self._folder.place, make_row(run, summary, wall, sharing, self._code))
        if not self._folder.sweep.keep_checkpoints:
            self._drop_checkpoints(run)
        self._end_well(run, f"loss {loss:.4f}{seconds}")

    def _fail(self, run: PlannedRun, result: Outcome, code: int) -> None:
        self._tally.failed[run.name] = result.reason
        write_failure(self._folder.path, run, result, code)
        self._folder.publish(f"failures/{run.name}.json")
        self._tell(run, f"failed: {result.reason}")

    def _end_well(self, run: PlannedRun, how: str) -> None:
        self._folder.remove(f"failures/{run.name}.json")
        self._tally.done.append(run.name)
        self._tell(run, how)

    def _tell(self, run: PlannedRun, how: str) -> None:
        self._say(f"[{self.ended}/{self.total}] {run.name}: {how}")

    def _drop_checkpoints(self, run: PlannedRun) -> None:
        """Deletes those of a run that is in the table, and of its trunk after the last branch."""
        out = self._folder.path
        self._folder.remove_checkpoints(run_folder(out, run))
        if run.trunk is not None and not look(self._folder).left_of(run.trunk):
            self._folder.remove_checkpoints(out / TRUNKS / run.trunk)
