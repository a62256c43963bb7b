"""Scores on lm-eval's tasks: a language model of ours as lm-eval sees it. No torch, no network.

Import this module only where lm-eval is installed (the extra `eval`).
"""

import contextlib
import importlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mmfree_jax.config_io import check_keys
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.encoding import encode_pair
from mmfree_jax.evaluate.forward import FloatForward, Forward
from mmfree_jax.evaluate.generation_options import generation_options, most_tokens
from mmfree_jax.evaluate.scoring import Query, Scorer
from mmfree_jax.evaluate.task_errors import check_is_file, task_errors
from mmfree_jax.evaluate.tasks import write_task_files
from mmfree_jax.files import write_text
from mmfree_jax.infer.text import Tokenizer, generate_text
from mmfree_jax.installed import import_optional, install_command
from mmfree_jax.model import LanguageModel
from mmfree_jax.progress import show_progress
from mmfree_jax.storage import Url


class HarnessModel(TemplateLM):
    """A model and its tokenizer behind lm-eval's interface.

    Encoding follows lm-eval's own Hugging Face model: a context's trailing spaces go to the
    continuation, both are encoded as one text, and what is too long is cut from the left. Where
    that model would lose text or fail, see `encode_pair` and `loglikelihood`.

    Attributes:
      scorer: does the work; its counters say what was computed.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        mesh: Mesh | None = None,
        max_length: int = 2048,
        add_bos: bool = False,
        batch_tokens: int | None = None,
        share_contexts: bool = True,
        show_progress: bool = True,
        forward: Forward | None = None,
        end_ids: Sequence[int] = (),
        on_batch: Callable[[], None] = lambda: None,
    ) -> None:
        """Wraps a model.

        Args:
          model: the model.
          params: its parameters, as `load_pretrained` gives them.
          tokenizer: of the model.
          mesh: where `params` lie; None: the default device.
          max_length: longest sequence (tokens).
          add_bos: put the start-of-text token before every context.
          batch_tokens: tokens in one batch; None: by the device's memory.
          share_contexts: read a context that several choices share once (MLGRU).
          show_progress: show how far the work is, on standard error.
          forward: how the model computes; None: as it was trained.
          end_ids: tokens that end a generated text, beside the tokenizer's.
          on_batch: called behind each batch; what it raises ends the scoring.

        Raises:
          ConfigError: add_bos with a tokenizer that has no such token.
        """
        super().__init__()
        if add_bos and tokenizer.bos_id is None:
            raise ConfigError(
                "add_bos is set, but the tokenizer has no start-of-text token: leave out --add-bos"
            )
        self._end_ids = [i for i in end_ids if i < model.config.vocab_size]
        self._tokenizer, self._add_bos, self._show = tokenizer, add_bos, show_progress
        self._on_batch = on_batch
        self.scorer = Scorer(
            model,
            params,
            mesh=mesh,
            batch_tokens=batch_tokens,
            share_contexts=share_contexts,
            max_length=max_length,
            forward=forward,
        )

    @property
    def max_length(self) -> int:
        """Longest sequence (tokens)."""
        return self.scorer.max_length

    @property
    def eot_token_id(self) -> int:
        """End of a text."""
        return self.prefix_token_id if self._tokenizer.eos_id is None else self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        for token in (self._tokenizer.bos_id, self._tokenizer.eos_id):
            if token is not None:
                return token
        return list(self._tokenizer.encode("\n"))[-1]

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-eval's caches."""
        return str(getattr(self._tokenizer, "sha256", type(self._tokenizer).__name__))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, behind the start-of-text token if that was asked for."""
        del kwargs
        add_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        ids = list(self._tokenizer.encode(string)) if string else []
        bos = self._tokenizer.bos_id
        return [bos, *ids] if add_bos and bos is not None else ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation behind its context, and whether it leads.

        A continuation longer than max_length is scored in windows. One without tokens cannot
        be scored: it gets -inf, so that it is never chosen, and a warning.
        """
        encoded = []
        pairs: list[Any] = [request.args for request in requests]
        for context, continuation in pairs:
            start, rest = encode_pair(self._tokenizer, context, continuation)
            if self._add_bos:
                start = [self.prefix_token_id, *start]
            encoded.append(((context, continuation), start or [self.prefix_token_id], rest))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        queries, owners = [], []
        for i, (_, context, continuation) in enumerate(requests):
            for query in self._queries(context, continuation):
                queries.append(query)
                owners.append(i)
        with self._shown(len(queries), "scoring", disable_tqdm) as advance:
            scores = self.scorer.score(queries, progress=advance)
        results = [(0.0, True) if rest else (-math.inf, False) for _, _, rest in requests]
        for owner, score in zip(owners, scores, strict=True):
            total, greedy = results[owner]
            results[owner] = (total + score.log_likelihood, greedy and score.greedy)
        empty = [texts for texts, _, rest in requests if not rest]
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(requests)} answers have no tokens and count as never "
                f"chosen (the first: {empty[0][1]!r} behind {empty[0][0][-40:]!r}): give them text",
                stacklevel=2,
            )
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def _queries(self, context: list[int], continuation: list[int]) -> Iterable[Query]:
        """What scores each token of a continuation once, at most max_length tokens before it."""
        most = self.max_length
        for start in range(0, len(continuation), most):
            piece = continuation[start : start + most]
            # The last token is predicted, not read.
            yield Query([*context, *continuation[:start], *piece][-(most + 1) :], len(piece))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability (nats) of each whole text, in windows of max_length tokens."""
        queries, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, windows):
                queries.append(Query([*context, *continuation], len(continuation)))
                owners.append(i)
        totals = [0.0] * len(requests)
        with self._shown(len(queries), "scoring", disable_tqdm) as advance:
            scores = self.scorer.score(queries, progress=advance)
        for owner, score in zip(owners, scores, strict=True):
            totals[owner] += score.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context until one of its stop strings."""
        if not isinstance(self.scorer.forward, FloatForward):
            raise ConfigError(
                "a task asks for generated text, which other numerics than the trained ones do "
                "not write: give --tasks that score given answers, or --numerics float"
            )
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        arguments: list[Any] = [request.args for request in requests]
        for i, (_, options) in enumerate(arguments):
            key = json.dumps(options, sort_keys=True, default=str)
            by_settings.setdefault(key, []).append(i)
        with self._shown(len(requests), "generating", disable_tqdm) as advance:
            for rows in by_settings.values():
                options = dict(arguments[rows[0]][1])
                prompts = {i: self._prompt(arguments[i][0], options) for i in rows}
                rows = sorted(rows, key=lambda i: -len(prompts[i]))
                size = self.scorer.batch_size(self.scorer.padded_length(len(prompts[rows[0]])))
                for start in range(0, len(rows), size):
                    batch = rows[start : start + size]
                    for i, text in zip(
                        batch, self._continue({i: prompts[i] for i in batch}, options), strict=True
                    ):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", arguments[i], text)
                    advance(len(batch))
        return answers

    def _prompt(self, text: str, options: dict[str, Any]) -> list[int]:
        room = self.max_length - most_tokens(options)
        ids = self.tok_encode(text) or [self.prefix_token_id]
        return ids[-max(1, room) :]

    def _continue(self, prompts: dict[int, list[int]], options: dict[str, Any]) -> list[str]:
        """Answers to prompts, by their place among all requests, which chooses what is drawn."""
        output = generate_text(
            self.scorer.model,
            self.scorer.variables,
            self._tokenizer,
            list(prompts.values()),
            streams=[(i, 0) for i in prompts],
            stop_ids=self._end_ids,
            **generation_options(options),
        )
        return output.texts

    @contextlib.contextmanager
    def _shown(self, total: int, what: str, disable: bool) -> Iterator[Callable[[int], None]]:
        """Shows how far the work is; what it gives is called with the number done since."""
        hidden = disable or not self._show or jax.process_index() != 0
        with show_progress(what, is_shown=not hidden) as show:
            add = show.counting(total, lambda done: f"{done:,} of {total:,}")

            def advance(count: int) -> None:
                add(count)
                self._on_batch()

            yield advance


