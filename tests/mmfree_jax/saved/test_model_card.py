"""README.md of exported models: what the run's records say, and nothing that they do not."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from mmfree_jax.cli.main import main
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.data.tokenizer import ByteTokenizer, identity
from mmfree_jax.data.writer import write_dataset
from mmfree_jax.errors import ConfigError
from mmfree_jax.saved.convert import export_hf
from mmfree_jax.saved.evaluations import read_evaluations
from mmfree_jax.saved.huggingface import write_config
from mmfree_jax.saved.manifest import read_manifest
from mmfree_jax.saved.model_card import data_lines, model_card
from mmfree_jax.saved.open_model import open_model

OLD = Path(__file__).parent / "old"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 300 steps, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD / "run", tmp_path / "run")
    return Path("run")


def card(run, name="m", scores=None, **options):
    """Its front matter and its text."""
    saved = open_model(run)
    fields = write_config(saved.config, dtype="float32", packed=saved.kind == "packed")
    found = read_evaluations(saved, scores)
    _, front, text = model_card(name, saved, fields, saved.tokenizer(), found, **options).split(
        "---\n", 2
    )
    return yaml.safe_load(front), text


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_command_writes_what_the_run_recorded(run, capsys):
    command = "export-hf run hf --model-license mit --data-license CC0"
    assert main(command.split()) == 0
    _, front, text = Path("hf/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["matmul-free", "custom_code", "mmfree-jax"],
    }
    for line in (
        "# hf",
        "- parameters: 13,760",
        "- layers: 2; width: 16; vocabulary: 258",
        "- tokenizer: byte, 258 ids",
        "- steps: 300 of 300",
        "- tokens: 38,400 (8 rows of 16 at a time)",
        "- training loss: 0.5793 nats a token (step 300)",
        "- data: data, 12,339 tokens, fingerprint "
        "44a234294b6b921275e95c13289bf4ee86ed1655a72b90c150d48e2126d8fd95",
        "- licence of the data: CC0",
        'model = AutoModelForCausalLM.from_pretrained("path/to/folder", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/folder", trust_remote_code=True)',
        'model, params = mmfree_jax.load_pretrained("path/to/folder")',
    ):
        assert line in text.split("\n"), line
    assert "/tmp/" not in text  # folders of the machine stay there


def test_facts_of_another_step_are_left_out(run):
    assert "- training FLOPs: " in card(run)[1]
    change(run / "summary.json", step=400, training_flops=4e20)
    late = {"kind": "train", "step": 400, "loss": 0.25}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(late) + "\n")
    text = card(run)[1]
    assert "FLOPs" not in text
    assert "training loss: 0.5793 nats a token (step 300)" in text


def test_a_run_without_records_has_a_card(run):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text('{"kind": "train", "loss": "x"}\n')
    text = card(run)[1]
    assert "- steps: 300 of 300" in text
    assert "loss:" not in text
    assert "licence of the data: not recorded" in text


def test_a_packed_model_names_the_one_way_to_load_it(run):
    front, text = card(OLD / "packed", data_license="CC0")
    assert "license" not in front
    assert "stored weights: ternary ones at 2 bits, float32" in text
    assert "has no records of a training run" in text
    assert "licence of the data: CC0" in text
    assert "load_pretrained(" not in text


@pytest.mark.parametrize("same", [True, False])
def test_the_licence_of_a_known_corpus_is_taken_where_the_data_is_the_same(run, same):
    tokenizer = ByteTokenizer()
    documents = {"train": [tokenizer.encode_array("we hold")]}
    source = {"settings": {"corpus": "sotu"}}
    write_dataset(Path("corpus"), documents, identity(tokenizer), source=source)
    digest = open_dataset("corpus", "train").fingerprint if same else "0"
    trained_on = {"paths": ["corpus"], "tokens": [7], "fingerprints": [digest]}
    manifest = read_manifest(open_model(run).checkpoint())
    lines = data_lines(dataclasses.replace(manifest, data=trained_on), None)
    assert lines[0] == f"data: corpus{' (corpus sotu)' * same}, 7 tokens, fingerprint {digest}"
    assert lines[1:] == [f"licence of the data: {'public domain' if same else 'not recorded'}"]


def test_a_name_is_no_markup(run):
    assert "# a \\| \\[b\\](c) \\<i\\>\n" in card(run, name="a |\n[b](c) <i>")[1]


def test_a_licence_is_an_identifier(run, capsys):
    assert main(["export-hf", "run", "hf", "--model-license", "MIT"]) == 2
    error = capsys.readouterr().err
    assert "--model-license is 'MIT': give an identifier of the Hub" in error
    assert error.count("\n") == 1
    assert not Path("hf").exists()


def results(model, task, accuracy, **config):
    return {
        "results": {task: {"acc,none": accuracy, "acc_stderr,none": 0.0125, "alias": task}},
        "n-shot": {task: 5},
        "config": {"limit": None, **config, "model_args": {"model": model, **config}},
    }


def test_scores_of_this_model_go_in(run, tmp_path):
    folder = tmp_path / "eval/run"
    folder.mkdir(parents=True)
    for number, record in enumerate(
        (
            results("run", "arc_easy", 0.25),
            results(str(tmp_path / "run"), "arc_easy", 0.3125),  # newer
            results("run", "piqa", 0.625, limit=40.0),
            results("elsewhere/run", "openbookqa", 0.5),
            results("run", "winogrande", 0.5, numerics="fixed:w8a8"),
            {"results": 3},
        )
    ):
        (folder / f"results_{number}.json").write_text(json.dumps(record))
    loss = {"mean": 2.5, "documents": 1200, "bits_per_byte": {"mean": 1.125}}
    held_out = {"model": "run", "data": "/somewhere/books", "loss": loss}
    (folder / "held_out.json").write_text(json.dumps(held_out))
    text = card(run)[1]
    assert "| arc\\_easy | acc | 0.3125 | 0.0125 | 5 | all |" in text
    assert "| piqa | acc | 0.6250 | 0.0125 | 5 | first 40 |" in text
    assert "Held-out documents of books (1,200): 2.5000 nats a token, 1.1250 bits a byte." in text
    assert text.count("| 0.0125 |") == 2
    # Trained on since then: the scores are of other weights.
    next((run / "checkpoints").glob("*/manifest.json")).touch()
    assert "## Evaluation" not in card(run)[1]
    with pytest.raises(ConfigError, match=r"--scores is eval: eval/run has no scores of run that"):
        export_hf(run, "hf", scores="eval")
