"""Memory and latency of inference by model size: every measurement in a process of its own."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.presets import preset

FORMS = ("packed", "matmulfree-bf16", "transformer-bf16")
RECORDS = "infer.json"
TABLE = "infer.md"
FIGURE = "infer.png"
_LABELS = {
    "packed": "MatMul-free, packed 2 bits",
    "matmulfree-bf16": "MatMul-free, bf16",
    "transformer-bf16": "Transformer++, bf16",
}
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure; see `mmfree bench infer --help`."""

    sizes: tuple[str, ...]
    forms: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    batch_forms: tuple[str, ...]
    steps: int
    repeats: int
    prefill: int
    prefill_sizes: tuple[str, ...]
    energy_s: float
    energy_size: str
    energy_batch_sizes: tuple[int, ...]
    agreement: str
    timeout_s: float


def check(plan: Plan) -> None:
    """Refuses a plan that cannot run.

    Raises:
      ConfigError: an unknown size or form, or a number that is too small.
    """
    for name in {*plan.sizes, *plan.prefill_sizes, plan.energy_size}:
        preset(name)
    for form in (*plan.forms, *plan.batch_forms):
        if form not in FORMS:
            raise ConfigError(f"--forms has {form!r}: choose from {', '.join(FORMS)}")
    for name in ("steps", "repeats"):
        if getattr(plan, name) < 1:
            raise ConfigError(f"--{name} is {getattr(plan, name)}: set 1 or more")
    for size in (*plan.batch_sizes, *plan.energy_batch_sizes):
        if size < 1:
            raise ConfigError(f"--batch-sizes has {size}: set 1 or more")


def tasks(plan: Plan) -> list[Row]:
    """The measurements of a plan, in the order in which they run."""
    out: list[Row] = []
    if plan.energy_s > 0:
        for batch in plan.energy_batch_sizes:
            task = _decode(plan, plan.energy_size, "packed", batch)
            out.append(task | {"energy_s": plan.energy_s})
    timed = [(task["size"], task["form"], task["batch"]) for task in out]
    for form in plan.forms:
        for size in plan.sizes:
            for batch in plan.batch_sizes:
                wanted = batch == 1 or form in plan.batch_forms
                if wanted and (size, form, batch) not in timed:
                    out.append(_decode(plan, size, form, batch))
        for size in (plan.prefill_sizes or plan.sizes) if plan.prefill else ():
            out.append(
                {"work": "prefill", "size": size, "form": form, "batch": 1,
                 "tokens": plan.prefill, "repeats": plan.repeats}
            )  # fmt: skip
        if form == "packed" and plan.agreement:
            out.append({"work": "agreement", "size": plan.agreement, "batch": 1, "tokens": 64})
    return out


def _decode(plan: Plan, size: str, form: str, batch: int) -> Row:
    return {
        "work": "decode", "size": size, "form": form, "batch": batch, "steps": plan.steps,
        "repeats": plan.repeats,
    }  # fmt: skip


