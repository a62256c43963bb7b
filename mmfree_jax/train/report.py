"""What a run leaves behind: summary.json, the loss curve, the sample, and where they are."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax

from mmfree_jax.config import tokens_per_step
from mmfree_jax.files import write_text
from mmfree_jax.installed import versions
from mmfree_jax.json_shape import fault
from mmfree_jax.readable import format_count
from mmfree_jax.saved.manifest import DamagedCheckpointError, checkpoint_steps, verify
from mmfree_jax.saved.run_directory import (
    CHECKPOINTS,
    CONFIG,
    LOSS_CURVE,
    METRICS,
    SAMPLE,
    SUMMARY,
    TENSORBOARD,
)
from mmfree_jax.storage import Url
from mmfree_jax.text_files import read_json
from mmfree_jax.train.best import BestSteps
from mmfree_jax.train.flops import count_flops, count_parameters
from mmfree_jax.train.held_out import losses_by_source
from mmfree_jax.train.plot import plot_metrics
from mmfree_jax.train.recorder import Recorder
from mmfree_jax.train.run_display import scores_of
from mmfree_jax.train.setup import PACKAGES, Run
from mmfree_jax.train.stop import STOP_CODES

Summary = dict[str, Any]


def describe(run: Run) -> str:
    """One line on what is about to run."""
    config, devices = run.config, jax.devices()
    parameters = format_count(count_parameters(config.model).total)
    tokens = format_count(sum(d.num_tokens for d in run.data))
    planned = format_count(run.origin.tokens_at(config.steps, tokens_per_step(config)))
    stops = [
        *([f"at step {config.stop_at} (stop_at)"] if config.stop_at else []),
        *([f"after {config.max_minutes:g} minutes (max_minutes)"] if config.max_minutes else []),
    ]
    return (
        f"{config.model.family} model of {parameters} parameters on {len(devices)} x "
        f"{devices[0].device_kind}; {planned} tokens in {config.steps} steps, data {tokens} tokens"
        + (f"; stops {' or '.join(stops)}" if stops else "")
    )


def describe_layout(run: Run) -> str:
    """One line on how a step's rows lie on fewer processes than were planned."""
    step, mesh = run.step_config, run.mesh.shape
    each = step.batch_size // step.grad_accum
    padding = step.batch_size - run.config.batch_size
    return (
        f"fewer processes than planned ({jax.process_count()}): {run.config.batch_size} rows in "
        f"{step.grad_accum} micro-batches of {each} on {mesh['data']} x {mesh['fsdp']} devices"
        + (f", {padding} rows of padding among them" if padding else "")
    )


def finished_summary(run: Run) -> Summary | None:
    """The summary of a run that has nothing left to do, which is said; else None.

    A run whose last checkpoint is damaged has: where checkpoints are read it is set aside with a
    warning, and the run goes on from the one before.

    Raises:
      StorageError: the bucket refuses, or cannot be reached.
    """
    path = run.run_dir / SUMMARY
    try:
        summary = read_json(path)
    except (OSError, ValueError):
        return None
    steps = checkpoint_steps(run.place / CHECKPOINTS)
    if fault(summary, {}):
        return None
    done = summary.get("status") == "complete" and summary.get("step") == run.config.steps
    if not done or not steps or steps[-1] != run.config.steps:
        return None
    try:
        verify(run.place / CHECKPOINTS / str(steps[-1]))
    except DamagedCheckpointError:
        return None
    if jax.process_index() == 0:
        print(
            f"run_dir {run.place} already holds this run, complete at step {run.config.steps}: "
            f"see {run.place / SUMMARY}, or give another --run-dir; to train on, for more "
            f"steps or under other settings: --branch-from {run.place} --run-dir NEW --steps N"
        )
    return summary


