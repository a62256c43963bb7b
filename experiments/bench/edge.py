"""Speed and memory on a CPU without JAX: every measurement in a process of its own."""

import contextlib
import dataclasses
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mmfree_jax.cli.parse import Counts, Names
from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.experiments.bench import edge_models, edge_process, edge_report
from mmfree_jax.experiments.bench.records import (
    Row,
    Say,
    Study,
    cpu_name,
    measure_alone,
    one_of,
    say,
)
from mmfree_jax.export import onnx_session
from mmfree_jax.files import disk_errors
from mmfree_jax.places import Place
from mmfree_jax.presets import preset
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, NotNegative

STUDY = Study("edge", edge_report.describe, edge_report.table, edge_report.draw)

# Tokens of a prompt that are read at once: what each runtime's own program does. (The JAX path
# cuts prompts itself.)
PIECES = {"onnx": onnx_session.CHUNK, "jax": 0, "llama": 512}
# How often a measurement is taken while other programs disturb it.
ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """Time decoding and prefill on a CPU with random weights, each in its own process."""

    out: Path
    """Folder that receives edge.json, edge.md (tables) and edge.png."""
    sizes: Names = ("370M", "1.3B")
    """Presets to measure, separated by commas; the peer is the same preset's Transformer++."""
    forms: Names = ("onnx-fast", "llama-q4_0", "onnx-exact", "llama-tq2_0", "llama-q4_k_m",
                    "jax-cpu", "onnx-f32", "llama-f16")  # fmt: skip
    """What to measure, separated by commas, in this order; llama-q8_0 and llama-tq1_0 exist too."""
    contexts: Counts = (32, 512, 2048, 16384)
    """Tokens read before decoding, separated by commas; all forms at the first of them."""
    context_forms: Names = ("onnx-fast", "llama-q4_0")
    """Forms that are measured at the other contexts too, separated by commas."""
    threads: Count = 2
    """Threads, and cores that a measurement may use."""
    steps: Count = 64
    """Tokens of one timed loop."""
    repeats: Count = 3
    """Timed loops; the median counts."""
    prefill: CountOrZero = 512
    """Also time reading a prompt of this many tokens; 0: do not."""
    peer_python: Place = ""
    """Python interpreter that has llama-cpp-python and gguf; empty: the peer is left out."""
    models: Path | None = None
    """Folder for the models' files and saved contexts, several GB, which later runs reuse; none:
    a temporary one."""
    prepare_only: bool = False
    """Make those files and stop."""
    quiet: NotNegative = 0.2
    """Take a measurement again, three times at most, if other processes used more cores than this
    meanwhile; the least disturbed one counts."""
    timeout: AboveZero = 600.0
    """Longest time for one measurement (seconds)."""


def check(plan: Plan) -> None:
    """Refuses a plan that cannot run.

    Raises:
      ConfigError: an unknown size or form, a number that is too large, or a peer without its
        packages.
    """
    for size in plan.sizes:
        preset(size)
        preset(f"{size}-transformer")
    one_of(plan, edge_report.LABELS, "forms", "context_forms")
    for name in ("sizes", "forms", "contexts"):
        if not getattr(plan, name):
            raise ConfigError(f"--{name} is empty: give at least one")
    longest = edge_models.PEER_CONTEXT // 2
    if max(plan.contexts) > longest:
        raise ConfigError(f"--contexts has {max(plan.contexts)}: set 1 to {longest}")
    cores = len(os.sched_getaffinity(0))
    if plan.threads > cores:
        raise ConfigError(f"--threads is {plan.threads}: this process may use {cores} cores")
    if plan.peer_python:
        edge_models.peer_versions(plan.peer_python)


