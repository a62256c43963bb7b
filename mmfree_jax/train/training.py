"""A training run: opened, started or resumed, and ended well whatever happens."""

import contextlib
import errno
import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from mmfree_jax.config import TrainConfig
from mmfree_jax.data.verification import Verification
from mmfree_jax.errors import CheckpointError, MMFreeError, OutputError, StorageError, TrainingError
from mmfree_jax.files import is_disk_error
from mmfree_jax.leases import LeaseLostError
from mmfree_jax.notices import Notices, metadata_host
from mmfree_jax.parallel import processes
from mmfree_jax.parallel.process_options import planned_processes
from mmfree_jax.parallel.processes import ProcessLostError, ProcessOptions
from mmfree_jax.parallel.watchdog import Watchdog
from mmfree_jax.progress import Display, open_display
from mmfree_jax.saved.best import best_metric
from mmfree_jax.saved.checkpoint import Checkpointer
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.local_copies import LocalCopies
from mmfree_jax.saved.run_directory import CHECKPOINTS, METRICS, run_identity, write_config
from mmfree_jax.train.best import BestSteps
from mmfree_jax.train.branch import check_apart
from mmfree_jax.train.loop import Loop, Sampler
from mmfree_jax.train.metrics import Stopwatch
from mmfree_jax.train.recorder import Recorder
from mmfree_jax.train.report import Summary, describe, describe_layout, finished_summary
from mmfree_jax.train.run_display import RunDisplay
from mmfree_jax.train.same_run import check_run_dir
from mmfree_jax.train.setup import (
    Run,
    check_same_data,
    checkpoint_metadata,
    copy_tokenizer,
    datasets_read,
    open_run,
    take_run_dir,
)
from mmfree_jax.train.sinks import make_sinks
from mmfree_jax.train.start import start_state
from mmfree_jax.train.stop import catch_signals


def train(
    config: TrainConfig,
    *,
    clock: Callable[[], float] = time.monotonic,
    sampler: Sampler | None = None,
    on_step: Callable[[int], None] | None = None,
    process_options: ProcessOptions | None = None,
    display: Display | None = None,
) -> Summary:
    """Trains one model, from the newest good checkpoint in `config.run_dir` if there is one.

    Else from the checkpoint that `config.branch_from` names: `branch_config` makes such a config.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 end the run early with a checkpoint; so do notices of
    Compute Engine, `config.max_minutes` and `config.stop_at`. With several processes
    (`processes.join` comes before) all call this alike, and a signal to one stops all.

    Args:
      config: the run.
      clock: seconds from any origin, for `max_minutes`, `checkpoint.every_minutes` and rates.
      sampler: writes the sample texts; default: `mmfree_jax.infer.sample_text`.
      on_step: called with the number of each step after it was dispatched.
      process_options: how long to bear with another process that is silent or hangs, and whose
        notices to hear.
      display: shows what happens; closed at the end. Default: as `config.log.progress` says, on
        standard output.

    Returns:
      What summary.json holds; `status` is "complete" or "stopped", and `stopped_by` says by what.

    Raises:
      ConfigError: a setting does not fit the devices or the run directory.
      DataError: data is missing, damaged or does not fit the model.
      CheckpointError: a checkpoint cannot be read or written, or another job uses run_dir.
      TrainingError: the loss is not finite, every step was skipped, or device memory is too
        small.
      ProcessLostError: another process is gone.
    """
    is_writer = jax.process_index() == 0
    if display is None:
        kind = config.log.progress if is_writer else "none"
        display = open_display(kind, sys.stdout, patience=0.0)
    elif not is_writer:
        display.close()
        display = Display()
    with (
        contextlib.closing(display),
        contextlib.ExitStack() as held,
        catch_signals(display.notice) as request,
    ):
        watch = Stopwatch(clock)
        display.stage("reading the data")
        options = process_options or ProcessOptions()
        watchdog = _watch(options, held)
        if (host := metadata_host(options.notices)) is not None:
            held.callback(Notices(host, request.announce).close)
        check_apart(config)
        run = open_run(config, planned_processes(options))
        if run.tasks is not None:
            held.callback(run.tasks.close)
        run = take_run_dir(run, held)
        verification = Verification(datasets_read(run))

        def look() -> Summary | None:
            check_run_dir(run.run_dir, config, run.place)
            check_same_data(run)
            with display.during("comparing the last checkpoint with its checksums"):
                summary = finished_summary(run)
            if summary is None:
                verification.start()
            return summary

        if (summary := processes.first(look)) is not None:
            return summary
        display.stage("building the model")
        copies = None
        if config.checkpoint.local_dir is not None:
            copies = LocalCopies(Path(config.checkpoint.local_dir), run_identity(run.run_dir))
            held.callback(copies.wait)
        start = start_state(run, watch, copies)
        run, config = start.run, start.run.config
        if is_writer:
            write_config(run.run_dir, config)
            copy_tokenizer(run)
            run.publish()
        best = _best_steps(config, run.run_dir, start.step) if is_writer else None
        checkpointer = Checkpointer(
            run.place / CHECKPOINTS,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            keep_steps=config.checkpoint.at_steps,
            keep_among=best.among if best is not None else lambda steps: (),
            check_ours=run.check,
        )
        if start.is_new_branch:  # from here on the parent may go, and a kill loses nothing
            metadata = checkpoint_metadata(run, start.step, start.meter, 0.0, start.goodput)
            checkpointer.save(start.step, start.state, metadata)
            checkpointer.wait()
        # The sinks that can be refused come before the display that must be closed.
        sinks = make_sinks(config, run.run_dir, start.step) if is_writer else []
        sinks += [best] if best is not None else []
        recorder = Recorder(
            config,
            run.run_dir,
            place=run.place,
            restored_step=start.step,
            origin=run.origin,
            meter=start.meter,
            sinks=sinks,
            progress=RunDisplay(display, config.steps),
            settle=functools.partial(_wait_quietly, checkpointer),
            saved_goodput=start.goodput,
            watch=watch,
            clock=clock,
        )
        recorder.message(describe(run))
        if run.is_reduced:
            recorder.event(start.step, describe_layout(run))
        is_told = "event" in recorder.last
        if recorder.kept_as is not None:
            kept = f"the records of an earlier start are kept in {recorder.kept_as.name}"
            recorder.event(start.step, f"{kept}: it saved no checkpoint to go on from")
        for note in start.notes:
            recorder.event(start.step, note)
        if run.origin.parent is not None and not is_told:
            recorder.event(start.step, run.origin.account)
        if start.is_resumed:
            recorder.event(start.step, f"resumed from checkpoint {start.step}")
        with contextlib.ExitStack() as stack:
            stack.push(functools.partial(_publish_last, run))
            stack.callback(recorder.close)
            stack.callback(_wait_quietly, checkpointer)
            try:
                loop = Loop(
                    run,
                    recorder,
                    checkpointer,
                    verification,
                    request,
                    clock,
                    sampler,
                    on_step,
                    watchdog,
                    best,
                    copies,
                )
                stack.callback(loop.close)
                summary = loop.run(start.state, start.step)
                if copies is not None and summary["status"] == "complete":
                    copies.remove()
                return summary
            except (jax.errors.JaxRuntimeError, ValueError, CheckpointError) as e:
                if "RESOURCE_EXHAUSTED" in str(e):
                    raise TrainingError(_out_of_memory(config)) from e
                lost = watchdog.explain() if watchdog and may_be_a_loss(e) else None
                if lost is None:
                    raise
                checkpointer.abandon()  # it would wait for the one that is gone
                raise ProcessLostError(lost) from e
            except LeaseLostError:
                raise
            except (OutputError, StorageError) as e:
                raise type(e)(f"{e}; then run the command again: it resumes") from e
            except OSError as e:
                if not is_disk_error(e):
                    raise
                raise OutputError(
                    f"run_dir {run.run_dir} cannot be written ({e.strerror}): make room there, "
                    "then run the command again: it resumes"
                ) from e


