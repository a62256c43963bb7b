"""Runs the cases of a scaling study: all compile at once, then each has its GPUs to itself."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.records import reason
from mmfree_jax.launch.device_scaling.plan import Case
from mmfree_jax.launch.device_scaling.worker import write_case
from mmfree_jax.launch.local import visible_gpus
from mmfree_jax.launch.xla_flags import with_overlap
from mmfree_jax.ranges import AboveZero, Count

RESULTS = "results.jsonl"
_IDLE_MIB = 2048.0


@dataclasses.dataclass
class _Worker:
    case: Case
    folder: Path
    process: subprocess.Popen | None = None
    gpus: tuple[int, ...] = ()
    compiled: bool = False
    going: bool = False
    going_since: float = 0.0
    finished: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """How a study is run."""

    out: Path
    max_minutes: AboveZero | None = None
    compile_minutes: AboveZero = 3.0
    """How long all may compile together before the timing begins with those that are ready."""
    parallel_compiles: Count | None = None
    case_minutes: AboveZero = 2.0
    """How long one may take once it has the word: a collective that waits for good is ended."""


def run_study(
    cases: Sequence[Case],
    options: Options,
    *,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Measures `cases`, first come first, and appends each record as soon as it is there.

    Each case waits, compiled, for a process of its own that sees only its GPUs. A case starts
    when enough GPUs are free and all before it have started. One that fails is recorded with
    its reason; those that the time runs out on are recorded as not run.

    GPUs that others are using are left out, and cases that need more are recorded so.

    Raises:
      ConfigError: max_minutes is not positive.
    """
    if options.max_minutes is not None and options.max_minutes <= 0:
        raise ConfigError(f"max-minutes is {options.max_minutes}: set above 0")
    all_gpus = visible_gpus(environ)
    gpus = idle_gpus(all_gpus)
    if len(gpus) < len(all_gpus):
        say(f"in use by others and left out: GPU {', '.join(sorted({*all_gpus} - {*gpus}))}")
    # Simulated devices: as many as the largest case.
    slots = len(gpus) if all_gpus else max(case.devices for case in cases)
    begin = clock()
    end = begin + 60 * options.max_minutes if options.max_minutes else float("inf")
    options.out.mkdir(parents=True, exist_ok=True)
    workers = [
        _Worker(case, options.out / "cases" / f"{i:02d}-{case.name}")
        for i, case in enumerate(cases)
    ]
    records: list[dict[str, Any]] = []

    def record(worker: _Worker, values: dict[str, Any]) -> None:
        worker.finished = True
        entry = {
            "name": worker.case.name,
            "case": dataclasses.asdict(worker.case),
            **values,
            "at_s": round(clock() - begin, 1),
        }
        records.append(entry)
        with (options.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        say(f"{entry['at_s']:6.1f} s  {worker.case.name:<32} {_summary(values)}")

    def measure(worker: _Worker) -> None:
        worker.compiled = True
        _start(worker, "measure", gpus, options, environ)

    too_large = [worker for worker in workers if worker.case.devices > slots]
    for worker in too_large:
        record(worker, {"error": f"not run: needs {worker.case.devices} GPUs, {slots} are idle"})
    workers = [worker for worker in workers if worker not in too_large]
    try:
        _place(workers, slots)
        _compile_all(workers, gpus, options, environ, begin, clock, measure, record, say)
        _time_all(workers, end, options.case_minutes, clock, measure, record)
    finally:
        for worker in workers:
            if worker.process is not None:
                worker.process.kill()  # does nothing to one that has ended
                worker.process.wait()
    return records


def idle_gpus(gpus: Sequence[str]) -> list[str]:
    """Those of `gpus` whose memory nobody holds; all where the driver's tool does not tell."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    if not gpus:
        return []
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return list(gpus)
    rows = [line.split(",") for line in done.stdout.splitlines() if "," in line]
    used = {row[0].strip(): float(row[1]) for row in rows}
    return [gpu for gpu in gpus if used.get(gpu, 0.0) < _IDLE_MIB]


def _place(workers: list[_Worker], slots: int) -> None:
    """Gives each case its devices: neighbours in the order share the host as they fit."""
    at = 0
    for number, worker in enumerate(workers):
        count = worker.case.devices
        at = 0 if at + count > slots else at
        devices = [at + i for i in range(count)]
        # Kernels are tuned on a process's first device: where all are taken, begin elsewhere.
        turn = number % count if count == slots else 0
        worker.gpus = tuple(devices[turn:] + devices[:turn])
        at += count


def _compile_all(workers, gpus, options, environ, begin, clock, measure, record, say) -> None:
    """Starts the workers, some at a time, and waits until all have compiled or time is up."""
    limit = options.parallel_compiles or max(1, (os.cpu_count() or 4) // 4)
    deadline = begin + 60 * options.compile_minutes
    pending = list(workers)
    while True:
        compiling = [w for w in workers if w.process and not w.compiled and not w.finished]
        while pending and len(compiling) < limit:
            worker = pending.pop(0)
            _start(worker, "compile", gpus, options, environ)
            compiling.append(worker)
        for worker in compiling:
            _look(worker, measure, record)
        if not pending and not [w for w in compiling if not w.compiled and not w.finished]:
            break
        if clock() > deadline:
            say(f"{clock() - begin:6.1f} s  timing begins; the rest go on compiling")
            for worker in pending:
                _start(worker, "compile", gpus, options, environ)
            break
        time.sleep(0.05)
    say(f"{clock() - begin:6.1f} s  {sum(w.compiled for w in workers)} cases compiled")


def _start(
    worker: _Worker, stage: str, gpus: list[str], options: Options, environ: Mapping[str, str]
) -> None:
    """Starts a stage of `mmfree_jax.launch.device_scaling.worker` in a process of its own."""
    worker.folder.mkdir(parents=True, exist_ok=True)
    if stage == "compile":
        for name in ("go", "compiled.json", "result.json", "log.txt"):
            (worker.folder / name).unlink(missing_ok=True)
        write_case(worker.folder / "case.json", worker.case)
    env = dict(environ)
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str((options.out / "compiled").absolute()))
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    env.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # Several processes wait on one GPU: none may take all its memory beforehand.
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i] for i in worker.gpus)
        env = with_overlap(env) if worker.case.overlap else env
    else:
        flags = [f for f in env.get("XLA_FLAGS", "").split() if "device_count" not in f]
        flags.append(f"--xla_force_host_platform_device_count={worker.case.devices}")
        env["XLA_FLAGS"] = " ".join(flags)
    with (worker.folder / "log.txt").open("a") as log:
        worker.process = subprocess.Popen(
            [sys.executable, "-m", "mmfree_jax.launch.device_scaling.worker", stage,
             str(worker.folder)],
            env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip


def _look(
    worker: _Worker,
    measure: Callable[[_Worker], None],
    record: Callable[[_Worker, dict[str, Any]], None],
) -> None:
    """Notices that a worker has compiled, finished or died; what compiled goes on to measure."""
    assert worker.process is not None
    status = worker.process.poll()
    if status is None:
        return
    compiled, result = worker.folder / "compiled.json", worker.folder / "result.json"
    if result.exists():
        values = json.loads(result.read_text(encoding="utf-8"))
        if worker.compiled:
            values["compiled"] = json.loads(compiled.read_text(encoding="utf-8"))
        record(worker, values)
    elif status == 0 and not worker.compiled:
        measure(worker)
    else:
        log = (worker.folder / "log.txt").read_text(errors="replace")
        record(worker, {"error": reason(status, log)})


def _time_all(workers, end, case_minutes, clock, measure, record) -> None:
    """Gives the word to one worker after another, each on GPUs that no other is using."""
    while True:
        waiting = [w for w in workers if not w.finished and not w.going]
        running = [w for w in workers if not w.finished and w.going]
        if not waiting and not running:
            return
        for worker in [*waiting, *running]:
            _look(worker, measure, record)
        if clock() > end:
            for worker in [*waiting, *running]:
                if not worker.finished:
                    record(worker, {"error": "not run to its end: max-minutes is over"})
            return
        for worker in running:
            if not worker.finished and clock() - worker.going_since > 60 * case_minutes:
                worker.process.kill()
                worker.process.wait()
                record(worker, {"error": f"not done in {case_minutes:g} minutes: ended"})
        busy = {gpu for w in workers if w.going and not w.finished for gpu in w.gpus}
        for worker in [w for w in waiting if w.compiled and not w.finished]:
            if busy & set(worker.gpus):
                break  # it is its turn: nobody behind it may take its GPUs
            worker.going, worker.going_since = True, clock()
            busy |= set(worker.gpus)
            (worker.folder / "go").touch()
        time.sleep(0.05)


def _summary(values: dict[str, Any]) -> str:
    if "error" in values:
        return values["error"][:120]
    peak = values.get("peak_gib")
    memory = "" if peak is None else f", peak {peak:.1f} GiB"
    return (
        f"{values['tokens_per_s'] / values['devices']:,.0f} tokens/s a device, "
        f"{values['step_ms']:.1f} ms{memory}"
    )
