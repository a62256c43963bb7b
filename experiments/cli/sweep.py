"""`mmfree sweep plan`, `run`, `status` and `report`."""

import dataclasses
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import AboveZero, Count, Seed

if TYPE_CHECKING:
    from mmfree_jax.experiments.sweep.config import SweepConfig
    from mmfree_jax.experiments.sweep.folder import SweepFolder

_SHARD = "SLURM_ARRAY_TASK_ID"


@dataclass(frozen=True)
class _Sweep:
    config: Annotated[Path, tyro.conf.Positional]
    """YAML file of the sweep; docs/sweeps.md explains its fields."""
    out: PlaceOrUrl | None = None
    """Folder in place of the config's `out`, or its URL in a bucket."""
    data: tuple[PlaceOrUrl, ...] = ()
    """Prepared data folders in place of the config's train.data.paths."""
    families: tuple[str, ...] = ()
    """Only these of the sweep's families."""
    sizes: tuple[str, ...] = ()
    """Only these of its sizes; runs are called as they are in the whole, and share its folder."""
    seeds: tuple[Seed, ...] = ()
    """Only these of its seeds."""


@dataclass(frozen=True)
class _Cost(_Sweep):
    parallel: Count = 1
    """Small runs at a time on each device; each gets its share of the memory."""
    shard: str | None = None
    """i/n: only every n-th run, from the i-th (from 0); "slurm": from the job array's variables."""
    stage: Literal["all", "tuning", "main"] = "all"
    """Only the runs that choose learning rates, or only those that use them."""
    device: str | None = None
    """Estimate the time for this device (such as "H100"), not for those here."""
    gpus: tuple[str, ...] = ()
    """GPUs to spread runs over (such as 0 1 2 3), one run on one; none: each run sees all."""


@dataclass(frozen=True)
class _Run(_Cost):
    order: Literal["cheapest", "longest"] = "cheapest"
    """Cheapest first: an early end leaves the most finished runs. Longest first: the last to
    end are short; for several runs at a time."""
    max_minutes: AboveZero | None = None
    """Stop after this much time (minutes); runs under way save a checkpoint and go on later."""
    retry_failed: bool = False
    """Try failed runs again."""


@dataclass(frozen=True)
class _Status(_Sweep):
    watch: bool = False
    """Go on showing the runs under way and the time that is left, until the sweep is over or
    Ctrl-C."""
    every: AboveZero = 5.0
    """With --watch: time between looks at the folder (seconds)."""


@dataclass(frozen=True)
class _Report(_Sweep):
    plot: bool = True
    """Draw loss over compute, best rates and gaps, and write the numbers beside it."""


def _load(a: _Sweep) -> "SweepConfig":
    from mmfree_jax.experiments.sweep.config import load_sweep
    from mmfree_jax.experiments.sweep.parts import part_of

    whole = load_sweep(a.config, out=a.out, data=a.data)
    return part_of(whole, a.families, a.sizes, a.seeds)


def planned_sweep(argv: Sequence[str]) -> "SweepConfig":
    """The sweep of `sweep run` with these arguments, its plan checked.

    Raises:
      MMFreeError: what `sweep run` would refuse of the arguments or of the plan.
    """
    a = parse(_Run, argv, prog="mmfree sweep run", description=run.__doc__)
    from mmfree_jax.experiments.sweep.state import snapshot
    from mmfree_jax.storage import is_url

    sweep = _load(a)
    if is_url(sweep.out):  # which only the machines of the job may be able to read
        with tempfile.TemporaryDirectory() as empty:
            snapshot(dataclasses.replace(sweep, out=empty))
    else:
        snapshot(sweep)
    return sweep


def _shard(text: str | None) -> tuple[int, int]:
    """`--shard`, or a SLURM array's task and size."""
    from mmfree_jax.errors import ConfigError
    from mmfree_jax.experiments.sweep.plan import parse_shard

    if text != "slurm":
        return parse_shard(text)
    try:
        first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        count = int(os.environ["SLURM_ARRAY_TASK_COUNT"])
        return parse_shard(f"{int(os.environ[_SHARD]) - first}/{count}")
    except (KeyError, ValueError) as e:
        raise ConfigError(f"shard is 'slurm', but {_SHARD} and SLURM_ARRAY_TASK_COUNT are not "
                          "set: start it with sbatch --array, or give i/n") from e  # fmt: skip


