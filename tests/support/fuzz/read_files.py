"""Files of every kind that is read, beside those that commands make (`workplace.py`)."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parents[3] / "experiments" / "results"

_CARD = """\
---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "*.parquet"
---
About it.
"""
_CODE = """\
LDV v0, 0x40, n=16
NORM v1, v0, n=16, eps=1000, root=16384, shift=-2
MUL v2, v0, v1, n=16, shift=14, bits=8
TMATMUL v3, v2, 0x100, n=16, k=16, shift=2 ; sixteen of sixteen
SIG v4, v3, n=16, frac=11
SV v4, 0x80, n=16
"""
_TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/tiny_choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}]
"""
_CHOICES = [{"q": "the bank of", "choices": [" stone", " light"], "gold": i} for i in (0, 1)]
_QUESTION = {
    "id": "1",
    "question": "what?",
    "choices": {"text": ["a b", "c"], "label": ["A", "B"]},
    "answerKey": "B",
}
_SWEEP = """\
out: sweeps
families:
  - {base: matmulfree, learning_rates: [0.005, 0.01]}
  - {base: transformer, learning_rates: [0.003]}
sizes: [tiny]
tokens: [1000]
tuning: {sizes: [tiny], tokens: 500}
train: {batch_size: 2, data: {paths: [data], seq_len: 16}}
"""
_SUMMARY = {
    "parameters": {"total": 166656, "non_embedding": 132864, "ternary": 147968},
    "device": {"kind": "cpu", "count": 1}, "tokens": 992, "step": 31, "training_flops": 9e8,
    "eval_loss": 3.5, "eval_bits_per_byte": 5.0, "tokens_per_s": 100.0, "seconds": 10.0,
    "versions": {"jax": "0.10.2"},
}  # fmt: skip


def add(folder: Path, texts: list[str]) -> None:
    """Adds them to the workplace, whose own files are there."""
    _add_texts(folder, texts)
    _add_tables(folder)
    (folder / "code.asm").write_text(_CODE)
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "tiny_choice.yaml").write_text(_TASK)
    _write_lines(tasks / "tiny_choice.jsonl", _CHOICES)
    _write_lines(tasks / "arc_easy.jsonl", [_QUESTION] * 2)
    measured = json.loads((RESULTS / "h100" / "scaling.json").read_text())
    (folder / "scaling").mkdir()
    _write_lines(folder / "scaling" / "results.jsonl", measured.pop("records"))
    (folder / "scaling" / "study.json").write_text(json.dumps(measured))


def _write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def _add_texts(folder: Path, texts: list[str]) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    import sentencepiece
    import zstandard

    table = pa.table({"text": texts, "id": list(range(len(texts)))})
    shutil.copytree(folder / "text", folder / "texts")
    lines = (folder / "text" / "b.jsonl").read_bytes()
    (folder / "texts" / "d.jsonl.zst").write_bytes(zstandard.compress(lines))
    pq.write_table(table, folder / "texts" / "e.parquet", row_group_size=15)
    file = str(folder / "texts" / "f.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
    (folder / "card").mkdir()
    (folder / "card" / "README.md").write_text(_CARD)
    pq.write_table(table, folder / "card" / "train.parquet")
    (folder / "card" / "other.jsonl").write_bytes(lines)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "sentencepiece").mkdir()
    (folder / "sentencepiece" / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "sentencepiece" / "tokenizer_config.json").write_text('{"eos_token": null}')


def _add_tables(folder: Path) -> None:
    import pyarrow.csv
    import pyarrow.parquet as pq

    lines = [line for line in (folder / "runs.csv").read_bytes().splitlines() if line[:1] != b"#"]
    table = pyarrow.csv.read_csv(io.BytesIO(b"\n".join(lines)))
    pq.write_table(table, folder / "runs.parquet")


def add_models(folder: Path, run: Any, *, session: bool) -> None:
    """Adds what is made of the workplace's models.

    Args:
      folder: the workplace, which is the current folder.
      run: runs a command of `mmfree`.
      session: also a session of this version, for which a model has to be compiled.
    """
    from safetensors.numpy import load_file, save_file

    _sign_checkpoint(folder / "run" / "checkpoints" / "300" / "manifest.json")
    run("import-hf", "hf", "folder")
    if session:
        run("generate", "--model", "run", "--prompt-ids", "119,101", "--max-new-tokens", "2",
            "--temperature", "0", "--save-state", "new-session.safetensors", "--quiet")  # fmt: skip
    shards = folder / "shards"
    shards.mkdir()
    shutil.copyfile("hf/config.json", shards / "config.json")
    tensors = load_file("hf/model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate(np.array_split(names, 2), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({str(name): tensors[name] for name in part}, shards / file)
        weight_map |= {str(name): file for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    _add_sweep(folder)


def _sign_checkpoint(file: Path) -> None:
    """Makes a manifest of the earlier version, which has no digest of itself, one of this."""
    from mmfree_jax.json_shape import digest
    from mmfree_jax.saved.manifest import FORMAT

    values = json.loads(file.read_text()) | {"format": FORMAT}
    file.write_text(json.dumps(values | {"sha256": digest(values)}))


def _add_sweep(folder: Path) -> None:
    """A sweep, half done: a run in its table, and one that failed."""
    from mmfree_jax.experiments.sweep.config import load_sweep
    from mmfree_jax.experiments.sweep.process import Outcome
    from mmfree_jax.experiments.sweep.record import make_row, write_failure
    from mmfree_jax.experiments.sweep.state import snapshot
    from mmfree_jax.experiments.sweep.table import append_result

    (folder / "plan.yaml").write_text(_SWEEP)
    first, second, *_ = snapshot(load_sweep("plan.yaml")).runs
    append_result(Path("sweeps"), make_row(first, _SUMMARY, 12.0, 1, "a"))
    write_failure(Path("sweeps"), second, Outcome("failed", "error", "it broke"), 1)
