"""lm-eval's tasks while training: what `mmfree eval` scores, in time, and as a measure of best."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from choice_task import CHOICE_TASK

from mmfree_jax.config import CheckpointConfig, DataConfig, EvalConfig
from mmfree_jax.data import writer
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import ConfigError
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.train.plot import draw_metrics
from mmfree_jax.train.run_display import format_record
from mmfree_jax.train.training import train

pytest.importorskip("lm_eval")


@pytest.fixture
def config(small_run, tmp_path, no_network):
    """A run on bytes with a tokenizer, and two tasks of 3 questions, of which 2 are asked."""
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(0)
    identity = {"kind": "byte", "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    identity |= {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    documents = [rng.integers(97, 103, 30) for _ in range(20)]
    splits = {"train": documents, "heldout": documents[:6]}
    folder = tmp_path / "data"
    writer.write_dataset(folder, splits, identity, save_tokenizer=lambda path: tokenizer.save(path))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [
        {"q": "ab" * k, "options": ["cd", "zzz"][:: 1 - 2 * (k % 2)], "gold": k % 2}
        for k in (1, 2, 3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tasks / "rows.json").write_text(text)
    for name in ("letters", "more"):
        task = CHOICE_TASK.replace("NAME", name).replace("ROWS", str(tasks / "rows.json"))
        (tasks / f"{name}.yaml").write_text(task.replace("CACHE", str(tmp_path / "cache")))
    return dataclasses.replace(
        small_run,
        run_dir=str(tmp_path / "run"),
        steps=3,
        model=dataclasses.replace(small_run.model, vocab_size=264),
        data=DataConfig(paths=(str(folder),), seq_len=16),
        checkpoint=CheckpointConfig(keep_last=1, keep_best=1, best_metric="letters/acc"),
        eval=EvalConfig(
            every_steps=0,
            batches=0,
            sample_tokens=0,
            tasks=("letters", "more"),
            tasks_dir=str(tasks),
            tasks_every_steps=1,
            tasks_limit=2,
        ),
        log=dataclasses.replace(small_run.log, ternary_every_steps=0),
    )


def _records(config, kind):
    records = read_history(f"{config.run_dir}/metrics.jsonl")
    return [r for r in records if r["kind"] == kind]


@pytest.mark.usefixtures("traced_once", "cached_compilation")
def test_tasks_are_scored_while_training_as_eval_scores_them(config, capsys):
    from mmfree_jax.evaluate import harness

    summary = train(config)
    records = _records(config, "tasks")
    assert [r["step"] for r in records] == [1, 2, 3]
    names = {"letters/acc", "letters/acc_stderr", "more/acc", "more/acc_stderr"}
    assert summary["tasks"].keys() == names
    assert all(r["letters/acc"] == r["more/acc"] in (0.0, 0.5, 1.0) for r in records)
    found = f"letters/acc {records[-1]['letters/acc']:.4f}  more/acc"
    assert found in format_record(records[-1], 3)
    figure, _ = draw_metrics([Path(config.run_dir)], metrics=["letters/acc"])
    assert len(figure.axes[0].lines[0].get_xdata()) == 3

    # The first of equally good ones is kept: found by name, and the command scores it alike.
    best = max(records, key=lambda r: (r["letters/acc"], -r["step"]))
    assert summary["best"] == {
        "step": best["step"],
        "metric": "letters/acc",
        "value": best["letters/acc"],
    }
    assert checkpoint_steps(Path(config.run_dir) / "checkpoints") == sorted({best["step"], 3})
    saved = open_model(config.run_dir, step="best")
    model = harness.HarnessModel(
        saved.model(), saved.weights("master").params, ByteTokenizer(), show_progress=False
    )
    results = harness.run_tasks(
        model, ["letters"], tasks_dir=Path(config.eval.tasks_dir), limit=2, bootstrap_iters=0
    )
    assert results["results"]["letters"]["acc,none"] == best["letters/acc"]


@pytest.mark.usefixtures("traced_once", "cached_compilation")
def test_tasks_end_in_time_and_at_a_signal_and_are_made_up(config, monkeypatch):
    late = dataclasses.replace(
        config,
        stop_at=1,
        checkpoint=dataclasses.replace(config.checkpoint, keep_best=0),
        eval=dataclasses.replace(config.eval, tasks_minutes=1e-9),
    )
    train(late)
    assert [set(r) & {"letters/acc", "more/acc"} for r in _records(config, "tasks")] == [set()]
    (event,) = [r["event"] for r in _records(config, "event") if "tasks" in r["event"]]
    assert event.startswith("tasks left out after 1e-09 minutes: letters, more; raise --eval.tasks")

    from mmfree_jax.evaluate.task_scores import TaskScores

    score = TaskScores.score

    def interrupted(self, model, name):
        if name == "more":
            signal.raise_signal(signal.SIGTERM)
        return score(self, model, name)

    going_on = dataclasses.replace(late, stop_at=2, eval=config.eval)
    with monkeypatch.context() as patch:
        patch.setattr(TaskScores, "score", interrupted)
        summary = train(going_on)
    assert (summary["stopped_by"], summary["step"]) == ("SIGTERM", 2)
    assert [r["step"] for r in _records(config, "tasks")] == [1]
    train(dataclasses.replace(going_on, stop_at=3))
    assert [r["step"] for r in _records(config, "tasks")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks_dir": "no/such"}, "eval.tasks_dir is 'no/such', no folder"),
        ({"tasks": ("letters", "letters")}, "eval.tasks names letters twice"),
        (
            {"tasks": ("more",)},
            "'letters/acc', which this run does not log: choose one of more/",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(config, changes, message):
    options = dataclasses.replace(config.eval, **changes)
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(config, eval=options))
    assert not Path(config.run_dir).exists()
