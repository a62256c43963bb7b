"""A folder as `measure_model` leaves it, of a small packed model, with losses written out."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from small_packed_model import BASE, build

from mmfree_jax.config import DataConfig, LogConfig, TrainConfig
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.experiments.study.documents import DocumentLosses, write_losses
from mmfree_jax.experiments.study.model_results import Measured
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.pack import pack
from mmfree_jax.saved.pretrained import save_pretrained

TOKENIZER = Path(__file__).parents[2] / "experiments/results/study2/tokenizer"
MODEL, TWIN = "small", "small-transformer"
CONFIG = dataclasses.replace(BASE, vocab_size=8192, hidden_size=16, intermediate_size=24)
PROVENANCE = {
    "command": "mmfree eval",
    "code": 0,
    "begun": "2026-11-28T10:00:00+00:00",
    "seconds": 12.5,
    "checkpoints": {MODEL: 40},
    "commit": "0123456789abcdef",
    "device": "a device",
    "versions": {"jax": "1"},
}
# nats a token, tokens and documents of each source: the model's, then the twin's.
LOSSES = {"law": (3.0, 3.5, 100, 2), "novels": (4.0, 3.0, 300, 3)}


def trained_model(root: Path) -> Path:
    """The folder of a model that can be packed, with the study's tokenizer."""
    model, params = build(CONFIG)
    save_pretrained(root / "trained", model, params, tokenizer=TOKENIZER)
    return root / "trained"


def measured_model(root: Path) -> Measured:
    """What publishing reads: every kind of step, none of which has run."""
    after = root / "after"
    pack(open_model(trained_model(root)), after / "packed", bits="1.6")
    for name in (MODEL, TWIN):
        _write_run(after / "runs" / name, name)
        for source, (ours, theirs, tokens, documents) in LOSSES.items():
            table = _held_out(ours if name == MODEL else theirs, tokens, documents)
            _write(after / "held-out" / name / source / name / "held_out.json", table)
    sums = np.array([[150, 150, 400, 400, 400], [175, 175, 300, 300, 300]], float)
    documents = DocumentLosses(
        (MODEL, TWIN), tuple("abcde"), ("law",) * 2 + ("novels",) * 3,
        np.array([50, 50, 100, 100, 100]), sums,
    )  # fmt: skip
    write_losses(after / "documents.npz", documents)
    share = {"share": 0.5, "low": 0.3, "high": 0.7, "right": 10, "asked": 20, "rows": 20}
    cell = {"length": 256, "depth": None, "chosen": share, "written": share | {"share": 0.0}}
    _write(after / "needle" / MODEL / MODEL / "needle.json", {"cells": [cell]})
    task = {"acc,none": 0.25, "acc_stderr,none": 0.01}
    results = {"results": {"piqa": task}, "n-samples": {"piqa": {"effective": 50}}}
    _write(after / "tasks" / MODEL / MODEL / "results_x.json", results)
    streams = {"kept": 1, "agreed_tokens": [200, 7]}
    form = {
        "tokens": 30, "prompts": 2, "new_tokens": 200, "kl_nats": 1e-6, "same_top_1": 0.9997,
        "perplexity": 80.0, "perplexity_of_float32": 80.5, "largest_difference": 0.1,
        "streams_of_float32": streams, "streams_of_trained": streams,
    }  # fmt: skip
    _write(after / "agreement" / "onnx-exact.json", form)
    sample = {"prompt": "It was", "text": " so", "seed": 2, "index": 1}
    (after / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    done = ["pack", "documents", "samples", f"needle {MODEL}", f"tasks {MODEL}"]
    done += [f"held-out {name} {source}" for name in (MODEL, TWIN) for source in LOSSES]
    record = dict.fromkeys((*done, "agreement onnx-exact"), PROVENANCE)
    record = {n: s | ({"checkpoints": {TWIN: 40}} if TWIN in n else {}) for n, s in record.items()}
    _write(after / "steps.json", record | {f"tasks {TWIN}": PROVENANCE | {"code": 1}})
    return Measured(after, MODEL, TWIN)


def _write(file: Path, values: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def _held_out(mean: float, tokens: int, documents: int) -> dict[str, Any]:
    loss = {"mean": mean, "low": mean - 0.3, "high": mean + 0.3, "tokens": tokens,
            "documents": documents}  # fmt: skip
    bits = {k: loss[k] / math.log(2) / 4 for k in ("mean", "low", "high")}
    return {
        "loss": loss | {"bits_per_byte": bits},
        "bytes_per_token": 4.0,
        "by_position": [{"from": 0, "to": 16} | loss, {"from": 16, "to": None} | loss],
    }


def _write_run(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    config = TrainConfig(
        run_dir=f"runs/{name}", model=CONFIG, data=DataConfig(paths=("data/law", "data/novels")),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip
    (folder / "config.yaml").write_text(dump_yaml(config))
    summary = {
        "step": 50, "tokens": 6400, "training_flops": 1e9, "seconds": 9.0,
        "best": {"step": 40, "value": 3.75}, "parameters": {"ternary": 4321, "total": 9876},
        "device": {"kind": "a card", "count": 1}, "versions": {"jax": "1", "flax": "2"},
        "data": {"paths": ["data/law", "data/novels"], "tokens": [1000, 2200]},
    }  # fmt: skip
    _write(folder / "summary.json", summary)
    (folder / "metrics.jsonl").write_text('{"kind": "goodput", "unix_time": 1795803797.7}\n')
