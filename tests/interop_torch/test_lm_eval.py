"""lm-eval's own Hugging Face backend on an export, beside `mmfree eval` on the run."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: run make torch")

import lm_eval  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mmfree_jax.cli.main import main  # noqa: E402

CHOICES = ["truths", "to be", "self evident", "zebra", "we"]
TASK = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def tasks_dir(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    questions = ["we hold these", "self", "that all are", "be evident to", "hold we hold", "x y z"]
    rows = [
        {"question": q, "choices": CHOICES, "answer": i % len(CHOICES)}
        for i, q in enumerate(questions)
    ]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choices.yaml").write_text(TASK.format(data=folder / "choices.jsonl"))
    return folder


@pytest.mark.parametrize(("add_bos", "batch_size"), [(False, 1), (False, 4), (True, 4)])
def test_both_give_every_choice_the_same_score(
    trained, tasks_dir, tmp_path, monkeypatch, add_bos, batch_size
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    flags = ["--model", trained.ours, "--tasks", "choices", "--tasks-dir", tasks_dir]
    flags += ["--output", tmp_path / "out", "--log-samples", "--compute-dtype", "float32"]
    flags += ["--add-bos"] * add_bos
    assert main(["eval", *map(str, flags)]) == 0
    (file,) = (tmp_path / "out").rglob("results_*.json")
    ours = json.loads(file.read_text())["results"]["choices"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(trained.folder),
            "trust_remote_code": True,
            "dtype": "float32",
            "add_bos_token": add_bos,
        },
        tasks=["choices"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        log_samples=True,
    )
    for metric in ("acc,none", "acc_norm,none"):
        assert theirs["results"]["choices"][metric] == ours[metric]
    samples = next((tmp_path / "out").rglob("samples_choices_*.jsonl"))
    mine = [json.loads(line) for line in samples.read_text().splitlines()]
    by_id = {row["doc_id"]: row for row in theirs["samples"]["choices"]}
    assert len(mine) == len(by_id) == 6
    for row in mine:
        found = [float(r[0]) for r in by_id[row["doc_id"]]["filtered_resps"]]
        assert [float(r[0]) for r in row["filtered_resps"]] == pytest.approx(found, rel=1e-3)
