"""Scores on lm-eval's tasks while a model is trained; the harness is that of `mmfree eval`.

Nothing of lm-eval is imported where no task is asked for.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfree_jax.config import TrainConfig
from mmfree_jax.data.tokenizer import Tokenizer
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from mmfree_jax.evaluate.task_scores import TaskScores

GO_ON, OUT_OF_TIME = 0, 1
"""What `score_tasks` is told behind each batch; more: OUT_OF_TIME and a wish to stop."""


@dataclass(frozen=True)
class TaskResults:
    """Scores of the tasks that were done, and how the scoring ended.

    Attributes:
      numbers: by name, "piqa/acc" and "piqa/acc_stderr".
      left_out: tasks that were not done.
      ended_by: GO_ON for none, or what ended it.
    """

    numbers: dict[str, float]
    left_out: tuple[str, ...]
    ended_by: int


def open_tasks(config: TrainConfig, tokenizer: Tokenizer | None) -> "TaskScores | None":
    """The tasks that a run is to score, with their data; None: none.

    Raises:
      ConfigError: lm-eval is not installed, a setting does not fit, or a task is named twice.
      DataError: a task is unknown or its data cannot be read.
    """
    options = config.eval
    if not options.tasks:
        return None
    os.environ["TQDM_DISABLE"] = "1"  # lm-eval's own bars; read when tqdm is imported
    from mmfree_jax.evaluate.tasks import check_installed, default_tasks_dir
    from mmfree_jax.infer.text import check_tokenizer

    if twice := {name for name in options.tasks if options.tasks.count(name) > 1}:
        raise ConfigError(f"eval.tasks names {', '.join(sorted(twice))} twice: leave one out")
    check_installed("eval.tasks")
    folder = default_tasks_dir() if options.tasks_dir is None else Path(options.tasks_dir)
    if options.tasks_dir is not None and not folder.is_dir():
        raise ConfigError(
            f"eval.tasks_dir is {options.tasks_dir!r}, no folder: run `mmfree eval fetch-tasks "
            "--tasks-dir` with it, or give the folder of your YAML files"
        )
    from mmfree_jax.evaluate.task_scores import TaskScores

    assert tokenizer is not None
    check_tokenizer(config.model, tokenizer)
    return TaskScores(options.tasks, folder if folder.is_dir() else None, limit=options.tasks_limit)


def score_tasks(
    tasks: "TaskScores",
    params: dict[str, Any],
    config: TrainConfig,
    tokenizer: Tokenizer,
    mesh: "Mesh",
    ask: Callable[[], int],
) -> TaskResults:
    """Scores the tasks one after another; all processes of the mesh call it alike.

    Args:
      tasks: of `open_tasks`.
      params: master weights on the mesh.
      config: of the run.
      tokenizer: of the run's data.
      mesh: of the run.
      ask: called behind each batch on all processes; another answer than GO_ON ends the scoring.
    """
    from mmfree_jax.evaluate.encoding import default_length
    from mmfree_jax.evaluate.harness import HarnessModel
    from mmfree_jax.evaluate.task_scores import OutOfTimeError

    answer = GO_ON

    def on_batch() -> None:
        nonlocal answer
        answer = ask()
        if answer != GO_ON:
            raise OutOfTimeError

    model = HarnessModel(
        LanguageModel(config.model),
        params,
        tokenizer,
        mesh=mesh,
        max_length=default_length(config.model, config.data.seq_len),
        show_progress=False,
        on_batch=on_batch,
    )
    numbers: dict[str, float] = {}
    for i, name in enumerate(tasks.names):
        try:
            numbers |= tasks.score(model, name)
        except OutOfTimeError:
            return TaskResults(numbers, tuple(tasks.names[i:]), answer)
    return TaskResults(numbers, (), GO_ON)


def left_out(names: Sequence[str], minutes: float) -> str:
    """Says which tasks were not done in time, and what to do."""
    return (
        f"tasks left out after {minutes:g} minutes: {', '.join(names)}; raise --eval.tasks-minutes "
        "or lower --eval.tasks-limit"
    )
