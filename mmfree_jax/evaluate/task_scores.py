"""Tasks that are scored again and again, as while a model is trained.

Import this module only where lm-eval is installed (the extra `eval`).
"""

import contextlib
import hashlib
import importlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.evaluate.harness import HarnessModel, task_manager
from mmfree_jax.evaluate.task_errors import task_errors

_RESAMPLES = 100  # for standard errors that have no closed form; those of accuracies have one


class OutOfTimeError(Exception):
    """Raised behind a batch to end the scoring."""


class TaskScores:
    """Tasks with their data, read once.

    Attributes:
      names: of the tasks; a group of lm-eval's is its tasks.
      fingerprints: a digest of the documents of each that are scored (hex).
    """

    def __init__(self, tasks: Sequence[str], tasks_dir: Path | None, limit: int | None) -> None:
        """Reads definitions and data.

        Args:
          tasks: names that lm-eval or `tasks_dir` knows.
          tasks_dir: as in `run_tasks`.
          limit: first documents of each task only; None: all.

        Raises: as `run_tasks`.
        """
        self._tasks_dir, self._limit = tasks_dir, limit
        self._held = contextlib.ExitStack()
        self._manager = self._held.enter_context(task_manager(tasks, tasks_dir))
        with task_errors(tasks_dir):
            self._tasks: dict[str, Any] = self._manager.load(list(tasks))["tasks"]
            for task in self._tasks.values():
                task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=0)
            self.fingerprints = {n: _digest(t.eval_docs, limit) for n, t in self._tasks.items()}
        self.names = list(self._tasks)

    @property
    def numbers(self) -> dict[str, bool | None]:
        """Names of what is measured, "piqa/acc", and whether the lowest is best; None: not said."""
        found: dict[str, bool | None] = {}
        for name, task in self._tasks.items():
            higher = task.higher_is_better()
            filters = [f.name for f in getattr(task, "_filters", ())] or ["none"]
            for metric in task.aggregation():
                lowest = not higher[metric] if isinstance(higher.get(metric), bool) else None
                found |= {_number(name, metric, each): lowest for each in filters}
        return found

    def score(self, model: HarnessModel, name: str) -> dict[str, float]:
        """What a model scores in one task, by the names of `numbers`, and standard errors.

        Raises:
          OutOfTimeError: `on_batch` of the model has raised it.
          DataError: lm-eval makes nothing of a document.
        """
        evaluator = importlib.import_module("lm_eval.evaluator")
        with task_errors(self._tasks_dir):
            # Not `simple_evaluate`, which seeds generators that are not ours and asks git.
            results = evaluator.evaluate(
                lm=model,
                task_dict=self._manager.load([self._tasks[name]]),
                limit=self._limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
            )
        found = {}
        for key, value in results["results"][name].items():
            metric, comma, filtered = key.partition(",")
            if comma and isinstance(value, int | float):
                found[_number(name, metric, filtered)] = float(value)
        return found

    def close(self) -> None:
        """Removes lm-eval's working copies."""
        self._held.close()


def _digest(documents: Iterable[Any], limit: int | None) -> str:
    found = hashlib.sha256()
    for document in itertools.islice(documents, limit):
        found.update(f"{document!r}\n".encode(errors="surrogatepass"))
    return found.hexdigest()


def _number(task: str, metric: str, filtered: str) -> str:
    return f"{task}/{metric}" + ("" if filtered == "none" else f",{filtered}")
