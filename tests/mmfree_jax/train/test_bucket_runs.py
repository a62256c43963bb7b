"""Runs whose directory lies in a bucket, on GCS and on S3, against one on a disk."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from bucket_servers import Bucket
from faulty_proxy import Fault
from whole_runs import replace

from mmfree_jax import storage
from mmfree_jax.cli.main import main
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.errors import MMFreeError
from mmfree_jax.leases import InUseElsewhereError, take_lease
from mmfree_jax.saved.checkpoint import restore
from mmfree_jax.saved.history import read_history
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.storage import download, list_below, list_names, parse_url, read_bytes, write_bytes
from mmfree_jax.train.setup import open_run
from mmfree_jax.train.step import abstract_state
from mmfree_jax.train.training import train

pytestmark = pytest.mark.usefixtures("traced_once", "cached_compilation")

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(small_run, bucket: Bucket, monkeypatch):
    """The run `finished`, in a bucket, with leases that run out soon."""
    monkeypatch.setenv("MMFREE_LEASE_SECONDS", "2")
    return replace(small_run, run_dir=f"{bucket.url}/runs/a b")


def _losses(path: Path) -> list[tuple]:
    return [
        (r["kind"], r["step"], r["loss"], r.get("grad_norm"))
        for r in read_history(path)
        if r["kind"] in ("train", "eval")
    ]


def _check_same(config, finished, tmp_path: Path) -> None:
    """The run in the bucket has the records, state and model of the one on the disk."""
    url, (on_disk, folder, _) = parse_url(config.run_dir), finished
    download(url / "metrics.jsonl", tmp_path / "metrics.jsonl")
    assert _losses(tmp_path / "metrics.jsonl") == _losses(folder / "metrics.jsonl")
    run = open_run(on_disk)
    abstract = abstract_state(run.config, run.optimizer, run.mesh)
    found, expected = (
        restore(place / "checkpoints" / "12", abstract).state for place in (url, folder)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
        weight = open_model(str(url)).leaf("blocks/glu/down_proj/weight")
    np.testing.assert_array_equal(weight, open_model(folder).leaf("blocks/glu/down_proj/weight"))


def test_a_killed_run_goes_on_bit_for_bit(
    config, bucket: Bucket, finished, compilation_cache, tmp_path
):
    """Killed while step 8 is whole but for its manifest, which then does not count."""
    path, url = tmp_path / "config.yaml", parse_url(config.run_dir)
    path.write_text(dump_yaml(config))
    bucket.proxy.add(Fault(match="(PUT|POST) .*checkpoints/8/manifest.json", hang=True))
    log = (tmp_path / "log.txt").open("w+")
    command = [sys.executable, "-m", "mmfree_jax", "train", "--config", str(path)]
    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
    try:
        while not bucket.proxy.requests("(PUT|POST) .*checkpoints/8/manifest.json"):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        log.close()
    bucket.proxy.clear()
    assert checkpoint_steps(url / "checkpoints") == [4]
    assert "8" in list_names(url / "checkpoints")
    assert train(config)["status"] == "complete"
    assert b"resumed from checkpoint 4" in read_bytes(url / "metrics.jsonl")
    assert checkpoint_steps(url / "checkpoints") == [8, 12]  # keep_last is 2
    assert list_names(url / "checkpoints") == ["12", "8"]
    _check_same(config, finished, tmp_path)
    assert {"config.yaml", "summary.json", "metrics.jsonl", "loss_curve.png"} <= {*list_names(url)}
    requests = len(bucket.proxy.requests())
    assert train(config)["step"] == 12  # and is known to be complete
    assert len(bucket.proxy.requests()) > requests


def test_one_job_has_the_run_and_the_next_is_refused_in_one_line(
    config, bucket: Bucket, monkeypatch
):
    url = parse_url(config.run_dir)
    held = take_lease(url / ".lease.json", "run_dir", "process 12 on there")
    # The holder writes whenever the next job waits, however busy the machine is.
    waits = {"sleep": lambda seconds: held.beat()}
    monkeypatch.setattr(take_lease, "__kwdefaults__", take_lease.__kwdefaults__ | waits)
    with pytest.raises(InUseElsewhereError) as caught:
        train(config)
    assert str(caught.value) == (
        f"run_dir {url} is in use by another job (process 12 on there): wait for it to end, or "
        "choose another"
    )
    assert list_names(url) == [".lease.json"]


def test_a_store_that_fails_for_a_while_changes_nothing(config, bucket: Bucket, finished, tmp_path):
    for what in ("checkpoints/4/", "checkpoints/8/manifest.json", "metrics.jsonl"):
        bucket.proxy.add(Fault(match=f"(PUT|POST) .*{what}", status=503, times=2))
    bucket.proxy.add(Fault(match="GET .*checkpoints/8/state/d/", keep=7, times=1))
    assert train(config)["status"] == "complete"
    _check_same(config, finished, tmp_path)


@pytest.mark.parametrize(
    ("bucket", "status", "why"),
    [("gcs", 403, "storage.objects.get access"), ("s3", 404, "specified bucket does not exist")],
    indirect=["bucket"],
)
def test_a_save_that_fails_for_good_ends_the_run_which_resumes(
    config, bucket: Bucket, finished, tmp_path, status, why
):
    url = parse_url(config.run_dir)
    bucket.proxy.add(Fault(match="(PUT|POST) .*checkpoints/8/", status=status))
    with pytest.raises(MMFreeError, match=why) as caught:
        train(config)
    assert "run the command again" in str(caught.value)
    bucket.proxy.clear()
    assert checkpoint_steps(url / "checkpoints") == [4]
    assert train(config)["status"] == "complete"
    _check_same(config, finished, tmp_path)


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_damaged_checkpoint_is_passed_over_and_saved_again(
    config, bucket: Bucket, finished, tmp_path
):
    url = parse_url(config.run_dir)
    train(dataclasses.replace(config, stop_at=8))
    data = next(o for o in list_below(url / "checkpoints" / "8" / "state") if o.size > 1000)
    content = bytearray(read_bytes(data.url))
    content[500] ^= 1
    write_bytes(data.url, bytes(content))
    assert train(config)["status"] == "complete"
    told = read_bytes(url / "metrics.jsonl").decode()
    assert f"checkpoint {url}/checkpoints/8: " in told
    assert "does not match its checksum; falling back" in told
    assert checkpoint_steps(url / "checkpoints") == [8, 12]
    _check_same(config, finished, tmp_path)


@pytest.mark.parametrize(
    ("run_dir", "why"),
    [
        ("abfss://bucket/x", "URLs of abfss: are not supported"),
        ("gs://bucket/../x", "leave out empty parts"),
        ("{scheme}://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
    ],
)
def test_a_bad_url_is_one_line(config, bucket: Bucket, capsys, tmp_path, run_dir, why):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    run_dir = run_dir.format(scheme=bucket.server.scheme)
    assert main(["train", "--config", str(path), "--run-dir", run_dir]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_a_bucket_that_refuses_is_one_line(config, bucket: Bucket, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    bucket.proxy.add(Fault(status=403))
    assert main(["train", "--config", str(path), "--model.vocab-size", "256"]) == 2
    error = capsys.readouterr().err
    assert f"mmfree: error: {config.run_dir} cannot be used: permission denied" in error
    assert error.count("\n") == 1


def test_a_run_goes_into_no_folder_of_another_model(config, bucket: Bucket, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    place = parse_url(config.run_dir)
    write_bytes(place / "packed.safetensors", b"{}")
    assert main(["train", "--config", str(path), "--model.vocab-size", "256"]) == 2
    error = capsys.readouterr().err
    assert f"run_dir {config.run_dir} holds packed.safetensors (a packed model)" in error
    assert error.count("\n") == 1
    # The lease is over, and stays as it does behind every writer.
    assert sorted(list_names(place)) == [".lease.json", "packed.safetensors"]
    assert read_bytes(place / "packed.safetensors") == b"{}"


def test_a_missing_extra_is_one_line(config, capsys, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config))
    scheme = config.run_dir[:2]
    monkeypatch.setitem(storage.file_systems._MODULES, scheme, "no_such_package")
    assert main(["train", "--config", str(path), "--model.vocab-size", "256"]) == 2
    error = capsys.readouterr().err
    extra = {"gs": "gcs", "s3": "s3"}[scheme]
    assert f"(extra {extra}) needs no_such_package, which is not installed: run pip" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("bucket", ["s3"], indirect=True)
def test_a_local_copy_newer_than_the_bucket_is_gone_on_from(config, finished, tmp_path, capsys):
    config = replace(
        config, checkpoint__local_dir=str(tmp_path / "local"), checkpoint__local_every_steps=3
    )

    def die(step):
        if step == 7:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, on_step=die)
    assert checkpoint_steps(parse_url(config.run_dir) / "checkpoints") == [4]
    assert train(config)["status"] == "complete"
    said = capsys.readouterr().out
    assert "taken from the local copies of step 6: the newest checkpoint is step 4" in said
    _check_same(config, finished, tmp_path)


def test_the_curves_of_a_run_in_a_bucket_are_drawn(
    finished, bucket: Bucket, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    _, folder, _ = finished
    url = f"{bucket.url}/runs/a"
    for name in ("metrics.jsonl", "config.yaml"):
        storage.upload(folder / name, parse_url(url) / name)
    assert main(["plot", url]) == 0
    assert (tmp_path / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", url, "--list"]) == 0
    assert f"{url}: accuracy, " in capsys.readouterr().out
