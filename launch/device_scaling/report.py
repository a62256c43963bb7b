"""One table, one figure and the extrapolated training times from a scaling study."""

import math
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.bench.records import markdown
from mmfree_jax.files import open_atomically
from mmfree_jax.json_shape import fault
from mmfree_jax.launch.device_scaling.run import RESULTS
from mmfree_jax.text_files import parse_json, read_text

# What arXiv 2406.02528, section 4.3 reports on 8 H100: preset, tokens, hours.
PAPER_RUNS = (("370M", 15e9, 5.0), ("1.3B", 100e9, 84.0), ("2.7B", 100e9, 173.0))

Record = dict[str, Any]
_CASE = {
    "preset": str, "mode": str, "layout": str, "seq_len": int, "batch_size": int, "devices": int,
    "overlap": bool, "changes": list,
}  # fmt: skip
_MEASURED = ("devices", "tokens_per_s", "step_ms", "model_tflops")
_MAYBE = {
    "exchange": ("ms_a_step", "hidden_ms_a_step"),
    "checkpoint": ("gib", "save_blocked_s", "save_s", "restore_s"),
}


def read_results(folder: Path) -> list[Record]:
    """The records of a study; of a case measured twice, the last that succeeded.

    Raises:
      ConfigError: the folder holds none, or one is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ConfigError(f"report is {str(folder)!r}: it holds no {RESULTS}")
    latest: dict[str, Record] = {}
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read ({e}): restore it, or measure again") from e
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record: Any = parse_json(line)
        except ValueError:
            record = None
        if wrong := fault(record, {"name": str, "case": dict}):
            raise ConfigError(f"{path}, line {number} is damaged ({wrong}): remove that line")
        before = latest.get(record["name"])
        if before is None or "error" not in record or "error" in before:
            latest[record["name"]] = record
    return list(latest.values())


def check_records(records: list[Record]) -> None:
    """Checks the fields that the report reads of what was measured.

    Raises:
      ConfigError: one is missing, of another type, or no possible number.
    """
    numbers = (int, float)
    for record in [r for r in records if "error" not in r]:
        wanted = {"case": _CASE, "device_kind": str, **dict.fromkeys(_MEASURED, numbers)}
        wrong = fault(record, wanted)
        wrong = wrong or fault(record.get("parameters", 0), numbers, "parameters")
        wrong = wrong or fault(record.get("peak_gib"), (*numbers, type(None)), "peak_gib")
        for name, fields in _MAYBE.items():
            if not wrong and name in record:
                wrong = fault(record[name], dict.fromkeys(fields, numbers), name)
        for name in () if wrong else ("devices", "tokens_per_s"):
            if not 0 < record[name] < math.inf:
                wrong = f"{name} is {record[name]}"
        if wrong:
            raise ConfigError(
                f"record {record['name']!r} of {RESULTS} is damaged ({wrong}): remove its line"
            )


def rate_per_device(record: Record) -> float:
    """Tokens a second on each device."""
    return record["tokens_per_s"] / record["devices"]


def efficiency(record: Record, records: list[Record]) -> float | None:
    """Rate a device over that of one device with the same model; None without that run.

    For strong scaling too: the same work in 1/n of the time is the same rate a device.
    """
    case = record["case"]
    for other in records:
        alike = all(
            other["case"][name] == case[name] for name in ("preset", "mode", "seq_len", "changes")
        )
        if alike and other["case"]["devices"] == 1 and "error" not in other:
            return rate_per_device(record) / rate_per_device(other)
    return None


def _order(record: Record) -> tuple[Any, ...]:
    case = record["case"]
    size = record.get("parameters", 0)
    return (case["mode"], size, case["preset"], case["devices"], case["layout"], record["name"])


def table(records: list[Record]) -> str:
    """The study as Markdown tables, failures below them."""
    done = sorted((r for r in records if "error" not in r), key=_order)
    traced = [r for r in done if r.get("exchange", {}).get("ms_a_step")]
    parts = [
        markdown(
            ("model", "scaling", "GPUs", "layout", "batch", "tokens/s a GPU", "vs 1 GPU",
             "ms a step", "model TFLOP/s a GPU", "peak GiB a GPU"),
            [_cells(record, efficiency(record, done)) for record in done],
            words=2,
        )
    ]  # fmt: skip
    if traced:
        parts.append(markdown(
            ("trace of", "GPUs", "layout", "collectives, ms a step", "beside other kernels"),
            [_exchange(record) for record in traced],
            words=1,
        ))  # fmt: skip
    if saves := [r for r in done if "checkpoint" in r]:
        parts.append(markdown(
            ("checkpoint of", "GPUs", "GiB", "training waits (s)", "save (s)",
             "verify, restore (s)"),
            [_saving(record) for record in saves],
            words=1,
        ))  # fmt: skip
    failures = [f"Not measured: {r['name']}: {r['error']}" for r in records if "error" in r]
    return "\n\n".join(parts) + "\n" + "".join(f"{line}\n" for line in failures)


def _cells(record: Record, share: float | None) -> list[str]:
    case, peak = record["case"], record.get("peak_gib")
    return [
        case["preset"], case["mode"], str(case["devices"]),
        case["layout"] + ("" if case["overlap"] else ", XLA's own flags"),
        f"{case['batch_size']} x {case['seq_len']}", f"{rate_per_device(record):,.0f}",
        "" if share is None else f"{share:.1%}", f"{record['step_ms']:.1f}",
        f"{record['model_tflops'] / record['devices']:.0f}", "" if peak is None else f"{peak:.1f}",
    ]  # fmt: skip


def _exchange(record: Record) -> list[str]:
    case, moved = record["case"], record["exchange"]
    hidden = moved["hidden_ms_a_step"] / moved["ms_a_step"]
    return [case["preset"], str(case["devices"]), case["layout"], f"{moved['ms_a_step']:.1f}",
            f"{hidden:.0%}"]  # fmt: skip


def _saving(record: Record) -> list[str]:
    case, saving = record["case"], record["checkpoint"]
    # Older records have only the call that saves, not what the steps beside it lost.
    stall = saving.get("save_stall_s", saving["save_blocked_s"])
    numbers = (saving["gib"], stall, saving["save_s"], saving["restore_s"])
    return [case["preset"], str(case["devices"]), *(f"{number:.1f}" for number in numbers)]


def training_times(records: list[Record]) -> str:
    """Hours of the paper's runs at the best rate measured on the most devices, beside theirs."""
    rows = []
    for name, tokens, hours in PAPER_RUNS:
        mine = [r for r in records if "error" not in r and r["case"]["preset"] == name]
        if mine:
            best = max(mine, key=lambda r: (r["devices"], r["tokens_per_s"]))
            rows.append([
                f"{name}, {tokens / 1e9:.0f}B tokens",
                f"{best['devices']} x {best['device_kind']}, {best['case']['layout']}",
                f"{best['tokens_per_s']:,.0f}", f"{tokens / best['tokens_per_s'] / 3600:.1f}",
                f"{hours:.0f}",
            ])  # fmt: skip
    header = ("run", "measured on", "tokens/s", "hours here", "hours of the paper, 8 H100")
    return markdown(header, rows, words=2) + "\n"