def measure(plan: Plan, out: Path, command: str, say: Callable[[str], None]) -> list[Row]:
    """Runs a plan and writes records, table and figure to a folder, anew after each row.

    A measurement that does not fit or fails becomes a row with the reason.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    todo = tasks(plan)
    process = _start()
    for number, task in enumerate(todo):
        current, process = process, _start() if number + 1 < len(todo) else None
        assert current is not None
        row = _run(current, task, plan.timeout_s)
        rows.append(row)
        say(describe(row))
        (out / RECORDS).write_text(
            json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
        report(rows, out)  # a run that is cut short leaves what it measured
    return rows


def join(folders: Sequence[Path], out: Path) -> list[Row]:
    """Puts the rows of earlier runs into one record, table and figure.

    Raises:
      ConfigError: a folder without a readable record.
    """
    commands: list[str] = []
    rows: list[Row] = []
    for folder in folders:
        try:
            record = json.loads((folder / RECORDS).read_text(encoding="utf-8"))
            commands += record["commands"] if "commands" in record else [record["command"]]
            rows += record["rows"]
        except (OSError, ValueError, KeyError) as e:
            raise ConfigError(
                f"--join has {folder}, which has no readable {RECORDS} ({e}): give folders that "
                "`mmfree bench infer --out` made"
            ) from e
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"commands": commands, "rows": rows}, indent=1) + "\n"
    (out / RECORDS).write_text(text, encoding="utf-8")
    report(rows, out)
    return rows


def _start() -> subprocess.Popen[str]:
    """A process that does its imports, which need no device, and waits for a task."""
    return subprocess.Popen(
        [sys.executable, "-m", "mmfree_jax.experiments.bench.infer_one"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _run(process: subprocess.Popen[str], task: Row, timeout_s: float) -> Row:
    try:
        stdout, stderr = process.communicate(json.dumps(task) + "\n", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return task | {"failed": f"no result after {timeout_s:.0f} s"}
    if process.returncode == 0:
        return json.loads(stdout.strip().splitlines()[-1])
    return task | {"failed": _reason(process.returncode, stderr)}


def _reason(code: int, stderr: str) -> str:
    if any(text in stderr for text in _OUT_OF_MEMORY):
        return "does not fit in the device's memory"
    lines = [line for line in stderr.splitlines() if line.strip()] or ["no message"]
    return f"exit code {code}: {lines[-1][:300]}"


def describe(row: Row) -> str:
    """One line for a row."""
    name = f"{row['work']} {row['size']} {row.get('form', '')} batch {row['batch']}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    if row["work"] == "agreement":
        programs = {k: v for k, v in row.items() if isinstance(v, dict) and "kl_nats" in v}
        return f"{name}: " + "; ".join(
            f"{k} KL {v['kl_nats']:.1e}, top-1 {v['same_top_1']:.1%}" for k, v in programs.items()
        )
    time = row["ms_per_token"] if row["work"] == "decode" else row["ms"]
    text = f"{name}: {time['median']:.3f} ms ({time['min']:.3f} to {time['max']:.3f})"
    if row["work"] == "decode":
        text += f" a token, {row['tokens_per_s']:,.0f} tokens/s"
    if "peak_gb" in row:
        text += f", weights {row['weights_gb']:.2f} GB, peak {row['peak_gb']:.2f} GB"
    if isinstance(row.get("energy"), dict):
        text += f", {row['energy']['mj_per_token']:.1f} mJ a token"
    return text


def report(rows: Sequence[Row], out: Path) -> None:
    """Writes the table and the figure of rows."""
    (out / TABLE).write_text(table(rows), encoding="utf-8")
    draw(rows, out / FIGURE)


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    lines = [
        "| work | size | form | batch | ms (min to max) | tokens/s | weights, GB | peak, GB | mJ a token |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["work"] == "agreement":
            continue
        work = row["work"] if row["work"] == "decode" else f"prefill {row['tokens']}"
        cells = [work, row["size"], _LABELS[row["form"]], str(row["batch"])]
        if "failed" in row:
            cells += [row["failed"], "", "", "", ""]
        else:
            time = row.get("ms_per_token") or row["ms"]
            energy = row.get("energy")
            cells += [
                f"{time['median']:.3f} ({time['min']:.3f} to {time['max']:.3f})",
                f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "",
                f"{row['weights_gb']:.2f}",
                f"{row['peak_gb']:.2f}" if "peak_gb" in row else "",
                f"{energy['mj_per_token']:.1f}" if isinstance(energy, dict) else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Memory and latency by model size, after the paper's figure: one row at a time, batch 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = [r for r in rows if r["work"] == "decode" and r["batch"] == 1 and "failed" not in r]
    sizes = sorted({r["size"] for r in decode}, key=_parameters)
    forms = [form for form in FORMS if any(r["form"] == form for r in decode)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        ("Peak memory (GB)", lambda r: r.get("peak_gb", r["weights_gb"])),
        ("Latency (ms a token)", lambda r: r["ms_per_token"]["median"]),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        for number, form in enumerate(forms):
            found = {r["size"]: value(r) for r in decode if r["form"] == form}
            places = [sizes.index(s) + 0.27 * (number - (len(forms) - 1) / 2) for s in found]
            bars = axis.bar(places, list(found.values()), width=0.25, label=_LABELS[form])
            axis.bar_label(bars, fmt="%.2g", fontsize=7)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_xlabel("Model")
        axis.set_ylabel(label)
    if decode:
        axes[0].legend(fontsize=8)
    device = decode[0]["device"] if decode else ""
    figure.suptitle(f"Greedy decoding, batch 1, {device}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _parameters(size: str) -> float:
    model = preset(size).model
    return model.num_layers * model.hidden_size**2