def write_report(
    run: Run,
    recorder: Recorder,
    done: int,
    stopped_by: str | None,
    compile_seconds: float,
    best: BestSteps | None = None,
) -> Summary:
    """Writes summary.json, sample.txt and loss_curve.png, and says where everything is."""
    config, run_dir = run.config, run.run_dir
    goodput = recorder.goodput_record(done)
    flops = count_flops(config.model, config.data.seq_len)
    parameters = count_parameters(config.model)
    devices = jax.devices()
    last_train, last_eval = recorder.last.get("train", {}), recorder.last.get("eval", {})
    origin = run.origin
    tokens = origin.tokens_at(done, tokens_per_step(config))
    summary: Summary = {
        "status": "stopped" if stopped_by else "complete",
        "stopped_by": stopped_by,
        "step": done,
        "tokens": tokens,
        "train_loss": last_train.get("loss"),
        "eval_loss": last_eval.get("loss"),
        "eval_bits_per_byte": last_eval.get("bits_per_byte"),
        "eval_accuracy": last_eval.get("accuracy"),
        "eval_loss_by_source": dict(losses_by_source(last_eval)),
        "tasks": scores_of(recorder.last.get("tasks", {})),
        "best": None if best is None else _best_checkpoint(run.place, best),
        "tokens_per_s": recorder.mean_rate,
        "mfu": recorder.utilisation(recorder.mean_rate),
        "seconds": recorder.seconds,
        "compile_s": compile_seconds,
        "programs": {"loaded": run.programs.loaded, "made": run.programs.made},
        "session_seconds": recorder.total_seconds,
        "goodput": goodput.to_record(),
        "family": config.model.family,
        "parameters": {
            **dataclasses.asdict(parameters),
            "total": parameters.total,
            "non_embedding": parameters.non_embedding,
        },
        "flops_per_token": {
            **dataclasses.asdict(flops),
            "forward": flops.forward,
            "training": flops.training,
        },
        "training_flops": origin.flops + flops.training * (tokens - origin.tokens),
        "origin": None if origin.parent is None else origin.to_json(),
        "data": run.data_identity,
        "mesh": dict(run.mesh.shape),
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "versions": versions(*PACKAGES),
        "run_dir": str(run.place),
    }
    if jax.process_index() != 0:
        return summary
    write_text(run_dir / SUMMARY, json.dumps(summary, indent=1) + "\n")
    if "sample" in recorder.last:
        write_text(run_dir / SAMPLE, recorder.last["sample"]["text"] + "\n")
    if stopped_by not in STOP_CODES:
        by_source = [f"loss/{name}" for name, loss in losses_by_source(last_eval) if _finite(loss)]
        plot_metrics([run_dir], run_dir / LOSS_CURVE, metrics=["loss", *by_source])
    lines = {
        "config": CONFIG,
        "metrics": METRICS,
        "TensorBoard": TENSORBOARD,
        "checkpoints": CHECKPOINTS,
        "loss curve": LOSS_CURVE,
        "sample": SAMPLE,
        "summary": SUMMARY,
    }
    state = f"stopped at step {done} by {stopped_by}" if stopped_by else f"complete at step {done}"
    recorder.message(str(goodput))
    recorder.message(f"{state}; in {run.place}:")
    for name, file in lines.items():
        if file == CHECKPOINTS or (run_dir / file).exists():
            recorder.message(f"  {name:<12} {run.place / file}")
    if (found := summary["best"]) is not None:
        value = f"{found['metric']} {found['value']:.6g}"
        recorder.message(f"  {'best':<12} {run.place / CHECKPOINTS / str(found['step'])} ({value})")
    return summary


def _best_checkpoint(run_dir: Path | Url, best: BestSteps) -> dict[str, Any] | None:
    """The step, the metric and its value; None: no checkpoint has any."""
    for step in best.among(checkpoint_steps(run_dir / CHECKPOINTS))[:1]:
        return {"step": step, "metric": best.metric.name, "value": best.value(step)}
    return None


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)
