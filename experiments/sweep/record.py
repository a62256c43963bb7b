"""What is kept of a run that ended: its row of the table, or why it failed."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, config_hash, data_name
from mmfree_jax.experiments.sweep.process import Outcome, host_name, read_summary
from mmfree_jax.experiments.sweep.state import data_fingerprint, settings_hash
from mmfree_jax.experiments.sweep.table import Row
from mmfree_jax.files import write_text


def trained_on(summary: dict[str, Any]) -> str | None:
    """The data that a run was trained on, as `data_fingerprint`; None: its summary does not say."""
    data = summary.get("data")
    return None if data is None else data_name(data["fingerprints"])


def finished_summary(run: PlannedRun, run_dir: Path, config: TrainConfig) -> dict[str, Any] | None:
    """The summary of a run that is complete, or has paused, under the same settings; else None.

    Nor is that of a run on other data, which were prepared anew in the folder since: the trainer
    says so.
    """
    summary, status = read_summary(run_dir), "complete" if config.stop_at is None else "stopped"
    if summary is None or summary.get("status") != status:
        return None
    if summary.get("step") != (config.stop_at or config.steps):
        return None
    try:
        there = read_yaml(run_dir / "config.yaml")
        same = config_hash(from_dict(TrainConfig, there)) == config_hash(config)
    except MMFreeError:  # the trainer says what is wrong with it
        return None
    data = trained_on(summary)
    same &= data is None or data_fingerprint(run) in (None, data)
    return summary if same else None


def make_row(
    run: PlannedRun, summary: dict[str, Any], wall: float | None, sharing: int, code: str,
) -> Row:  # fmt: skip
    """A run's row of the table, from its summary.json.

    Args:
      run: the run.
      summary: as the trainer wrote it.
      wall: time of the process that finished it (seconds); None if that is not known.
      sharing: how many runs shared the device.
      code: version of the code that ran.
    """
    parameters, device = summary["parameters"], summary["device"]
    origin = summary.get("origin")

    def number(value: Any) -> str:
        return "" if value is None else f"{value:.10g}"

    return {
        "run": run.name,
        "family": run.family,
        "size": run.size,
        "params": str(parameters["total"]),
        "params_non_embedding": str(parameters["non_embedding"]),
        "params_ternary": str(parameters["ternary"]),
        "tokens": str(summary["tokens"]),
        "steps": str(summary["step"]),
        "flops": number(summary["training_flops"]),
        "budget": number(run.budget),
        "learning_rate": number(run.learning_rate),
        "seed": str(run.seed),
        "loss": number(summary["eval_loss"]),
        "bits_per_byte": number(summary.get("eval_bits_per_byte")),
        "train_loss": number(summary.get("train_loss")),
        "tokens_per_s": number(summary.get("tokens_per_s")),
        "mfu": number(summary.get("mfu")),
        "train_s": number(summary.get("seconds")),
        "wall_s": number(wall),
        "parallel": str(sharing),
        "device": device["kind"],
        "device_count": str(device["count"]),
        "host": host_name(),
        "code": code,
        "jax": str(summary["versions"].get("jax")),
        "config_hash": config_hash(run.config),
        "data_fingerprint": trained_on(summary) or data_fingerprint(run) or "",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "batch_size": str(run.config.batch_size),
        "b2": number(run.config.optimizer.b2),
        "weight_decay": number(run.config.optimizer.weight_decay),
        "warmup_steps": str(run.config.optimizer.warmup_steps),
        "trunk": (run.trunk or "") if origin else "",
        "trunk_tokens": str(origin["tokens"]) if origin else "",
    }


def write_failure(out: Path, run: PlannedRun, result: Outcome, code: int) -> None:
    """Keeps why a run failed."""
    record = {
        "run": run.name,
        "kind": result.kind,
        "reason": result.reason,
        "code": code,
        "config_hash": settings_hash(run),
        "host": host_name(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "log": f"logs/{run.name}.log",
    }
    write_text(out / "failures" / f"{run.name}.json", json.dumps(record, indent=1) + "\n")
