"""Models of runs that lie in a bucket: which checkpoint is read, and what cannot be."""

import warnings

import numpy as np
import pytest
from bucket_files import do_not_wait, put_folder

from mmfree_jax.cli.main import main
from mmfree_jax.errors import CheckpointError
from mmfree_jax.saved import run_model
from mmfree_jax.saved.checkpoint_copy import copy_parameters
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.storage import delete_below, list_below, parse_url, read_bytes, write_bytes

WEIGHT = "blocks/glu/down_proj/weight"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for copies."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)


@pytest.fixture(scope="module")
def run(bucket_of_runs, finished):
    """URL of the run `finished`, which has the steps 8 and 12. Leave it as it is."""
    return put_folder(finished[1], f"{bucket_of_runs.url}/runs/a")


def _damage(finished, url, *steps):
    """Uploads the run, a bit of these checkpoints turned; the URL."""
    put_folder(finished[1], url)
    for step in steps:
        state = parse_url(f"{url}/checkpoints/{step}/state")
        data = max(list_below(state), key=lambda found: found.size)
        content = bytearray(read_bytes(data.url))
        content[len(content) // 2] ^= 1
        write_bytes(data.url, bytes(content))
    return url


def test_newest_by_step_and_best(run, finished):
    here = finished[1]
    for step, found in ((None, "12"), (8, "8"), ("best", "12")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            there = open_model(run, step=step)
            np.testing.assert_array_equal(
                there.leaf(WEIGHT), open_model(here, step=step).leaf(WEIGHT)
            )
        assert there.checkpoint().name == found
    with pytest.raises(CheckpointError, match=r"a/checkpoints has no checkpoint of step 3: it has"):
        open_model(run, step=3).weights()


def test_nothing_of_a_checkpoint_is_read_before_it_is_asked_for(run, bucket_of_runs):
    bucket_of_runs.proxy.clear()
    saved = open_model(run)
    assert (saved.kind, saved.trained_length) == ("run", 16)
    assert not bucket_of_runs.proxy.requests("^GET /download/.*checkpoints/")
    assert not bucket_of_runs.proxy.requests("^GET /download/.*(png|lock)")


def test_a_damaged_one_is_passed_over_with_a_word(bucket_of_runs, finished):
    url = _damage(finished, f"{bucket_of_runs.url}/runs/one", 12)
    told = rf"checkpoint {url}/checkpoints/12: .* does not match its checksum; falling back"
    with pytest.warns(UserWarning, match=told):
        weight = open_model(url).leaf(WEIGHT)
    np.testing.assert_array_equal(weight, open_model(finished[1], step=8).leaf(WEIGHT))
    with pytest.raises(CheckpointError, match=r"its checksum: give another step \(8\)"):
        open_model(url, step=12).weights()
    assert read_bytes(parse_url(url) / "checkpoints" / "12" / "manifest.json")  # left as it is


def test_where_all_are_damaged_there_is_one_line(bucket_of_runs, finished, tmp_path, capsys):
    url = _damage(finished, f"{bucket_of_runs.url}/runs/all", 8, 12)
    argv = ["pack", "--model", url, "--out", str(tmp_path / "out"), "--agreement-prompts", "0"]
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"every checkpoint in {url}/checkpoints is damaged (12, 8)" in error
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_checkpoint_is_one_line(bucket_of_runs):
    url = parse_url(f"{bucket_of_runs.url}/begun")
    write_bytes(url / "config.yaml", b"{}\n")
    with pytest.raises(CheckpointError, match=f"{url}/checkpoints holds no checkpoint: train"):
        open_model(str(url)).weights()


def test_a_run_that_goes_on_meanwhile_is_looked_at_again(run, bucket_of_runs, finished):
    """It deletes the checkpoint that is being read; the one that it has by then is taken."""
    url = parse_url(put_folder(finished[1], f"{bucket_of_runs.url}/runs/live"))
    put_folder(finished[1] / "checkpoints" / "8", f"{url}/checkpoints/8")
    hidden = {o.url: read_bytes(o.url) for o in list_below(url / "checkpoints" / "12")}
    delete_below(url / "checkpoints" / "12")
    seen = []

    def go_on(checkpoint):
        if not seen:
            for place, content in hidden.items():
                write_bytes(place, content)
            delete_below(url / "checkpoints" / "8")
        seen.append(checkpoint.name)
        return copy_parameters(checkpoint)

    with pytest.warns(UserWarning, match="checkpoints/8: .*No such file"):
        assert run_model.find_checkpoint(url, check=go_on).name == "12"
    assert seen == ["8", "12"]


def test_packed_and_exported_forms_are_opened_too(run, bucket_of_runs, finished, tmp_path):
    from mmfree_jax.cli.main import main

    assert (
        main(["pack", "--model", run, "--out", str(tmp_path / "p"), "--agreement-prompts", "0"])
        == 0
    )
    there = open_model(put_folder(tmp_path / "p", f"{bucket_of_runs.url}/packed"))
    assert there.kind == "packed"
    for one, other in zip(
        there.ternary(WEIGHT), open_model(finished[1]).ternary(WEIGHT), strict=True
    ):
        np.testing.assert_array_equal(one, other)
