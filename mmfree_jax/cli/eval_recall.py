"""`mmfree eval mqar` and `mmfree eval needle`."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.cli.parse import Counts, Shares
from mmfree_jax.cli.scored_model import ResultFiles, ScoredModel, open_scored, results_folder
from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.installed import own_version, versions
from mmfree_jax.places import PlaceOrUrl, locate
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Count, NotNegative, Seed, Step, TwoOrMore
from mmfree_jax.text_files import read_text


@dataclass(frozen=True)
class _Scoring:
    """What is scored, and what is said and written of it."""

    task: str
    of: ScoredModel
    files: ResultFiles
    is_writer: bool
    progress: bool

    def _asked(self) -> dict[str, Any]:
        checkpoint = self.of.saved.checkpoint()
        return {
            "task": self.task,
            "model": str(self.of.saved.place),
            "step": None if checkpoint is None else int(checkpoint.name),
            "compute_dtype": self.of.model.config.compute_dtype,
        }

    def show(self, table: Any) -> None:
        """Prints a table, once."""
        from rich.console import Console

        if self.is_writer:
            Console(width=None if sys.stdout.isatty() else 120).print(table)

    def write(
        self, settings: dict[str, Any], scores: Sequence[Any], png: bytes | None = None
    ) -> None:
        """Writes the record, a figure beside it, and says where."""
        import jax

        if not self.is_writer:
            return
        found = {
            "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
            "versions": {"mmfree-jax": own_version(), **versions("jax", "jaxlib", "numpy")},
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "cells": [x.to_dict() for x in scores],
        }
        print("\n".join(self.files.write(self._asked() | settings, found, png)))


def _open(
    task: str,
    place: str,
    step: Any,
    compute_dtype: str | None,
    mesh: MeshConfig,
    output: str,
    progress: bool,
) -> _Scoring:
    results_in = results_folder(output)
    with show_progress("starting JAX", is_shown=progress):
        import jax

    scored = open_scored(
        place, results_in, step=step, compute_dtype=compute_dtype, mesh=mesh, progress=progress
    )
    is_writer = jax.process_index() == 0
    files = ResultFiles(scored.folder, task, has_figure=task == "needle")
    files.check("task")
    return _Scoring(task, scored, files, is_writer, progress and is_writer)


def mqar(
    model: PlaceOrUrl,
    step: Step | None = None,
    pairs: Counts = (4, 8, 16, 32, 64),
    lengths: Counts = (),
    vocab: TwoOrMore | None = None,
    power: NotNegative = 0.01,
    rows: Count = 256,
    batch_tokens: Count | None = None,
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    output: PlaceOrUrl = "eval",
    progress: bool = True,
) -> int:
    """Score a model on held-out rows of multi-query associative recall (train: --data.paths mqar:).

    Args:
      model: Run directory, model folder, packed model or Hugging Face folder, or its URL.
      step: Checkpoint of a training run: its step, or best; default: the newest.
      pairs: Numbers of pairs of a key and a value in a row, where they fit: 4 tokens a pair.
      lengths: Lengths of a row (tokens); default: that of the model's training rows, else 256.
      vocab: Tokens of the task; default: the model's.
      power: Of the gaps between pairs and questions: weight (1 + gap)^(power - 1).
      rows: Rows of each number of pairs and length, at most 4096.
      batch_tokens: Tokens in one batch; default: by the device's memory.
      compute_dtype: Dtype of activations; default: the model's own.
      mesh: How to arrange several devices.
      output: Folder, or its URL, that receives mqar.json, in one named after the model.
      progress: Show what is happening, on standard error.
    """
    opened = _open("mqar", model, step, compute_dtype, mesh, output, progress)
    from mmfree_jax.data.mqar import Mqar
    from mmfree_jax.evaluate.recall import evaluate_mqar
    from mmfree_jax.evaluate.report import mqar_table

    lengths = lengths or (opened.of.saved.trained_length or 256,)
    tokens = vocab or opened.of.model.config.vocab_size
    fitting = [n for n in pairs if n < tokens // 2]
    cells = [(n, length) for length in lengths for n in fitting if 4 * n <= length]
    if not cells:
        raise ConfigError(
            f"--pairs is {','.join(map(str, pairs))}, --lengths {','.join(map(str, lengths))}: a "
            f"row takes 4 tokens a pair, and a vocab of {tokens} has {tokens // 2 - 1} keys; give "
            "fewer pairs, or longer rows"
        )
    tasks = [(Mqar(n, tokens, power), length) for n, length in cells]
    scores = []
    with show_progress("asking", is_shown=opened.progress) as show:
        advance = show.counting(rows * len(tasks), lambda done: f"{done:,} rows")
        for task, length in tasks:
            scores.append(
                evaluate_mqar(
                    opened.of.model, opened.of.params, task, length, rows,
                    mesh=opened.of.mesh, batch_tokens=batch_tokens, progress=advance,
                )
            )  # fmt: skip
    opened.show(mqar_table(scores))
    settings = {"vocab": tokens, "power": power, "rows": rows, "asked": cells}
    opened.write(settings, scores)
    return 0


def needle(
    model: PlaceOrUrl,
    step: Step | None = None,
    text: Path | None = None,
    data: PlaceOrUrl | None = None,
    lengths: Counts = (256, 512, 1024),
    depths: Shares = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: Count = 20,
    candidates: TwoOrMore = 10,
    fact: str = "The secret number of {name} is {answer}.",
    add_bos: bool = False,
    seed: Seed = 0,
    batch_tokens: Count | None = None,
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    output: PlaceOrUrl = "eval",
    plot: bool = True,
    progress: bool = True,
) -> int:
    """Put a fact at several depths of your text and ask a model for it at the end.

    Args:
      model: Run directory, model folder, packed model or Hugging Face folder, or its URL.
      step: Checkpoint of a training run: its step, or best; default: the newest.
      text: Text file that the model was not trained on.
      data: Prepared data set, or its URL: the text of its held-out documents, in place of --text.
      lengths: Most tokens before the answer.
      depths: Shares of the text before the fact.
      trials: Questions at each depth of each length, with texts, names and answers of their own.
      candidates: Answers whose likelihoods are compared, the right one among them.
      fact: A sentence with {answer}, which is a number, and {name} before it or not.
      add_bos: Put the start-of-text token before each text.
      seed: Of texts, names and answers.
      batch_tokens: Tokens in one batch; default: by the device's memory.
      compute_dtype: Dtype of activations; default: the model's own.
      mesh: How to arrange several devices.
      output: Folder, or its URL, that receives needle.json and needle.png, in one named after the
        model.
      plot: Draw needle.png.
      progress: Show what is happening, on standard error.
    """
    if (text is None) == (data is None):
        raise ConfigError("give either --text (a file) or --data (a prepared data set)")
    if not lengths or not depths:
        raise ConfigError("give --lengths and --depths one number each, or more")
    opened = _open("needle", model, step, compute_dtype, mesh, output, progress)
    from mmfree_jax.evaluate.needle import evaluate_needle
    from mmfree_jax.evaluate.report import needle_table
    from mmfree_jax.evaluate.scoring import Scorer

    tokenizer = opened.of.tokenizer()
    if add_bos and tokenizer.bos_id is None:
        raise ConfigError("the tokenizer has no start-of-text token: leave out --add-bos")
    if text is not None:
        source, haystack = str(text), _read(text)
    else:
        assert data is not None
        source = str(locate(data, "data"))
        haystack = _held_out_text(data, 16 * max(lengths) * trials)
    scorer = Scorer(
        opened.of.model, opened.of.params,
        mesh=opened.of.mesh, batch_tokens=batch_tokens, max_length=max(lengths),
    )  # fmt: skip
    total = len(lengths) * (len(depths) + 1) * trials * candidates
    with show_progress("asking", is_shown=opened.progress) as show:
        advance = show.counting(total, lambda done: f"{done:,} of {total:,}")
        scores = evaluate_needle(
            lambda queries: scorer.score(queries, progress=advance),
            tokenizer,
            haystack,
            lengths=lengths,
            depths=depths,
            trials=trials,
            candidates=candidates,
            fact=fact,
            first=[tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else [],
            seed=seed,
        )
    opened.show(needle_table(scores, candidates))
    png = None
    if plot and opened.is_writer:
        from mmfree_jax.evaluate.recall_figure import needle_png

        png = needle_png(scores, candidates)
    settings = {
        "text": source,
        "text_sha256": hashlib.sha256(haystack.encode()).hexdigest(),
        "fact": fact, "trials": trials, "candidates": candidates, "add_bos": add_bos, "seed": seed,
        "lengths": lengths, "depths": depths,
    }  # fmt: skip
    opened.write(settings, scores, png)
    return 0


def _read(file: Path) -> str:
    try:
        return read_text(file)
    except OSError as e:
        raise DataError(f"--text {file}: {e.strerror}; give a readable text file") from e
    except UnicodeDecodeError as e:
        raise DataError(f"--text {file} is no text in UTF-8 ({e}): convert it") from e


def _held_out_text(data: str, most: int) -> str:
    """The text of held-out documents, from the first on, of at least `most` characters or all."""
    from mmfree_jax.data.dataset import HELDOUT, open_dataset
    from mmfree_jax.data.tokenizer import load_tokenizer, tokenizer_folder

    dataset = open_dataset(data, HELDOUT)
    folder = tokenizer_folder(dataset.path)
    tokenizer = load_tokenizer(data if folder is None else folder)
    texts: list[str] = []
    characters = 0
    for number in range(dataset.num_documents):
        ids = [int(i) for i in dataset.document(number)]
        ends = (tokenizer.bos_id, tokenizer.eos_id)
        texts.append(tokenizer.decode([i for i in ids if i not in ends]))
        characters += len(texts[-1])
        if characters >= most:
            break
    return "\n\n".join(texts)