def tasks(plan: Plan, models: Path) -> list[Row]:
    """The measurements of a plan, in the order in which they run.

    Peer and own forms of a size are neighbours in time: what disturbs one disturbs the other.
    """
    out: list[Row] = []
    for size in plan.sizes:
        for form in plan.forms:
            out.append(_task(plan, models, size, form, "decode", plan.contexts[0]))
            if plan.prefill:
                out.append(_task(plan, models, size, form, "prefill", plan.prefill))
    for size in plan.sizes:
        for context in plan.contexts[1:]:
            for form in plan.context_forms:
                task = _task(plan, models, size, form, "decode", context)
                state = models / size / f"{form}-{context}.state"
                out.append(task | {"state": str(state)})
    return out


def _task(plan: Plan, models: Path, size: str, form: str, work: str, tokens: int) -> Row:
    places = tokens + (plan.steps if work == "decode" else 0)
    return {
        "work": work,
        "size": size,
        "form": form,
        "runtime": edge_models.runtime(form),
        "path": str(edge_models.place(models, size, form)),
        ("context" if work == "decode" else "tokens"): tokens,
        "places": -(-places // 256) * 256,
        "vocab_size": preset(size).model.vocab_size,
        "piece": PIECES[edge_models.runtime(form)],
        "threads": plan.threads,
        "steps": plan.steps,
        "repeats": plan.repeats,
    }


def machine(plan: Plan) -> Row:
    """Where a run took place."""
    about = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    first = {name.strip(): value.strip() for name, _, value in reversed(about)}
    flags = first.get("flags", "").split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "f16c", "fma")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": plan.threads,
        "instructions": [name for name in wanted if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "peer": edge_models.peer_versions(plan.peer_python) if plan.peer_python else None,
    }


def measure(plan: Plan, command: str, say: Say = say) -> list[Row]:
    """Runs a plan and keeps it in its folder.

    All model files and contexts are made before the first measurement. What cannot be made, or
    fails, becomes a row with the reason; with `prepare_only` there are no other rows.

    Raises:
      ConfigError: the plan cannot run.
    """
    check(plan)
    if plan.models is None:
        parent = plan.out.parent if plan.out.parent.is_dir() else None
        with contextlib.ExitStack() as held:
            with disk_errors(plan.out, "choose another place"):
                folder = held.enter_context(tempfile.TemporaryDirectory(dir=parent))
            return measure(dataclasses.replace(plan, models=Path(folder)), command, say)
    todo = tasks(plan, plan.models.absolute())
    failures: dict[int, str] = {}
    for number, task in enumerate(todo):
        try:
            edge_models.prepare(
                plan.models.absolute(), task["size"], task["form"], plan.peer_python, plan.threads,
                say,
            )  # fmt: skip
            if "state" in task:
                edge_models.prepare_context(task, _python(plan, task), say)
        except MMFreeError as e:
            failures[number] = str(e)
    if plan.prepare_only:
        return [todo[number] | {"failed": why} for number, why in failures.items()]

    def rows() -> Iterator[Row]:
        for number, task in enumerate(todo):
            why = failures.get(number)
            yield _run_quietly(plan, task) if why is None else task | {"failed": why}

    return STUDY.collect({"command": command, "machine": machine(plan)}, rows(), plan.out, say)


def _python(plan: Plan, task: Row) -> str:
    return plan.peer_python if task["runtime"] == "llama" else sys.executable


def _run_quietly(plan: Plan, task: Row) -> Row:
    """The first measurement that nothing disturbed, or the least disturbed one."""
    rows: list[Row] = []
    for _ in range(ATTEMPTS):
        rows.append(_run(task, _python(plan, task), plan.timeout))
        if rows[-1].get("cores_of_others", 0) <= plan.quiet:
            break
    best = min(rows, key=lambda row: row.get("cores_of_others", math.inf))
    return best | {"attempts": len(rows)}


def _run(task: Row, python: str, timeout_s: float) -> Row:
    files = edge_models.weight_files(Path(task["path"]))
    task = task | {"file_mb": round(sum(p.stat().st_size for p in files) / 1e6, 1)}
    row = measure_alone([python, "-I", edge_process.__file__], task, timeout_s)
    # Where files lay is this machine's business.
    return {name: value for name, value in row.items() if name not in ("path", "state")}
