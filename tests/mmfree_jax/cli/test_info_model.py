"""`mmfree info --model`: what is known of a saved model, and no more."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from bucket_files import put_folder
from small_packed_model import BASE, build

from mmfree_jax.cli.main import main
from mmfree_jax.data.tokenizer import ByteTokenizer

ROOT = Path(__file__).parents[3]
OLD = ROOT / "tests/mmfree_jax/saved/old"
PUBLISHED = ROOT / "experiments/results/models/61M"


def told(capsys, model, *argv, code=0):
    assert main(["info", "--model", str(model), *argv, "--json"]) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == (code == 2)
    return json.loads(out), err


def test_a_published_packed_model(capsys):
    report, _ = told(capsys, PUBLISHED)
    assert report["kind"] == "packed"
    assert report["parameters"]["ternary"] == 61_112_320  # as its card says
    assert report["parameters"]["total"] == 66_439_552
    assert report["parameters"]["embedding"] == 8192 * 640
    assert report["weights"]["bits"] == "1.6"
    assert report["weights"]["embedding"] == "bfloat16"
    assert report["weights"]["files"] == 2
    assert report["row_tokens"] is None
    assert report["tokenizer"] == {"kind": "bpe", "vocab_size": 8192}
    assert report["training"]["tokens"] == 704_512_000
    assert round(report["training"]["held_out_loss"], 3) == 3.180
    assert report["license"]["sections_of_card"] == ["Data, licences, attribution"]
    assert report["checksums"]["state"] == "ok"


def test_a_run(capsys, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        for step, loss in ((200, 2.5), (300, 2.25), (400, 1.0)):
            file.write(json.dumps({"kind": "eval", "step": step, "loss": loss}) + "\n")
    report, _ = told(capsys, tmp_path / "run")
    assert report["training"] == {
        "step": 300, "steps": 300, "tokens": 300 * 8 * 16, "held_out_loss": 2.25,
        "held_out_step": 300,
    }  # fmt: skip
    assert (report["row_tokens"], report["license"]) == (16, None)
    assert main(["info", "--model", str(tmp_path / "run")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for part in (
        "13,760; 5,504 without embedding and head", "rows of 16 tokens", "byte, 258 ids",
        "300 of 300", "38,400", "2.2500 nats a token (step 300)", "licence not recorded",
        "checksums ok (the newest checkpoint's files)",
    ):  # fmt: skip
        assert part in shown


def test_folders_that_keep_no_checksums_say_so(capsys, save_model, tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")  # 258 ids, more than the model has
    config = dataclasses.replace(BASE, vocab_size=250)
    saved = save_model(tmp_path / "model", config, build(config)[1], tmp_path / "tokenizer")
    report, _ = told(capsys, saved.path)
    assert (report["kind"], report["training"]) == ("model folder", None)
    assert report["checksums"] == {"state": "none kept", "compared": 0, "damaged": []}
    assert main(["info", "--model", str(saved.path)]) == 0
    assert "258 ids, more than the model's 250" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(saved.path / "tokenizer")
    assert main(["export-hf", str(saved.path), str(tmp_path / "hf"), "--dtype", "float16"]) == 0
    (tmp_path / "hf/LICENSE").write_text("MIT")
    capsys.readouterr()
    report, _ = told(capsys, tmp_path / "hf")
    assert (report["kind"], report["weights"]["dtype"]) == ("huggingface", "float16")
    assert (report["tokenizer"], report["license"]["files"]) == (None, ["LICENSE"])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.filterwarnings("error")  # a warning would be a second line
def test_a_damaged_model_is_told_with_what_is_known_and_ends_with_2(capsys, tmp_path):
    for kind in ("run", "packed"):
        shutil.copytree(OLD / kind, tmp_path / kind)
    flip(tmp_path / "packed/packed.safetensors")
    largest = max(
        (f for f in (tmp_path / "run/checkpoints").rglob("*") if f.is_file()),
        key=lambda f: f.stat().st_size,
    )
    flip(largest)
    for kind, parameters in (("run", 13_760), ("packed", 13_760)):
        report, err = told(capsys, tmp_path / kind, code=2)
        assert report["parameters"]["total"] == parameters
        assert report["checksums"]["state"] == "damaged"
        assert f"{tmp_path / kind} is damaged: " in err
    report, _ = told(capsys, tmp_path / "packed", "--no-checksums")
    assert report["checksums"] is None


def test_files_in_a_list_of_sums_are_compared(capsys, tmp_path):
    shutil.copytree(OLD / "packed", tmp_path / "packed")
    (tmp_path / "packed/notes").write_text("x")
    (tmp_path / "packed/SHA256SUMS").write_text(
        f"{'0' * 64}  notes\n{'0' * 64}  ../../etc/passwd\n"
    )
    report, _ = told(capsys, tmp_path / "packed", code=2)
    assert report["checksums"]["damaged"] == ["notes does not match SHA256SUMS"]


@pytest.mark.parametrize("bucket", ["gcs"], indirect=True)
@pytest.mark.parametrize("kind", ["run", "packed"])
def test_a_model_in_a_bucket_is_the_same(kind, capsys, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path))
    url = put_folder(OLD / kind, f"{bucket.url}/{kind}")
    there, here = (told(capsys, place)[0] for place in (url, OLD / kind))
    assert there.pop("model") == url
    here.pop("model")
    assert there == here


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "x", "--preset", "tiny"], "leave out --preset"),
        (["--model", "x", "--steps", "3"], "leave out settings of training"),
        (["--model", "x"], "model x is not a folder"),
        (["--step", "3"], "--step is given, which goes with --model"),
        (["--no-checksums"], "--no-checksums is given, which goes with --model"),
        (["--model", str(OLD / "run"), "--step", "7", "--no-checksums"], "it has 300"),
    ],
)
def test_bad_input_is_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["info", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
