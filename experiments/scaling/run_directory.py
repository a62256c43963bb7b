"""Read a training run's own directory: config.yaml, metrics.jsonl and summary.json.

Written by the trainer, possibly still being written, possibly cut off: the last line may be
torn, a resumed run repeats steps, and summary.json is absent until the run ends.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config_io import read_yaml
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame, make_frame
from mmfree_jax.saved.history import read_history
from mmfree_jax.text_files import read_json

METRICS, CONFIG, SUMMARY = READ = "metrics.jsonl", "config.yaml", "summary.json"


def is_run_directory(path: Path) -> bool:
    """Whether a directory holds a run: metrics.jsonl is there."""
    return (path / METRICS).is_file()


def _look(tree: Any, path: str) -> Any:
    """What a dotted path leads to, else None."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else np.nan


def curve(path: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and losses of a run's `train` or `eval` records, each step once, in order."""
    latest: dict[float, float] = {}
    for record in read_history(path / METRICS):
        tokens, loss = record.get("tokens"), record.get("loss")
        if record.get("kind") == kind and isinstance(tokens, (int, float)) and loss is not None:
            # After a restart the same steps come again: the later record counts.
            latest = {t: v for t, v in latest.items() if t < tokens}
            latest[float(tokens)] = _number(loss)
    return np.array(list(latest)), np.array(list(latest.values()))


def read_run_directory(path: Path, *, points: str = "last", tail: int = 20) -> RunFrame:
    """One row (`points="last"`) or one row an evaluation (`"all"`) of a run directory.

    The loss is the evaluation loss. A run without evaluations gives the mean training loss of
    its last `tail` records, with a note.

    Raises:
        ScalingError: there is no loss, or summary.json with the parameter counts is missing.
            The message names the file and the missing key.
    """
    if points not in ("last", "all"):
        raise ScalingError(f"points: {points!r} is unknown; choose last or all")
    tokens, loss = curve(path, "eval")
    notes = []
    if not len(tokens):
        train_tokens, train_loss = curve(path, "train")
        if not len(train_tokens):
            raise ScalingError(f"{path / METRICS}: holds no 'eval' or 'train' record with 'tokens' "
                               "and 'loss'; has the run started?")  # fmt: skip
        tokens, loss = train_tokens[-1:], np.array([train_loss[-tail:].mean()])
        notes.append(f"{path.name}: no evaluation; mean training loss of the last "
                     f"{min(tail, len(train_loss))} records stands in")  # fmt: skip
    summary: dict = {}
    if (path / SUMMARY).is_file():
        try:
            summary = read_json(path / SUMMARY)
        except (OSError, ValueError) as error:
            raise ScalingError(f"{path / SUMMARY}: is not readable JSON ({error})") from None
        if not isinstance(summary, dict):
            raise ScalingError(f"{path / SUMMARY}: is damaged (it is not a mapping)")
    params = _number(_look(summary, "parameters.total"))
    if not np.isfinite(params):
        what = "lacks 'parameters.total'" if summary else "is missing"
        raise ScalingError(f"{path / SUMMARY}: {what}; a run writes it when it ends, so let it "
                           "finish or leave this directory out")  # fmt: skip
    if summary.get("status") not in (None, "complete"):
        notes.append(f"{path.name}: the run is {summary['status']} at step {summary.get('step')}")
    # Nothing that a fit needs is in the config.
    config = read_yaml(path / CONFIG) if (path / CONFIG).is_file() else {}
    if points == "last":
        tokens, loss = tokens[-1:], loss[-1:]
    per_token = _number(_look(summary, "flops_per_token.training"))
    return make_frame(
        loss=loss,
        tokens=tokens,
        params=params,
        params_non_embedding=_number(_look(summary, "parameters.non_embedding")),
        params_ternary=_number(_look(summary, "parameters.ternary")),
        flops=per_token * tokens,
        family=str(summary.get("family", "")),
        seed=str(_look(config, "seed") or 0),
        run=path.name,
        provenance=str(path),
        notes=notes,
    )
