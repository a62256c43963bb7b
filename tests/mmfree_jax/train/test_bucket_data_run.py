"""Training on a data set in a bucket computes what training on its folder does."""

import dataclasses
import json
from pathlib import Path

import pytest
from bucket_files import do_not_wait, put_folder
from faulty_proxy import Fault

from mmfree_jax.train import training

pytestmark = pytest.mark.usefixtures("traced_once")


def _losses(run_dir):
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["kind"], r["step"], r["loss"]) for r in records if r["kind"] in ("train", "eval")]


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_losses_are_those_of_the_folder_though_reads_fail(
    finished, bucket, byte_data, tmp_path, monkeypatch, keep_compiled
):
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    config, local, _ = finished
    url = put_folder(byte_data, f"{bucket.url}/words")
    bucket.proxy.add(
        Fault(r"GET .*index\.json", 1, status=503),
        Fault(r"GET .*\.tokens", 1, keep=50),
        Fault(r"GET .*\.documents", 1, flip=0),
    )
    data = dataclasses.replace(config.data, paths=(url,))
    with keep_compiled():
        training.train(dataclasses.replace(config, run_dir=str(tmp_path / "run"), data=data))
    assert _losses(tmp_path / "run") == _losses(local)
    assert len(_losses(local)) == 12 + 2
