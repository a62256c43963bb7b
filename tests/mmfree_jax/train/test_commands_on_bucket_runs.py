"""Commands that read a run by its URL do what they do with its folder."""

import json

import pytest
from bucket_files import do_not_wait, put_folder
from faulty_proxy import Fault
from tokenizers import Tokenizer, models

from mmfree_jax import storage
from mmfree_jax.cli.main import main
from mmfree_jax.cli.serve import ServeConfig, _look_at_model, _open
from mmfree_jax.progress import show_progress
from mmfree_jax.storage import parse_url, read_bytes, write_bytes

pytestmark = pytest.mark.usefixtures("cached_compilation")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where a test writes, which is the current folder."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture(scope="module")
def run(bucket_of_runs, finished):
    """URL of the run `finished`. Leave it as it is."""
    return put_folder(finished[1], f"{bucket_of_runs.url}/runs/whole")


def test_generate(run, finished, capsys):
    argv = ["--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--print-ids", "--quiet"]
    said = []
    for model in (run, str(finished[1])):
        assert main(["generate", "--model", model, *argv]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].count(",") == 3


def test_scores_go_into_a_bucket(run, bucket_of_runs, byte_data, capsys):
    scores = f"{bucket_of_runs.url}/scores"
    data = ["--data", str(byte_data), "--limit", "2", "--window", "64", "--no-progress"]
    assert main(["eval", "--model", run, *data, "--output", scores]) == 0
    file = f"{scores}/whole/held_out.json"
    assert f"results: {file}" in capsys.readouterr().out
    found = json.loads(read_bytes(parse_url(file)))
    assert found["model"] == run
    assert found["loss"]["mean"] > 0
    assert main(["eval", "--model", run, *data, "--limit", "1", "--output", scores]) == 0
    assert f"kept: {scores}/whole/held_out_1.json" in capsys.readouterr().out
    assert json.loads(read_bytes(parse_url(f"{scores}/whole/held_out_1.json"))) == found
    assert json.loads(read_bytes(parse_url(file)))["limit"] == 1


def test_a_bucket_for_scores_that_is_not_there_is_told_before_the_model_is_read(capsys):
    argv = ["eval", "--model", "nowhere", "--data", "nothing", "--output", "gs://is-not-there/a"]
    assert main(argv) == 2
    assert "gs://is-not-there" in capsys.readouterr().err


def test_scores_of_a_run_get_into_the_card_of_its_export(run, finished, byte_data, folder):
    data = ["--data", str(byte_data), "--limit", "2", "--window", "64", "--no-progress"]
    assert main(["eval", "--model", run, *data]) == 0
    found = json.loads((folder / "eval" / "whole" / "held_out.json").read_text())
    assert found["model"] == run
    assert main(["export-hf", run, "there", "--scores", "eval"]) == 0
    card = (folder / "there" / "README.md").read_text()
    assert f"{found['loss']['mean']:.4f} nats a token" in card.partition("## Evaluation")[2]
    assert "steps: 12 of 12" in card
    assert main(["export-hf", str(finished[1]), "here"]) == 0
    there, here = (folder / name / "model.safetensors" for name in ("there", "here"))
    assert there.read_bytes() == here.read_bytes()


def test_serve(run, bucket_of_runs, folder):
    words = models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>")
    Tokenizer(words).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("said: {{ messages }}")
    tokenizer = put_folder(folder, f"{bucket_of_runs.url}/t")
    with show_progress("opening", is_shown=False) as show:
        config = ServeConfig(run, tokenizer=tokenizer, slots=1)
        service = _open(config, _look_at_model(config, show), show)
    try:
        assert service.name == "whole"
        assert service.chat.source == "said: {{ messages }}"
    finally:
        service.engine.close(drain=False)


def test_nothing_is_written_into_what_is_read(run, capsys):
    for command in (["pack", "--model", run, "--out"], ["export-hf", run]):
        assert main([*command, f"{run}/inside"]) == 2
        told = f"{run}/inside is, holds or lies in {run}, which is read: choose another folder"
        assert told in capsys.readouterr().err


_ONE_LINE = {
    "hf://b/m": "model is 'hf://b/m': URLs of hf: are not supported",
    "gs://bucket/../m": "leave out empty parts and `.` and `..`",
    "gs://no-such-bucket/m": "gs://no-such-bucket/m cannot be used: there is no bucket",
    "{bucket}/none": "model {bucket}/none does not exist: nothing in the bucket begins so",
    "{bucket}/half": "model {bucket}/half is half written: the command that writes it",
    "{bucket}/other": "{bucket}/other holds none of the files that it should",
    "{bucket}/no-config": "{bucket}/no-config holds no model: it has none of config.yaml",
    "{bucket}/bad": "config file {bucket}/bad/config.yaml is not valid YAML",
}


def test_what_cannot_be_read_is_one_line(bucket_of_runs, capsys, folder):
    for name, content in {
        "half/config.yaml": b"{}",
        "half/.mmfree-uploading.json": b"{}",
        "other/picture.png": b"",
        "no-config/summary.json": b"{}",
        "bad/config.yaml": b"steps: [",
    }.items():
        write_bytes(parse_url(f"{bucket_of_runs.url}/{name}"), content or b"x")
    for model, told in _ONE_LINE.items():
        error = _refused(model.format(bucket=bucket_of_runs.url), capsys, folder)
        assert told.format(bucket=bucket_of_runs.url) in error


def test_a_bucket_that_refuses_and_a_missing_extra_are_one_line(
    run, bucket_of_runs, capsys, folder, monkeypatch
):
    bucket_of_runs.proxy.add(Fault(status=403))
    told = f"{run} cannot be listed: permission denied or credentials expired"
    assert told in _refused(run, capsys, folder)
    bucket_of_runs.proxy.clear()
    monkeypatch.setitem(storage.file_systems._MODULES, "gs", "no_such_package")
    assert "(extra gcs) needs no_such_package" in _refused(run, capsys, folder)


def _refused(model, capsys, folder):
    """The one line that generate says; it leaves nothing."""
    assert main(["generate", "--model", model, "--prompt-ids", "1", "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert list(folder.iterdir()) == []
    return error