def _best_steps(config: TrainConfig, run_dir: Path, restored_step: int) -> BestSteps | None:
    """The best steps up to the one that is gone on from; None: none are kept."""
    if not config.checkpoint.keep_best:
        return None
    found = read_history(run_dir / METRICS) if restored_step else []
    records = [r for r in found if r.get("step", 0) <= restored_step]
    return BestSteps(best_metric(config.checkpoint), config.checkpoint.keep_best, records)


def _watch(options: ProcessOptions, held: contextlib.ExitStack) -> Watchdog | None:
    """A watchdog over the run's processes, until `held` closes; None where there is but one."""
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return None
    watchdog = Watchdog(index, count, processes.Notes(), options)
    watchdog.start()
    held.callback(watchdog.stop)
    return watchdog


def _wait_quietly(checkpointer: Checkpointer) -> None:
    """Lets a save under way finish, whatever else has gone wrong."""
    with contextlib.suppress(MMFreeError):
        checkpointer.wait()


def _publish_last(run: Run, kind: type[BaseException] | None, *_: object) -> None:
    """Uploads what the end of a run has left, whatever else has gone wrong."""
    if kind is None:
        run.publish()
    else:
        with contextlib.suppress(MMFreeError):
            run.publish()


def may_be_a_loss(error: Exception) -> bool:
    """Whether a process that is gone can be behind it: a full disk or a bucket is not.

    Gloo's failures are ValueErrors; a save that waits for the others fails as a checkpoint.
    """
    is_full = os.strerror(errno.ENOSPC) in str(error)
    return not is_full and not isinstance(error.__cause__, MMFreeError | OSError)


def _out_of_memory(config: TrainConfig) -> str:
    rows, parts = config.batch_size, config.grad_accum
    more = next((n for n in range(parts + 1, rows + 1) if rows % n == 0), None)
    ways = [] if more is None else [f"--grad-accum {more}"]
    if config.model.remat != "full":
        ways.append("--model.remat full")
    if config.loss_chunk > 1:
        ways.append(f"--loss-chunk {config.loss_chunk // 2}")
    ways.append(f"--mesh.fsdp {2 * config.mesh.fsdp} on as many more devices")
    return (
        f"device memory is too small for batch_size {rows} / grad_accum {parts} at data.seq_len "
        f"{config.data.seq_len}: set {' or '.join(ways)}"
    )
