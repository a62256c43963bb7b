"""Whole runs in a bucket that fails in the middle: they go on, or end in one line and resume."""

from typing import Any

import pytest
from bucket_files import do_not_wait, wait_for
from bucket_servers import Bucket
from etils.epath.backend import fsspec_backend
from faulty_proxy import Fault
from fsspec.asyn import sync
from whole_runs import replace

from mmfree_jax.error_line import error_line
from mmfree_jax.errors import MMFreeError
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.orbax_urls import prepare
from mmfree_jax.storage import download, parse_url
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("traced_once", "cached_compilation")

EXPIRED = {"gs": Fault(status=401), "s3": Fault(status=400)}
"""As the stores answer credentials that have expired."""


@pytest.fixture
def config(small_run, bucket: Bucket, monkeypatch):
    """The run `finished`, in a bucket; between tries nothing is waited."""
    monkeypatch.setenv("MMFREE_LEASE_SECONDS", "2")
    do_not_wait(monkeypatch)
    return replace(small_run, run_dir=f"{bucket.url}/runs/a")


def _losses(path) -> list[tuple]:
    return [
        (r["kind"], r["step"], r["loss"])
        for r in read_history(path)
        if r["kind"] in ("train", "eval")
    ]


def _check_same(config, finished, tmp_path) -> None:
    download(parse_url(config.run_dir) / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert _losses(tmp_path / "metrics.jsonl") == _losses(finished[1] / "metrics.jsonl")


def test_credentials_that_are_renewed_are_read_anew(config, bucket: Bucket, finished, tmp_path):
    fault = EXPIRED[bucket.server.scheme]
    for what in ("metrics.jsonl", "checkpoints/4/manifest.json", "checkpoints/8/manifest.json"):
        bucket.proxy.add(replace(fault, match=f"(PUT|POST) .*{what}", times=1))
    assert train(config)["status"] == "complete"
    _check_same(config, finished, tmp_path)


@pytest.mark.parametrize(
    ("bucket", "fault", "why"),
    [
        ("s3", Fault(status=400), "The provided token has expired"),
        ("gcs", Fault(status=401), "Invalid Credentials"),
    ],  # refused and vanished: test_bucket_runs.py
    ids=["s3 expired", "gcs expired"],
    indirect=["bucket"],
)
def test_a_bucket_that_is_lost_ends_the_run_in_one_line_and_it_resumes(
    config, bucket: Bucket, finished, tmp_path, fault, why
):
    """Lost once step 4 is whole, with nothing that gets through any more."""
    checkpoints = parse_url(config.run_dir) / "checkpoints"

    def lose(step: int) -> None:
        if step == 7:
            wait_for(lambda: checkpoint_steps(checkpoints) == [4])
            bucket.proxy.add(fault)

    with pytest.raises(MMFreeError, match=why) as caught:
        train(config, on_step=lose)
    line = error_line(caught.value, [])
    assert line.startswith("mmfree: error: ")
    assert "run the command again" in line
    bucket.proxy.clear()
    assert checkpoint_steps(checkpoints) == [4]
    assert train(config)["status"] == "complete"
    _check_same(config, finished, tmp_path)


def test_orbax_reads_the_credentials_of_s3_anew(s3_bucket, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    def key() -> str:
        prepare(parse_url(s3_bucket.url))
        fs: Any = fsspec_backend.fs(s3_bucket.url)
        fs.ls(s3_bucket.url)
        return sync(fs.loop, fs.session.get_credentials).access_key

    for name in ("OLD", "NEW"):
        text = f"[default]\naws_access_key_id = {name}\naws_secret_access_key = x\n"
        (tmp_path / "credentials").write_text(text)
        assert key() == name
