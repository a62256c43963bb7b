"""Memory and latency of inference by model size: every measurement in a process of its own."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmfree_jax.children import Children
from mmfree_jax.cli.parse import Counts, Folders, Names
from mmfree_jax.experiments.bench.records import (
    STOP_S,
    Row,
    Say,
    Study,
    draw_bars,
    finish,
    markdown,
    one_of,
    say,
    spread,
    start,
)
from mmfree_jax.figures import set_ticks
from mmfree_jax.files import open_atomically
from mmfree_jax.presets import preset
from mmfree_jax.ranges import AboveZero, Count, CountOrZero

FORMS = {
    "packed": "MatMul-free, packed 2 bits",
    "matmulfree-bf16": "MatMul-free, bf16",
    "transformer-bf16": "Transformer++, bf16",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Time decoding and prefill with random weights, each measurement in its own process."""

    out: Path
    """Folder that receives infer.json, infer.md (a table) and infer.png."""
    sizes: Names = ("370M", "1.3B", "2.7B", "7B", "13B")
    """Presets to measure, separated by commas."""
    forms: Names = tuple(FORMS)
    """packed: ternary weights at 2 bits; the others compute with dense bfloat16 weights."""
    batch_sizes: Counts = (1,)
    """Rows decoded at once, separated by commas."""
    batch_forms: Names = ("packed",)
    """Forms decoded with more than one row, separated by commas."""
    steps: Count = 64
    """Tokens of one timed loop."""
    repeats: Count = 5
    """Timed loops; the median counts."""
    prefill: CountOrZero = 0
    """Also time reading a prompt of this many tokens; 0: do not."""
    prefill_sizes: Names = ()
    """Presets for the prompt, separated by commas; empty: those of --sizes."""
    energy: bool = False
    """Also read NVML's energy counter while decoding with --energy-size."""
    energy_seconds: AboveZero = 20.0
    """Shortest time over which the energy is read (seconds)."""
    energy_size: str = "370M"
    """Preset whose energy is read."""
    energy_batch_sizes: Counts = (1, 64)
    """Rows decoded at once while the energy is read, separated by commas."""
    agreement: str = ""
    """Preset for which packed and unpacked logits are compared; empty: none."""
    timeout: AboveZero = 600.0
    """Longest time for one measurement (seconds)."""
    join: Folders = ()
    """Folders of earlier runs, separated by commas: put their rows together in --out and measure
    nothing."""


def check(plan: Plan) -> None:
    """Refuses a plan that cannot run.

    Raises:
      ConfigError: an unknown size or form.
    """
    for name in {*plan.sizes, *plan.prefill_sizes, plan.energy_size}:
        preset(name)
    one_of(plan, FORMS, "forms", "batch_forms")


def tasks(plan: Plan) -> list[Row]:
    """The measurements of a plan, in the order in which they run."""
    out: list[Row] = []
    if plan.energy:
        for batch in plan.energy_batch_sizes:
            task = _decode(plan, plan.energy_size, "packed", batch)
            out.append(task | {"energy_s": plan.energy_seconds})
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


def measure(plan: Plan, command: str, say: Say = say) -> list[Row]:
    """Runs a plan, or joins earlier ones, and keeps it in its folder.

    Raises:
      ConfigError: the plan cannot run, or a folder to join has no record.
    """
    if plan.join:
        return STUDY.join([Path(name) for name in plan.join], plan.out)
    check(plan)
    return STUDY.collect({"command": command}, _rows(plan), plan.out, say)


def _rows(plan: Plan) -> Iterator[Row]:
    """Each process does its imports, which need no device, during the measurement before."""
    todo = tasks(plan)
    command = [sys.executable, "-m", "mmfree_jax.experiments.bench.infer_process"]
    following = None
    with Children(STOP_S) as children:
        for number, task in enumerate(todo, 1):
            process = following or start(children, command)
            following = start(children, command) if number < len(todo) else None
            yield finish(process, task, plan.timeout)


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


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    header = ("work", "size", "form", "batch", "ms (min to max)", "tokens/s", "weights, GB",
              "peak, GB", "mJ a token")  # fmt: skip
    return markdown(header, [_cells(row) for row in rows if row["work"] != "agreement"]) + "\n"


def _cells(row: Row) -> list[str]:
    work = row["work"] if row["work"] == "decode" else f"prefill {row['tokens']}"
    cells = [work, row["size"], FORMS[row["form"]], str(row["batch"])]
    if "failed" in row:
        return [*cells, row["failed"]]
    energy = row.get("energy")
    return [
        *cells,
        spread(row.get("ms_per_token") or row["ms"], ".3f"),
        f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else "",
        f"{row['weights_gb']:.2f}",
        f"{row['peak_gb']:.2f}" if "peak_gb" in row else "",
        f"{energy['mj_per_token']:.1f}" if isinstance(energy, dict) else "",
    ]


def draw(record: Row, path: Path) -> None:
    """Memory and latency by model size, after the paper's figure: one row at a time, batch 1."""
    from matplotlib.figure import Figure

    rows = record["rows"]
    decode = [r for r in rows if r["work"] == "decode" and r["batch"] == 1 and "failed" not in r]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("Peak memory (GB)", lambda r: r.get("peak_gb", r["weights_gb"])),
        ("Latency (ms a token)", lambda r: r["ms_per_token"]["median"]),
    )
    for axis, (label, value) in zip(axes, panels, strict=True):
        draw_bars(axis, decode, FORMS, value)
        axis.set(yscale="log", xlabel="Model", ylabel=label)
        set_ticks(axis.yaxis)
    if decode:
        axes[0].legend(fontsize=8)
    device = decode[0]["device"] if decode else ""
    figure.suptitle(f"Greedy decoding, batch 1, {device}", fontsize=10)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


STUDY = Study("infer", describe, table, draw)
