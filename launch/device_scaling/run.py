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

from mmfree_jax.children import Children
from mmfree_jax.compiled_programs import is_chosen
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.records import reason
from mmfree_jax.launch.device_scaling.plan import Case
from mmfree_jax.launch.device_scaling.worker import write_case
from mmfree_jax.launch.local import visible_gpus
from mmfree_jax.launch.xla_flags import with_overlap
from mmfree_jax.ranges import AboveZero, Count

RESULTS = "results.jsonl"
_IDLE_MIB = 2048.0
_POLL_S = 0.05
_STOP_S = 10.0


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
    options.out.mkdir(parents=True, exist_ok=True)
    with Children(_STOP_S) as children:
        study = _Study(options, environ, gpus, clock, say, children)
        for i, case in enumerate(cases):
            worker = _Worker(case, options.out / "cases" / f"{i:02d}-{case.name}")
            if case.devices > slots:
                why = f"not run: needs {case.devices} GPUs, {slots} are idle"
                study.record(worker, {"error": why})
            else:
                study.workers.append(worker)
        _place(study.workers, slots)
        study.compile_all()
        study.time_all()
        return study.records


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


class _Study:
    """The workers of a study, and what has been recorded of them."""

    def __init__(
        self,
        options: Options,
        environ: Mapping[str, str],
        gpus: list[str],
        clock: Callable[[], float],
        say: Callable[[str], None],
        children: Children,
    ) -> None:
        self._children = children
        self.workers: list[_Worker] = []
        self.records: list[dict[str, Any]] = []
        self._options, self._environ, self._gpus = options, environ, gpus
        self._clock, self._say, self._begin = clock, say, clock()

    def _seconds(self) -> float:
        return self._clock() - self._begin

    def record(self, worker: _Worker, values: dict[str, Any]) -> None:
        """Keeps what came of a case."""
        worker.finished = True
        entry = {
            "name": worker.case.name,
            "case": dataclasses.asdict(worker.case),
            **values,
            "at_s": round(self._seconds(), 1),
        }
        self.records.append(entry)
        with (self._options.out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._say(f"{entry['at_s']:6.1f} s  {worker.case.name:<32} {_summary(values)}")

    def compile_all(self) -> None:
        """Starts the workers, some at a time, and waits until all have compiled or time is up."""
        limit = self._options.parallel_compiles or max(1, (os.cpu_count() or 4) // 4)
        pending = list(self.workers)
        while True:
            compiling = [w for w in self.workers if w.process and not w.compiled and not w.finished]
            while pending and len(compiling) < limit:
                worker = pending.pop(0)
                self._start(worker, "compile")
                compiling.append(worker)
            for worker in compiling:
                self._look(worker)
            if not pending and not [w for w in compiling if not w.compiled and not w.finished]:
                break
            if self._seconds() > 60 * self._options.compile_minutes:
                self._say(f"{self._seconds():6.1f} s  timing begins; the rest go on compiling")
                for worker in pending:
                    self._start(worker, "compile")
                break
            time.sleep(_POLL_S)
        compiled = sum(w.compiled for w in self.workers)
        self._say(f"{self._seconds():6.1f} s  {compiled} cases compiled")

    def time_all(self) -> None:
        """Gives the word to one worker after another, each on GPUs that no other is using."""
        minutes, each = self._options.max_minutes, self._options.case_minutes
        while left := [w for w in self.workers if not w.finished]:
            for worker in left:
                self._look(worker)
            left = [w for w in left if not w.finished]
            if minutes and self._seconds() > 60 * minutes:
                for worker in left:
                    self.record(worker, {"error": "not run to its end: max-minutes is over"})
                return
            for worker in left:
                if worker.going and self._clock() - worker.going_since > 60 * each:
                    assert worker.process is not None
                    self._children.kill(worker.process)
                    self.record(worker, {"error": f"not done in {each:g} minutes: ended"})
            busy = {gpu for w in left if w.going and not w.finished for gpu in w.gpus}
            for worker in [w for w in left if w.compiled and not w.going]:
                if busy & set(worker.gpus):
                    break  # it is its turn: nobody behind it may take its GPUs
                worker.going, worker.going_since = True, self._clock()
                busy |= set(worker.gpus)
                (worker.folder / "go").touch()
            time.sleep(_POLL_S)

    def _start(self, worker: _Worker, stage: str) -> None:
        """Starts a stage of `launch.device_scaling.worker` in a process of its own."""
        worker.folder.mkdir(parents=True, exist_ok=True)
        if stage == "compile":
            for name in ("go", "compiled.json", "result.json", "log.txt"):
                (worker.folder / name).unlink(missing_ok=True)
            write_case(worker.folder / "case.json", worker.case)
        env = dict(self._environ)
        cache = (self._options.out / "compiled").absolute()
        if not is_chosen(env):
            env["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        env.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        # Several processes wait on one GPU: none may take all its memory beforehand.
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        if self._gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[i] for i in worker.gpus)
            env["XLA_FLAGS"] = " ".join([env.get("XLA_FLAGS", ""), *worker.case.flags])
            env = with_overlap(env) if worker.case.overlap else env
        else:
            flags = [f for f in env.get("XLA_FLAGS", "").split() if "device_count" not in f]
            flags.append(f"--xla_force_host_platform_device_count={worker.case.devices}")
            env["XLA_FLAGS"] = " ".join(flags)
        with (worker.folder / "log.txt").open("a") as log:
            worker.process = self._children.start(
                [sys.executable, "-m", "mmfree_jax.launch.device_scaling.worker", stage,
                 str(worker.folder)],
                env=env, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _look(self, worker: _Worker) -> None:
        """Notices that a worker has compiled, finished or died; what compiled goes on to measure.

        A worker that has not been started is left alone.
        """
        if worker.process is None or not self._children.has_ended(worker.process):
            return
        compiled, result = worker.folder / "compiled.json", worker.folder / "result.json"
        if result.exists():
            values = json.loads(result.read_text(encoding="utf-8"))
            if worker.compiled:
                values["compiled"] = json.loads(compiled.read_text(encoding="utf-8"))
            self.record(worker, values)
        elif worker.process.returncode == 0 and not worker.compiled:
            worker.compiled = True
            self._start(worker, "measure")
        else:
            log = (worker.folder / "log.txt").read_text(errors="replace")
            self.record(worker, {"error": reason(worker.process.returncode, log)})


def _summary(values: dict[str, Any]) -> str:
    if "error" in values:
        return values["error"][:120]
    peak = values.get("peak_gib")
    memory = "" if peak is None else f", peak {peak:.1f} GiB"
    return (
        f"{values['tokens_per_s'] / values['devices']:,.0f} tokens/s a device, "
        f"{values['step_ms']:.1f} ms{memory}"
    )
