"""What `mmfree eval` has found out about a model, read from the records that it left."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.json_shape import fault
from mmfree_jax.saved.open_model import SavedModel
from mmfree_jax.storage import Url, is_url
from mmfree_jax.text_files import read_json

HELD_OUT = "held_out.json"
_METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity")
_TASKS = {"results": dict, "config": {"model_args": {"model": str}}}
_LOSS = {
    "model": str,
    "data": str,
    "loss": {
        "mean": (int, float),
        "documents": int,
        "bits_per_byte": {"mean": (int, float, NoneType)},
    },
}


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task, as lm-eval gives it.

    Attributes:
      task: its name.
      metric: for example "acc".
      value: a share for accuracies.
      error: standard error; None: it has none.
      shots: examples before each question.
      limit: first documents of the task that were scored alone; None: all.
    """

    task: str
    metric: str
    value: float
    error: float | None
    shots: int
    limit: float | None


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss on held-out documents of a data set: nats a token, and bits a byte of text, if any."""

    data: str
    documents: int
    nats: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Evaluations:
    """Of one model; the newest record of each task."""

    tasks: tuple[TaskScore, ...] = ()
    held_out: HeldOutLoss | None = None


def read_evaluations(saved: SavedModel, output: str | os.PathLike[str] | None) -> Evaluations:
    """Scores of a model, of float arithmetic; those older than its weights are passed over.

    Args:
      saved: the model.
      output: folder of `mmfree eval --output`; None: its default, which need not be there.

    Raises:
      ConfigError: `output` was given and has no scores of this model.
    """
    folder = Path("eval" if output is None else output) / saved.path.resolve().name
    made = _weights_time(saved)
    files = sorted(folder.glob("results_*.json")) if folder.is_dir() else []
    records = {file: _record(file, made) for file in [*files, folder / HELD_OUT]}
    tasks: dict[tuple[str, str, int], TaskScore] = {}
    for file in files:
        for score in _scores(records[file], saved.place):
            tasks[score.task, score.metric, score.shots] = score
    found = Evaluations(tuple(tasks.values()), _held_out(records[folder / HELD_OUT], saved.place))
    if output is not None and found == Evaluations():
        raise ConfigError(
            f"--scores is {output}: {folder} has no scores of {saved.place} that are newer than "
            "its weights; run `mmfree eval` again, or leave the flag out"
        )
    return found


def _weights_time(saved: SavedModel) -> float:
    checkpoint = saved.checkpoint()
    folder = saved.path if checkpoint is None else checkpoint
    pattern = "*.safetensors" if checkpoint is None else "manifest.json"
    return max((file.stat().st_mtime for file in folder.glob(pattern)), default=0.0)


def _record(file: Path, made: float) -> Any:
    """What a record holds; None: it is absent, unreadable or older than the weights."""
    try:
        return read_json(file) if file.stat().st_mtime >= made else None
    except (OSError, ValueError):
        return None


def _is_of(model: str, place: Path | Url) -> bool:
    if isinstance(place, Url) or is_url(model):
        return model == str(place)
    return Path(model).resolve() == place.resolve()


def _scores(record: Any, place: Path | Url) -> list[TaskScore]:
    if fault(record, _TASKS):
        return []
    config = record["config"]
    arguments = config["model_args"]
    if "numerics" in arguments or not _is_of(arguments["model"], place):
        return []
    shots = record.get("n-shot", {})
    found = []
    for task, values in record["results"].items():
        for metric in _METRICS:
            value = values.get(f"{metric},none") if isinstance(values, dict) else None
            if not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,none")
            error = float(error) if isinstance(error, (int, float)) else None
            of_task = shots.get(task) if isinstance(shots, dict) else None
            limit = config.get("limit")
            found.append(TaskScore(task, metric, float(value), error, of_task or 0, limit))
    return found


def _held_out(record: Any, place: Path | Url) -> HeldOutLoss | None:
    if fault(record, _LOSS) or not _is_of(record["model"], place):
        return None
    loss = record["loss"]
    bits = loss["bits_per_byte"]["mean"]
    return HeldOutLoss(Path(record["data"]).name, loss["documents"], loss["mean"], bits)
