"""Runs, tables and fits that analyses read by URL are those of the files."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from bucket_files import do_not_wait, put_folder

from mmfree_jax.cli.main import main
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.read import read_columns, read_runs
from mmfree_jax.storage import parse_url, upload, write_bytes

LADDER = Path(__file__).parents[2] / "experiments" / "results" / "synthetic_ladder.csv"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where a test writes, which is the current folder."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _make_run(folder, tokens, loss):
    folder.mkdir(parents=True)
    record = {"kind": "eval", "step": 1, "tokens": tokens, "loss": loss}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    summary = {"parameters": {"total": 100.0}, "status": "complete", "family": "f"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("seed: 3\n")
    (folder / "checkpoints" / "1").mkdir(parents=True)
    (folder / "checkpoints" / "1" / "manifest.json").write_text("large\n")


def test_run_directories_and_folders_of_them(gcs_bucket, folder):
    for name, loss in (("a", 3.0), ("b", 2.5)):
        _make_run(folder / "runs" / name, 1e6, loss)
    url = put_folder(folder / "runs", f"{gcs_bucket.url}/sweep/runs")
    here, there = read_runs([folder / "runs"]), read_runs([url])
    for field in dataclasses.fields(here):
        if field.name not in ("provenance", "notes"):
            np.testing.assert_array_equal(getattr(here, field.name), getattr(there, field.name))
    assert list(there.provenance) == [f"{url}/a", f"{url}/b"]
    assert list(read_runs([f"{url}/a/"]).loss) == [3.0]
    assert not gcs_bucket.proxy.requests("^GET /download/.*checkpoints")
    write_bytes(parse_url(f"{url}/b/summary.json"), b"{")
    with pytest.raises(ScalingError, match=f"^{url}/b/summary.json: is not readable JSON"):
        read_runs([url])


def test_tables(gcs_bucket):
    url = f"{gcs_bucket.url}/tables/ladder.csv"
    upload(LADDER, parse_url(url))
    here, there = read_runs([LADDER]), read_runs([url])
    np.testing.assert_array_equal(here.loss, there.loss)
    columns, _ = read_columns(url, ["tokens", "flops"])
    np.testing.assert_array_equal(columns["tokens"], read_columns(LADDER, ["tokens"])[0]["tokens"])
    with pytest.raises(ScalingError, match=f"^{url}: has no column 'x'"):
        read_columns(url, ["x"])


def test_what_the_commands_make_of_a_url(gcs_bucket, folder, capsys):
    """A fit of a table in a bucket, and a prediction from that fit once it lies there too."""
    url = f"{gcs_bucket.url}/tables/ladder.csv"
    upload(LADDER, parse_url(url))
    common = ["--bootstrap", "0", "--no-plot"]
    fits = []
    for source, out in ((url, "there.json"), (str(LADDER), "here.json")):
        assert main(["fit", source, "--law", "power-floor", *common, "--out", out]) == 0
        fits.append(json.loads((folder / out).read_text())["parameters"])
    assert fits[0] == fits[1]
    assert main(["fit", "power", url, "--y", "params", "--x", "flops", "--no-plot"]) == 0
    upload(folder / "there.json", parse_url(f"{gcs_bucket.url}/fits/fit.json"))
    capsys.readouterr()
    predicted = []
    for fit in ("there.json", f"{gcs_bucket.url}/fits", f"{gcs_bucket.url}/fits/fit.json"):
        assert main(["predict", fit, "--flops", "1e20"]) == 0
        predicted.append(capsys.readouterr().out.splitlines()[-1])
    assert predicted[1] == predicted[2]
    for argv in (["isoflop", f"{url}x"], ["crossing", url, f"{url}x"], ["extrapolate", f"{url}x"]):
        assert main([*argv, *common]) == 2
        error = capsys.readouterr().err
        assert f"runs {url}x does not exist: nothing in the bucket begins so" in error
        assert error.count("\n") == 1
