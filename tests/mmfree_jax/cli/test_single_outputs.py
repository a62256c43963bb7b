"""A command's output file takes the place of its own earlier output and of nothing else."""

import json
import shutil

import pytest

from mmfree_jax.cli.main import main

_RUNS = "family,params,tokens,flops,loss\n" + "".join(
    f"mmfree,{n},{20 * n},{120 * n * n},{2 + 400 * n**-0.34 + 410 * (20 * n) ** -0.28}\n"
    for n in (10**6, 2 * 10**6, 4 * 10**6, 10**7, 2 * 10**7, 5 * 10**7)
)
_LINE = ["--law", "power", "--bootstrap", "0"]


def _refused(capsys, argv, file):
    before = file.read_bytes()
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err
    assert f"{file} is not replaced" in error
    assert error.count("\n") == 1
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["fit.json", "fit.png", "fit.plot.csv"])
def test_an_analysis_keeps_what_it_did_not_write(tmp_path, capsys, name):
    (tmp_path / "runs.csv").write_text(_RUNS)
    (tmp_path / name).write_text('{"name": "mine"}')
    argv = ["fit", tmp_path / "runs.csv", *_LINE, "--out", tmp_path / "fit.json"]
    _refused(capsys, argv, tmp_path / name)
    (tmp_path / name).unlink()
    for _ in range(2):
        assert main(list(map(str, argv))) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["law"] == "power"


def test_an_analysis_keeps_what_it_reads(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text(_RUNS)
    argv = ["fit", tmp_path / "runs.csv", *_LINE, "--out", tmp_path / "x.json"]
    assert main(list(map(str, argv))) == 0
    source = tmp_path / "x.plot.csv"
    shutil.copy(tmp_path / "runs.csv", source)
    _refused(capsys, ["fit", source, *_LINE, "--out", tmp_path / "x.json"], source)


@pytest.mark.parametrize("name", ["photo.png", "notes", "drawing.svg"])
def test_a_figure_keeps_what_it_did_not_write(tmp_path, capsys, name):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"kind": "train", "step": {s}, "loss": 2.0}}\n' for s in (1, 2, 3))
    )
    file = tmp_path / name
    if not file.exists():
        file.write_bytes(b"\x89PNG\r\n\x1a\n of a camera")
    _refused(capsys, ["plot", tmp_path, "--output", file], file)
    for suffix in ("png", "svg", "pdf", "SVG"):
        for _ in range(2):
            assert main(["plot", str(tmp_path), "--output", str(tmp_path / f"own.{suffix}")]) == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "a.tiff"])
def test_a_figure_has_the_name_of_one(tmp_path, capsys, name):
    history = (
        '{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "step": 2, "loss": 2.0}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(history)
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / name)]) == 2
    assert "let it end in .png, .svg, .pdf" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == history
    assert not (tmp_path / "a.tiff").exists()


def test_a_session_keeps_what_is_none(tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    argv = ["generate", "--model", tmp_path, "--prompt", "x", "--save-state", tmp_path / "notes"]
    _refused(capsys, argv, tmp_path / "notes")


def test_a_trained_tokenizer_keeps_other_tokenizers(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("some words and some more words\n" * 50)
    out = tmp_path / "tokenizer"
    out.mkdir()
    argv = ["tokenizer", "train", "--input", tmp_path / "x.txt", "--out", out]
    argv += ["--vocab-size", "260", "--heldout-fraction", "0"]
    (out / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    _refused(capsys, argv, out / "tokenizer_config.json")
    (out / "tokenizer_config.json").unlink()
    for _ in range(2):
        assert main(list(map(str, argv))) == 0
    (out / "tokenizer.model").write_text("mine")
    assert main(list(map(str, argv))) == 2
    assert "holds a SentencePiece tokenizer: give another --out" in capsys.readouterr().err


def test_a_job_file_is_replaced_by_another_rendering_only(tmp_path, capsys):
    job = tmp_path / "job.sh"
    argv = [
        "launch",
        "render",
        "slurm",
        "--name",
        "x",
        "--nodes",
        "1",
        "--out",
        job,
        "--",
        "--preset",
        "tiny",
    ]
    argv += ["--data.paths", "data", "--run-dir", "/shared/run"]
    for _ in range(2):
        assert main(list(map(str, argv))) == 0
    job.write_text("#!/bin/bash\nmine\n")
    _refused(capsys, argv, job)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["bench", "train", "--out", "{}/x"], "x"),
        (["bench", "kernels", "--out", "{}"], "kernels.json"),
        (["bench", "kernels", "--out", "{}"], "roofline.png"),
        (["bench", "infer", "--out", "{}"], "infer.json"),
        (["bench", "scaling", "--presets", "tiny", "--out", "{}"], "study.json"),
        (["compile", "--out", "{}/x"], "x"),
    ],
)
def test_a_measurement_keeps_what_it_did_not_write(tmp_path, capsys, command, name):
    (tmp_path / name).write_text('{"name": "mine"}')
    _refused(capsys, [word.format(tmp_path) for word in command], tmp_path / name)
