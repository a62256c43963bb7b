"""One case of the paper's tables in its own process: `python -m ...bench.paper_process`.

The task is a line of JSON on stdin, the result one on stdout: `infer_process` with one more kind
of work, a training step.
"""

import dataclasses
import json
import sys
from typing import Any

import jax

from mmfree_jax.config import MeshConfig, TrainConfig, replace_model
from mmfree_jax.experiments.bench import infer_process
from mmfree_jax.experiments.bench.train import compile_train_step, measure_train_step
from mmfree_jax.presets import preset
from mmfree_jax.train.memory import estimate_memory


def train_config(task: dict[str, Any]) -> TrainConfig:
    """The run of a task's form: "fused" or "plain" BitLinear, or "transformer".

    Plain keeps for the backward pass what autodiff asks for, as the paper's does.
    """
    name = task["size"] + ("-transformer" if task["form"] == "transformer" else "")
    config = preset(name)
    if task["form"] == "plain":
        config = replace_model(config, bitlinear="plain", backward="bf16", remat="none")
    data = dataclasses.replace(config.data, seq_len=task["tokens"])
    return dataclasses.replace(config, batch_size=task["batch"], data=data)


def for_memory(config: TrainConfig, capacity: float) -> TrainConfig:
    """A Transformer++ run that makes again as little as the memory allows, its layers unrolled.

    Args:
      config: of the run, on one device.
      capacity: of the device (bytes); a tenth of it is left free.
    """
    for remat in ("none", "projections", "stream"):
        found = replace_model(config, remat=remat, scan_layers=False)
        if estimate_memory(found, MeshConfig(data=1)).total < 0.9 * capacity:
            return found
    return replace_model(config, remat="full", scan_layers=True)


def measure_training(task: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a training step on one device, and the most memory that it held."""
    config = train_config(task)
    stats = jax.local_devices()[0].memory_stats() or {}
    if task["form"] == "transformer" and "bytes_limit" in stats:
        config = for_memory(config, stats["bytes_limit"])
    compiled = compile_train_step(config, jax.local_devices()[:1])
    found = measure_train_step(
        config, groups=task["repeats"], steps_per_group=task["steps"], compiled=compiled
    )
    row = {
        "ms": {
            "median": round(found.step_ms, 3),
            "spread": round(found.spread_ms, 3),
        },
        "tokens_per_s": round(found.tokens_per_s, 1),
        "tflops": round(found.model_tflops, 1),
        "compile_s": round(found.compile_s, 1),
        "remat": config.model.remat,
    }
    if found.peak_gib is not None:
        row["peak_gb"] = round(found.peak_gib * 2**30 / 1e9, 4)
    return row


if __name__ == "__main__":
    works = infer_process.WORKS | {"train": measure_training}
    print(json.dumps(infer_process.run_task(json.loads(sys.stdin.readline()), works)), flush=True)
