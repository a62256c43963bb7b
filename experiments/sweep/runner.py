"""Runs a plan: starts the trainer for each run, some at a time, and records how each ends.

A main run is started as soon as the tuning runs that choose its learning rate have ended, and
one that branches from a trunk as soon as the trunk has saved the step where it does.

A run that crashes, diverges or runs out of memory ends alone, with its reason in `failures/`.
One that was cut off goes on from its last checkpoint when it is started again. What is in the
table is not started.
"""

import contextlib
import dataclasses
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfree_jax.children import Children
from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml
from mmfree_jax.experiments.sweep.axes import Setting
from mmfree_jax.experiments.sweep.branches import (
    TRUNKS,
    TrunkState,
    kept_steps,
    trunk_state,
    up_to,
)
from mmfree_jax.experiments.sweep.config import SweepConfig
from mmfree_jax.experiments.sweep.cost import share
from mmfree_jax.experiments.sweep.endings import Endings, look
from mmfree_jax.experiments.sweep.folder import SweepFolder, open_folder
from mmfree_jax.experiments.sweep.options import Options, Tally
from mmfree_jax.experiments.sweep.order import in_order
from mmfree_jax.experiments.sweep.pauses import PAUSES
from mmfree_jax.experiments.sweep.plan import shard
from mmfree_jax.experiments.sweep.planned_run import PlannedRun
from mmfree_jax.experiments.sweep.process import (
    child_environment,
    is_training,
    outcome,
    read_summary,
    start,
    trainer_command,
)
from mmfree_jax.experiments.sweep.record import finished_summary
from mmfree_jax.experiments.sweep.state import Snapshot, run_folder
from mmfree_jax.experiments.sweep.stopping import Stop
from mmfree_jax.experiments.sweep.tracking import grouped
from mmfree_jax.files import InUseError, disk_errors, take_lock, write_text
from mmfree_jax.progress import Display

_POLL_SECONDS = 0.1


@dataclass
class _Child:
    run: PlannedRun
    process: subprocess.Popen
    slots: list[int]
    lock: int
    began: float
    share: int
    pause: int | None
    """The step after which it pauses; None: it goes to its end."""


def run_sweep(
    sweep: SweepConfig,
    options: Options,
    *,
    say: Callable[[str], None] = print,
    command: Callable[[Path], Sequence[str]] = trainer_command,
    clock: Callable[[], float] = time.monotonic,
    show: Display | None = None,
) -> Tally:
    """Runs what is left of this shard: tuning runs first, then those that use their rates.

    Args:
      sweep: the config.
      options: how to run.
      say: shows a line.
      command: the trainer's command for a config file.
      clock: seconds from any origin.
      show: shows which runs are under way.

    Raises:
      SweepError: the folder holds another sweep.
      OutputError: it cannot be written.
    """
    deadline = None if options.max_minutes is None else clock() + 60 * options.max_minutes
    tally, stop = Tally(), Stop(deadline, clock)
    with (
        open_folder(sweep) as folder,
        Children(options.grace_seconds) as children,
        stop.listening(),
    ):
        _make_folders(folder)
        _Scheduler(
            folder, options, tally, stop, children, say, command, clock, show or Display()
        ).run()
    tally.signal = stop.signal
    return tally


def _make_folders(folder: SweepFolder) -> None:
    out, sweep = folder.path, folder.sweep
    with disk_errors(out):
        for name in ("configs", "runs", "logs", "failures", "locks", "cache"):
            (out / name).mkdir(parents=True, exist_ok=True)
        if sweep.is_branched:
            (out / TRUNKS).mkdir(exist_ok=True)
        if sweep.halving.is_on:
            (out / PAUSES).mkdir(exist_ok=True)


