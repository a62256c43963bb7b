"""Accuracy on lm-eval's tasks in one call, where lm-eval may be absent."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mmfree_jax.evaluate.encoding import default_length
from mmfree_jax.evaluate.tasks import check_installed
from mmfree_jax.infer.text import Tokenizer
from mmfree_jax.model import LanguageModel


def evaluate_tasks(
    model: LanguageModel,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    tasks_dir: str | os.PathLike[str] | None = None,
    num_fewshot: int | None = 0,
    limit: int | None = None,
    add_bos: bool = False,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    mesh: Mesh | None = None,
    seed: int = 0,
    log_samples: bool = False,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Scores a model on tasks of lm-eval, as `mmfree eval --tasks` does.

    Args:
      model: the model.
      params: its parameters, as `load_pretrained` gives them.
      tokenizer: of the model.
      tasks: names that lm-eval or `tasks_dir` knows.
      tasks_dir: folder with `<task>.jsonl` data of the paper's tasks (`mmfree eval fetch-tasks`),
        and lm-eval YAML files of your own; tasks that are all in it need no network.
      num_fewshot: examples before each question; None: as each task defines.
      limit: first documents of each task only; None: all.
      add_bos: put the start-of-text token before every context.
      max_length: longest sequence (tokens); None: 2048. With attention give the length of the rows
        that it was trained on.
      batch_tokens: tokens in one batch, padding included; None: by the device's memory.
      mesh: where `params` lie; None: the default device.
      seed: of the choice of examples and of the bootstrap.
      log_samples: keep every document's scores (key "samples").
      show_progress: show how far the work is, on standard error.

    Returns:
      What lm-eval's `simple_evaluate` returns; `["results"][task]["acc,none"]` is an accuracy,
      `"acc_stderr,none"` its standard error.

    Raises:
      ConfigError: lm-eval is not installed (the extra `eval`); a setting or a YAML file does not
        fit.
      DataError: a task is unknown, or its data cannot be read.
    """
    check_installed("evaluate_tasks")
    from mmfree_jax.evaluate import harness

    adapter = harness.HarnessModel(
        model,
        params,
        tokenizer,
        mesh=mesh,
        max_length=default_length(model.config, None) if max_length is None else max_length,
        add_bos=add_bos,
        batch_tokens=batch_tokens,
        show_progress=show_progress,
    )
    return harness.run_tasks(
        adapter,
        tasks,
        tasks_dir=None if tasks_dir is None else Path(tasks_dir),
        num_fewshot=num_fewshot,
        limit=limit,
        seed=seed,
        log_samples=log_samples,
    )