def figure(records: list[Record], path: Path) -> None:
    """Tokens a second on each device against the number of devices, one panel a model."""
    from matplotlib.figure import Figure

    done = sorted((r for r in records if "error" not in r and r["case"]["overlap"]), key=_order)
    names = list(dict.fromkeys(r["case"]["preset"] for r in done))
    count = max(1, len(names))
    fig = Figure(figsize=(3.2 * count, 3.2), layout="tight")
    panels = fig.subplots(1, count, squeeze=False)[0]
    for axis, name in zip(panels, names, strict=False):
        of_model = [r for r in done if r["case"]["preset"] == name]
        single = [r for r in of_model if r["case"]["devices"] == 1]
        kinds = dict.fromkeys((r["case"]["mode"], r["case"]["layout"]) for r in of_model)
        for mode, layout in kinds:
            if layout == "one" and len(kinds) > 1:
                continue
            line = [
                r for r in of_model if (r["case"]["mode"], r["case"]["layout"]) == (mode, layout)
            ]
            line = [r for r in single if r["case"]["mode"] == mode and r not in line] + line
            axis.plot(
                [r["devices"] for r in line],
                [rate_per_device(r) / 1e3 for r in line],
                marker="o",
                linestyle="-" if mode == "weak" else "--",
                label=f"{layout}, {mode}",
            )
        ticks = sorted({r["devices"] for r in of_model})
        axis.set(title=name, xlabel="GPUs", xscale="log", ylim=(0, None))
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    panels[0].set_ylabel("1000 tokens/s a GPU")
    with open_atomically(path) as file:
        fig.savefig(file, dpi=150)
