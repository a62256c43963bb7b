"""One table, one figure and the extrapolated training times from a scaling study."""

import json
from pathlib import Path
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.launch.device_scaling.run import RESULTS

# What arXiv 2406.02528, section 4.3 reports on 8 H100: preset, tokens, hours.
PAPER_RUNS = (("370M", 15e9, 5.0), ("1.3B", 100e9, 84.0), ("2.7B", 100e9, 173.0))

Record = dict[str, Any]


def read_results(folder: Path) -> list[Record]:
    """The records of a study; of a case measured twice, the last that succeeded.

    Raises:
      ConfigError: the folder holds none.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise ConfigError(f"report is {str(folder)!r}: it holds no {RESULTS}")
    latest: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        before = latest.get(record["name"])
        if before is None or "error" not in record or "error" in before:
            latest[record["name"]] = record
    return list(latest.values())


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
    """The study as a Markdown table, failures below it."""
    done = sorted((r for r in records if "error" not in r), key=_order)
    lines = [
        "| model | scaling | GPUs | layout | batch | tokens/s a GPU | vs 1 GPU | ms a step "
        "| model TFLOP/s a GPU | peak GiB a GPU |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for record in done:
        case, share = record["case"], efficiency(record, done)
        peak = record.get("peak_gib")
        layout = case["layout"] + ("" if case["overlap"] else ", XLA's own flags")
        lines.append(
            f"| {case['preset']} | {case['mode']} | {case['devices']} | {layout} "
            f"| {case['batch_size']} x {case['seq_len']} | {rate_per_device(record):,.0f} "
            f"| {'' if share is None else f'{share:.1%}'} | {record['step_ms']:.1f} "
            f"| {record['model_tflops'] / record['devices']:.0f} "
            f"| {'' if peak is None else f'{peak:.1f}'} |"
        )
    traced = [r for r in done if r.get("exchange", {}).get("ms_a_step")]
    if traced:
        lines += [
            "",
            "| trace of | GPUs | layout | collectives, ms a step | beside other kernels |",
            "|---|---:|---|---:|---:|",
        ]
        for record in traced:
            case, moved = record["case"], record["exchange"]
            lines.append(
                f"| {case['preset']} | {case['devices']} | {case['layout']} "
                f"| {moved['ms_a_step']:.1f} "
                f"| {moved['hidden_ms_a_step'] / moved['ms_a_step']:.0%} |"
            )
    saves = [r for r in done if "checkpoint" in r]
    if saves:
        lines += [
            "",
            "| checkpoint of | GPUs | GiB | training waits (s) | save (s) | verify, restore (s) |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for record in saves:
            c = record["checkpoint"]
            lines.append(
                f"| {record['case']['preset']} | {record['case']['devices']} | {c['gib']:.1f} "
                f"| {c['save_blocked_s']:.1f} | {c['save_s']:.1f} | {c['restore_s']:.1f} |"
            )
    lines += [f"Not measured: {r['name']}: {r['error']}" for r in records if "error" in r]
    return "\n".join(lines) + "\n"


def training_times(records: list[Record]) -> str:
    """Hours of the paper's runs at the best rate measured on the most devices, beside theirs."""
    lines = [
        "| run | measured on | tokens/s | hours here | hours of the paper, 8 H100 |",
        "|---|---|---:|---:|---:|",
    ]
    for name, tokens, hours in PAPER_RUNS:
        mine = [r for r in records if "error" not in r and r["case"]["preset"] == name]
        if not mine:
            continue
        best = max(mine, key=lambda r: (r["devices"], r["tokens_per_s"]))
        lines.append(
            f"| {name}, {tokens / 1e9:.0f}B tokens | {best['devices']} x {best['device_kind']}, "
            f"{best['case']['layout']} | {best['tokens_per_s']:,.0f} "
            f"| {tokens / best['tokens_per_s'] / 3600:.1f} | {hours:.0f} |"
        )
    return "\n".join(lines) + "\n"


def figure(records: list[Record], path: Path) -> None:
    """Tokens a second on each device against the number of devices, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = sorted((r for r in records if "error" not in r and r["case"]["overlap"]), key=_order)
    names = list(dict.fromkeys(r["case"]["preset"] for r in done))
    fig, axes = plt.subplots(1, max(1, len(names)), figsize=(3.2 * max(1, len(names)), 3.2))
    panels = [axes] if len(names) <= 1 else list(axes)
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
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)