class _Scheduler:
    """The runs of one call: those that wait, and those under way."""

    def __init__(
        self, folder: SweepFolder, options: Options, tally: Tally, stop: Stop, processes: Children,
        say: Callable[[str], None], command: Callable[[Path], Sequence[str]],
        clock: Callable[[], float], show: Display,
    ) -> None:  # fmt: skip
        self._show = show
        self._folder, self._sweep, self._out = folder, folder.sweep, folder.path
        self._options, self._tally, self._stop = options, tally, stop
        self._command, self._clock = command, clock
        self._processes = processes
        self._children: list[_Child] = []
        gpus = max(1, len(options.gpus))
        self._free = list(range(gpus * options.parallel))
        self._seen: set[tuple[str, int | None]] = set()
        self._pauses: Mapping[str, int] = {}
        self._trunks: dict[str, TrunkState] = {}
        self._begun: set[str] = set()  # branches with a checkpoint of their own
        self._compiled: set[tuple[str, str, Setting]] = set()
        self._endings = Endings(folder, tally, say)

    def run(self) -> None:
        """Runs what is left to its end, or until told to stop."""
        queue = in_order(self._news(), self._options.order)
        try:
            while (queue or self._children) and not self._stop:
                while (run := self._next(queue)) and (slots := self._slots_for(run)):
                    queue.remove(run)
                    self._start(run, slots)
                self._show_children()
                ended = self._reap()
                more = self._sweep.widen_rates or any(run.stage == "tuning" for run in ended)
                if (ended and more) or not (queue or self._children):
                    queue = in_order([*queue, *self._news()], self._options.order)
                if queue and not self._children and self._next(queue) is None:
                    self._tally.waiting += len(queue)  # for trunks that failed or are elsewhere
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            self._end_all()

    def _show_children(self) -> None:
        """Which runs are under way; in lines there are only those that have ended."""
        if self._show.is_live:
            ended, total = self._endings.ended, self._endings.total
            self._show.update(
                ended,
                total,
                *(child.run.name for child in self._children),
                count=f"{ended}/{total} runs ended, {len(self._children)} under way",
            )

    def _news(self) -> list[PlannedRun]:
        """This shard's runs that have become ready since the last call, and are to be run."""
        found = look(self._folder)
        news = []
        self._tally.waiting = 0
        self._pauses = found.halved.next_pause
        if not self._sweep.keep_checkpoints:
            for name in found.halved.dropped:
                self._folder.remove_checkpoints(self._out / "runs" / name)
        for stage in self._options.stages:
            for run in shard(self._sweep, found.of_stage(stage), *self._options.shard):
                if not run.rate_known:
                    self._tally.waiting += 1
                    continue
                leg = run.name, self._pauses.get(run.name)
                if run.name not in found.halved.paused and leg not in self._seen:
                    self._seen.add(leg)
                    if self._is_due(found, run):
                        news.append(run)
                    if run.trunk is not None and kept_steps(run_folder(self._out, run)):
                        self._begun.add(run.name)
        self._endings.total += len(news)
        return news

    def _is_due(self, found: Snapshot, run: PlannedRun) -> bool:
        status = found.status(run)
        if status == "running":
            self._tally.elsewhere.append(run.name)
        retry = status == "failed" and self._options.retry_failed
        if status == "failed" and not retry:
            self._tally.standing[run.name] = found.failures[run.name]["reason"]
        return retry or status in ("pending", "cut off", "waiting")

    def _next(self, queue: Sequence[PlannedRun]) -> PlannedRun | None:
        """The first run in the queue that need not wait for its program or its trunk.

        A program is compiled by the first run that has it, once, and found in the cache by all
        others; those would only compile the same beside it.
        """
        compiling = set()
        for child in self._children:
            if child.run.stage == "trunk":
                self._trunks[child.run.name] = trunk_state(self._out, child.run.name)
            program = child.run.program
            if program in self._compiled:
                continue
            if is_training(run_folder(self._out, child.run), self._log(child.run)):
                self._compiled.add(program)
            else:
                compiling.add(program)
        return next((r for r in queue if r.program not in compiling and self._can_branch(r)), None)

    def _can_branch(self, run: PlannedRun) -> bool:
        """Whether the trunk of a run, if it has one, has come to where the run branches."""
        if run.trunk is None or run.name in self._begun:
            return True
        if run.trunk not in self._trunks:
            self._trunks[run.trunk] = trunk_state(self._out, run.trunk)
        return self._trunks[run.trunk].is_ready_for(run)

    def _slots_for(self, run: PlannedRun) -> list[int]:
        """Free slots for a run, none if it must wait: on the device with the most of them.

        A large run takes a whole device.
        """
        per_gpu = self._options.parallel
        by_gpu = [[s for s in self._free if s // per_gpu == gpu]
                  for gpu in range(max(1, len(self._options.gpus)))]  # fmt: skip
        slots = max(by_gpu, key=len)
        if share(self._sweep, run, per_gpu) > 1:
            return slots[:1]
        return slots if len(slots) == per_gpu else []

    def _start(self, run: PlannedRun, slots: list[int]) -> None:
        try:
            file = self._out / "locks" / f"{run.name}.lock"
            lock = take_lock(file, f"{file}, the lock of {run.name},")
        except InUseError:
            self._tally.elsewhere.append(run.name)
            return
        try:
            sharing = share(self._sweep, run, self._options.parallel)
            run_dir = run_folder(self._out, run)
            run = self._branched(run)
            pause = self._pauses.get(run.name)
            config = grouped(run.config, self._sweep)
            place = self._folder.told(str(run_dir))
            config = dataclasses.replace(config, run_dir=place, stop_at=pause)
            summary = None if run.stage == "trunk" else finished_summary(run, run_dir, config)
            if summary is not None:
                # Cut off between the end of training and the row.
                self._endings.with_result(run, summary, wall=None, sharing=sharing, pause=pause)
                os.close(lock)
                return
            config_file = self._out / "configs" / f"{run.name}.yaml"
            write_text(config_file, dump_yaml(config))
            self._folder.publish(f"configs/{config_file.name}")
            gpus = self._options.gpus
            env = child_environment(
                None if self._folder.is_copy else self._out / "cache", parallel=sharing,
                gpu=gpus[slots[0] // self._options.parallel] if gpus else None,
            )  # fmt: skip
            log = self._log(run)
            if not log.exists():
                self._folder.fetch(f"logs/{log.name}")
            process = start(self._processes, self._command(config_file), log, env, lock)
        except BaseException:
            os.close(lock)
            raise
        self._free = [s for s in self._free if s not in slots]
        self._children.append(_Child(run, process, slots, lock, self._clock(), sharing, pause))

    def _branched(self, run: PlannedRun) -> PlannedRun:
        """A branch with its source; a trunk with the steps that are left to branch from."""
        if run.stage == "trunk":
            left = {branch.full_rate_steps for branch in look(self._folder).left_of(run.name)}
            return up_to(run, sorted(left) or run.config.checkpoint.at_steps)
        if run.trunk is None:
            return run
        if run.name in self._begun:  # it goes on with what it has
            there = read_yaml(run_folder(self._out, run) / "config.yaml")
            source = from_dict(TrainConfig, there).branch_from
        else:
            source = trunk_state(self._out, run.trunk).source(run)
            source = source and self._folder.told(source)
        return dataclasses.replace(run, config=dataclasses.replace(run.config, branch_from=source))

    def _reap(self) -> list[PlannedRun]:
        """Records the runs that have ended since the last call."""
        ended = [c for c in self._children if self._processes.has_ended(c.process)]
        for child in ended:
            self._children.remove(child)
            self._trunks.pop(child.run.name, None)
            self._free = sorted([*self._free, *child.slots])
            try:
                self._finish(child)
            finally:
                os.close(child.lock)
        return [child.run for child in ended]

    def _finish(self, child: _Child) -> None:
        run, wall = child.run, self._clock() - child.began
        log, run_dir = self._log(run), run_folder(self._out, run)
        self._folder.publish(f"logs/{log.name}")
        self._folder.refresh(run_dir.relative_to(self._out).as_posix())
        summary = read_summary(run_dir)
        result = outcome(child.process.returncode, log, summary)
        has_paused = summary is not None and _has_paused(child, summary)
        if summary is not None and (result.end == "complete" or has_paused):
            pause = child.pause if has_paused else None
            self._endings.with_result(run, summary, wall=wall, sharing=child.share, pause=pause)
            return
        self._endings.without_result(run, result, child.process.returncode)

    def _log(self, run: PlannedRun) -> Path:
        return self._out / "logs" / f"{run.name}.log"

    def _end_all(self) -> None:
        """Tells the runs under way to save and stop, and waits for them."""
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.process.terminate()
        began = time.monotonic()
        while self._children:
            if time.monotonic() - began > self._options.grace_seconds:
                for child in self._children:
                    self._processes.kill(child.process)
                    os.close(child.lock)
                    self._tally.stopped.append(child.run.name)
                self._children.clear()
                return
            self._reap()
            time.sleep(_POLL_SECONDS)


def _has_paused(child: _Child, summary: dict[str, Any]) -> bool:
    """Whether a run has come to its pause, and not to one that it left before."""
    return child.process.returncode == 0 and child.pause == summary.get("step")