def _announce(
    a: _Cost, folder: "SweepFolder", *, need_data: bool, retry_failed: bool = False
) -> int:
    """Prints the plan and its cost; returns how many runs are left to this shard."""
    from mmfree_jax.errors import DataError
    from mmfree_jax.experiments.sweep.branches import apart
    from mmfree_jax.experiments.sweep.cost import device_from_name, estimate, probe_device
    from mmfree_jax.experiments.sweep.notes import plan_notes
    from mmfree_jax.experiments.sweep.plan import shard, without_repeats
    from mmfree_jax.experiments.sweep.report import cost_text, plan_text
    from mmfree_jax.experiments.sweep.runner import Options
    from mmfree_jax.experiments.sweep.state import check_data, snapshot
    from mmfree_jax.readable import format_seconds

    options = Options(parallel=a.parallel, gpus=a.gpus, shard=_shard(a.shard), stage=a.stage)
    sweep = folder.sweep
    found = snapshot(sweep)
    sharded = [
        run for stage in options.stages
        for run in shard(sweep, found.of_stage(stage), *options.shard)
    ]  # fmt: skip
    runs = without_repeats(sweep, sharded)
    try:
        tokens = check_data(runs)
    except DataError as e:
        if need_data:
            raise
        tokens = None
        print(f"note: {e}; passes over the data are left out, and rungs and shapes without "
              "model.vocab_size are taken to have 32,000 tokens")  # fmt: skip
    print(plan_text(runs, tokens))
    for note in plan_notes(sweep, runs, tokens):
        print(note)
    ended = ("done", "dropped") if retry_failed else ("done", "dropped", "failed")
    todo = [r for r in runs if found.status(r) not in ended]
    with show_progress("looking at the devices"):
        device = device_from_name(a.device) if a.device else probe_device()
    rows = list(found.rows.values())
    whole = estimate(sweep, runs, rows, device, a.parallel, len(a.gpus))
    left = (
        estimate(sweep, todo, rows, device, a.parallel, len(a.gpus))
        if len(todo) < len(runs)
        else None
    )
    index, count = options.shard
    label = "all" if count == 1 else f"shard {index}/{count}"
    print(cost_text(whole, left, label if a.stage == "all" else f"{label}, {a.stage}"), flush=True)
    if len(separate := apart(runs)) < len(runs):
        cost = estimate(sweep, separate, rows, device, a.parallel, len(a.gpus))
        print(f"without trunks: {cost.runs} runs, {cost.flops:.3g} FLOPs, about "
              f"{format_seconds(cost.seconds)}", flush=True)  # fmt: skip
    if sweep.widen_rates:
        print(f"to this come up to {sweep.widen_rates} rates at each end of a list, while the best "
              "one is at that end", flush=True)  # fmt: skip
    return len(todo)


def plan(argv: Sequence[str]) -> int:
    """List the runs of a sweep, its FLOPs and its time on this hardware."""
    a = parse(_Cost, argv, prog="mmfree sweep plan", description=plan.__doc__)
    from mmfree_jax.experiments.sweep.folder import open_folder

    with open_folder(_load(a), trusting=True) as folder:
        _announce(a, folder, need_data=False)
    return 0


def run(argv: Sequence[str]) -> int:
    """Run what is left of a sweep; a failed run is recorded and the rest goes on."""
    a = parse(_Run, argv, prog="mmfree sweep run", description=run.__doc__)
    from mmfree_jax.experiments.sweep.errors import SweepError
    from mmfree_jax.experiments.sweep.folder import open_folder
    from mmfree_jax.experiments.sweep.runner import Options, run_sweep

    sweep = _load(a)
    options = Options(
        parallel=a.parallel, gpus=a.gpus, shard=_shard(a.shard), stage=a.stage,
        max_minutes=a.max_minutes, retry_failed=a.retry_failed, order=a.order,
    )  # fmt: skip
    with open_folder(sweep, trusting=True) as folder:
        _announce(a, folder, need_data=True, retry_failed=a.retry_failed)
    with show_progress("") as show:
        tally = run_sweep(sweep, options, say=lambda text: print(text, flush=True), show=show)
    counts = [(len(tally.done), "finished"), (len(tally.failed), "failed"),
              (len({*tally.paused} - {*tally.done}), "paused or ended at a pause"),
              (len(tally.standing), "failed before and not tried again"),
              (len(tally.stopped), "cut off"), (len(tally.elsewhere), "under way elsewhere"),
              (tally.waiting, "waiting for tuning runs or trunks")]  # fmt: skip
    print("; ".join(f"{n} {what}" for n, what in counts if n) or "nothing was left to do")
    if tally.signal is not None:
        return 128 + (tally.signal or signal.SIGTERM)
    if failed := tally.standing | tally.failed:
        sys.stdout.flush()
        name, reason = next(iter(failed.items()))
        what = f"run {name} failed" if len(failed) == 1 else f"{len(failed)} runs failed, {name}"
        raise SweepError(f"{what} ({reason}): `mmfree sweep status {a.config}` has each reason; "
                         "once it is put right --retry-failed tries again")  # fmt: skip
    return 0


def status(argv: Sequence[str]) -> int:
    """Show how far a sweep has come, and why runs failed."""
    a = parse(_Status, argv, prog="mmfree sweep status", description=status.__doc__)
    from mmfree_jax.experiments.sweep.folder import open_folder
    from mmfree_jax.experiments.sweep.report import status_text
    from mmfree_jax.experiments.sweep.state import snapshot
    from mmfree_jax.experiments.sweep.watch import watch

    sweep = _load(a)
    if a.watch:
        watch(sweep, sys.stdout, every=a.every)
    with open_folder(sweep, trusting=True) as folder:
        print(status_text(snapshot(folder.sweep)))
    return 0


def report(argv: Sequence[str]) -> int:
    """Choose the learning rates, compare the losses, and write the runs for `mmfree fit`."""
    a = parse(_Report, argv, prog="mmfree sweep report", description=report.__doc__)
    from mmfree_jax.errors import ConfigError
    from mmfree_jax.experiments.sweep.folder import open_folder
    from mmfree_jax.experiments.sweep.report import write_report
    from mmfree_jax.experiments.sweep.state import snapshot

    with open_folder(_load(a), trusting=True) as folder:
        if not folder.is_there():
            raise ConfigError(f"out is {str(folder.place)!r}, which does not exist: run the sweep "
                              "first")  # fmt: skip
        text, paths = write_report(snapshot(folder.sweep), plot=a.plot)
        folder.publish(*(path.name for path in paths))
        print(folder.told(text))
        if paths:
            print("\nwrote " + ", ".join(str(folder.place / path.name) for path in paths))
    return 0
