"""Speed and memory on a CPU without JAX: every measurement in a process of its own."""

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError, MMFreeError
from mmfree_jax.experiments.bench import edge_models, edge_one, edge_report
from mmfree_jax.experiments.bench.edge_report import describe
from mmfree_jax.export import onnx_session
from mmfree_jax.presets import preset

# What is measured, and what tables call it.
FORMS = edge_report.LABELS
RECORDS = "edge.json"
TABLE = "edge.md"
FIGURE = "edge.png"

# Tokens of a prompt that are read at once: what each runtime's own program does. (The JAX path
# cuts prompts itself.)
PIECES = {"onnx": onnx_session.CHUNK, "jax": 0, "llama": 512}
# How often a measurement is taken while other programs disturb it.
ATTEMPTS = 3

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure; see `mmfree bench edge --help`."""

    sizes: tuple[str, ...]
    forms: tuple[str, ...]
    contexts: tuple[int, ...]
    context_forms: tuple[str, ...]
    threads: int
    steps: int
    repeats: int
    prefill: int
    peer_python: str
    models: Path | None
    quiet: float
    timeout_s: float


def check(plan: Plan) -> None:
    """Refuses a plan that cannot run.

    Raises:
      ConfigError: an unknown size or form, a number that is too small or too large, or a peer
        without its packages.
    """
    for size in plan.sizes:
        preset(size)
        preset(f"{size}-transformer")
    for flag, forms in (("forms", plan.forms), ("context-forms", plan.context_forms)):
        for form in forms:
            if form not in FORMS:
                raise ConfigError(f"--{flag} has {form!r}: choose from {', '.join(FORMS)}")
    for name, values in (("sizes", plan.sizes), ("forms", plan.forms), ("contexts", plan.contexts)):
        if not values:
            raise ConfigError(f"--{name} is empty: give at least one")
    for name in ("threads", "steps", "repeats"):
        if getattr(plan, name) < 1:
            raise ConfigError(f"--{name} is {getattr(plan, name)}: set 1 or more")
    if plan.quiet < 0:
        raise ConfigError(f"--quiet is {plan.quiet}: set a number of cores, 0 or more")
    if plan.prefill < 0:
        raise ConfigError(f"--prefill is {plan.prefill}: set 0 (none) or more")
    for context in plan.contexts:
        if not 1 <= context <= edge_models.PEER_CONTEXT // 2:
            raise ConfigError(f"--contexts has {context}: set 1 to {edge_models.PEER_CONTEXT // 2}")
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
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), ""
    ).split()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "f16c", "fma")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": plan.threads,
        "instructions": [name for name in wanted if name in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "peer": edge_models.peer_versions(plan.peer_python) if plan.peer_python else None,
    }


def measure(plan: Plan, out: Path, command: str, say: Say, *, prepare_only: bool) -> list[Row]:
    """Runs a plan and writes records, table and figure to a folder, anew after each row.

    All model files and contexts are made before the first measurement. What cannot be made, or
    fails, becomes a row with the reason.
    """
    if plan.models is None:
        with tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder:
            return _measure(plan, Path(folder), out, command, say, prepare_only)
    return _measure(plan, plan.models, out, command, say, prepare_only)


def _measure(
    plan: Plan, models: Path, out: Path, command: str, say: Say, prepare_only: bool
) -> list[Row]:
    todo = tasks(plan, models.absolute())
    failures: dict[int, str] = {}
    for number, task in enumerate(todo):
        try:
            edge_models.prepare(
                models, task["size"], task["form"], plan.peer_python, plan.threads, say
            )
            if "state" in task:
                edge_models.prepare_context(task, _python(plan, task), say)
        except MMFreeError as e:
            failures[number] = str(e)
    if prepare_only:
        return [todo[number] | {"failed": why} for number, why in failures.items()]
    out.mkdir(parents=True, exist_ok=True)
    record: Row = {"command": command, "machine": machine(plan), "rows": []}
    for number, task in enumerate(todo):
        if number in failures:
            row = task | {"failed": failures[number]}
        else:
            row = _run_quietly(plan, task)
        record["rows"].append(row)
        say(describe(row))
        (out / RECORDS).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_report(record, out)  # a run that is cut short leaves what it measured
    return record["rows"]


def write_report(record: Row, out: Path) -> None:
    """Writes the table and the figure of a record."""
    (out / TABLE).write_text(edge_report.table(record["rows"]), encoding="utf-8")
    edge_report.draw(record, out / FIGURE)


def _python(plan: Plan, task: Row) -> str:
    return plan.peer_python if task["runtime"] == "llama" else sys.executable


def _run_quietly(plan: Plan, task: Row) -> Row:
    """The first measurement that nothing disturbed, or the least disturbed one."""
    rows: list[Row] = []
    for _ in range(ATTEMPTS):
        rows.append(_run(task, _python(plan, task), plan.timeout_s))
        if rows[-1].get("cores_of_others", 0) <= plan.quiet:
            break
    best = min(rows, key=lambda row: row.get("cores_of_others", math.inf))
    return best | {"attempts": len(rows)}


def _run(task: Row, python: str, timeout_s: float) -> Row:
    files = edge_models.weight_files(Path(task["path"]))
    task = task | {"file_mb": round(sum(p.stat().st_size for p in files) / 1e6, 1)}
    try:
        done = subprocess.run(
            [python, "-I", edge_one.__file__, json.dumps(task)],
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return task | {"failed": f"no result after {timeout_s:.0f} s"}
    if done.returncode:
        return task | {"failed": edge_models.reason(done.returncode, done.stderr)}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    # Where files lay is this machine's business.
    return {name: value for name, value in row.items() if name not in ("path", "state")}