def run_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    tasks_dir: Path | None = None,
    num_fewshot: int | None = 0,
    limit: int | None = None,
    seed: int = 0,
    bootstrap_iters: int = 100_000,
    log_samples: bool = False,
) -> dict[str, Any]:
    """Runs lm-eval's tasks and returns its results, in its own format.

    Args:
      model: the model.
      tasks: names that lm-eval or `tasks_dir` knows.
      tasks_dir: folder with `<task>.jsonl` data of the paper's tasks, and lm-eval YAML files.
      num_fewshot: examples before each question; None: as each task defines.
      limit: first documents of each task only; None: all.
      seed: of the choice of examples and of the bootstrap.
      bootstrap_iters: resamples for standard errors that have no closed form.
      log_samples: keep every document's scores (key "samples").

    Raises:
      DataError: a task is unknown, or its data cannot be read.
      ConfigError: a YAML file in `tasks_dir` is not YAML, or a key occurs twice in it.
    """
    with (
        task_manager(tasks, tasks_dir) as manager,
        task_errors(tasks_dir),
    ):
        evaluator = importlib.import_module("lm_eval.evaluator")
        results = evaluator.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            log_samples=log_samples,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=None,
            fewshot_random_seed=seed,
        )
    assert results is not None
    return results


@contextlib.contextmanager
def task_manager(tasks: Sequence[str], tasks_dir: Path | None) -> Iterator[Any]:
    """lm-eval's manager of tasks that knows all of `tasks`; its files are there while inside.

    Raises: as `run_tasks`.
    """
    for file in sorted(tasks_dir.rglob("*")) if tasks_dir is not None else ():
        if file.suffix == ".yaml":
            check_keys(file)
        else:
            check_is_file(file)
    with tempfile.TemporaryDirectory(prefix="mmfree-eval-") as scratch:
        local = [] if tasks_dir is None else write_task_files(tasks, tasks_dir, Path(scratch))
        if set(local) == set(tasks):
            # Read when the libraries are first imported: nothing may look for a network.
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
            os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        datasets = import_optional("datasets", "mmfree eval --tasks", install_command("eval"))
        datasets.disable_progress_bars()
        manager_class = importlib.import_module("lm_eval.tasks").TaskManager
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        include = [scratch] if tasks_dir is None else [str(tasks_dir), scratch]
        with task_errors(tasks_dir):
            manager = manager_class(include_path=include, include_defaults=False)
            own = manager.all_tasks
            if not set(tasks) <= set(own):
                # Reading lm-eval's thousands of definitions takes a while.
                manager = manager_class(include_path=include)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown:
            raise DataError(
                f"tasks holds {', '.join(unknown)}, which lm-eval does not know: see "
                "`lm-eval ls tasks`, or give their YAML files with --tasks-dir"
                + (f" ({tasks_dir} has {', '.join(sorted(own)) or 'none'})" if tasks_dir else "")
            )
        yield manager


def write_results(results: dict[str, Any], folder: Path | Url) -> Path | Url:
    """Writes lm-eval results as it does itself: `results_<date>.json`, and samples a task.

    Returns:
      The file with the aggregated results.
    """
    from lm_eval.utils import handle_non_serializable

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)

    date = datetime.now().isoformat().replace(":", "-")
    file = folder / f"results_{date}.json"
    aggregated = {k: v for k, v in results.items() if k != "samples"}
    write_text(file, dump(aggregated, 2) + "\n")
    for name, samples in results.get("samples", {}).items():
        lines = "".join(dump(sample) + "\n" for sample in samples)
        write_text(folder / f"samples_{name}_{date}.jsonl", lines)
    return file
