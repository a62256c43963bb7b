"""Damage in a data set's shards is found when a run opens it, once."""

import dataclasses
import os
import shutil
import subprocess
import threading

import pytest

from mmfree_jax.data import verification
from mmfree_jax.data.dataset import HELDOUT, open_dataset
from mmfree_jax.errors import DataError
from mmfree_jax.train.training import train


@pytest.fixture
def data(byte_data, tmp_path):
    return shutil.copytree(byte_data, tmp_path / "data")


def _flip(file, *, keep_time=False):
    stat = file.stat()
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    if keep_time:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("kind", ["flipped", "zeroed"])
def test_training_on_a_damaged_shard_is_refused(small_run, data, tmp_path, split, kind):
    file = data / f"{split}-00000.tokens"
    if kind == "flipped":
        _flip(file)
    else:
        file.write_bytes(bytes(file.stat().st_size))
    config = dataclasses.replace(
        small_run,
        run_dir=str(tmp_path / "run"),
        data=dataclasses.replace(small_run.data, paths=(str(data),)),
    )
    with pytest.raises(DataError, match=f"^{file} is damaged: [^\n]*prepare the data set again$"):
        train(config)


def test_a_large_data_set_is_read_beside_the_training(small_run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "AT_ONCE", 0)
    _flip(data / "train-00000.documents")
    steps = []

    def let_it_end(done):
        steps.append(done)
        for thread in threading.enumerate():
            if thread.name == "verification":
                thread.join()

    config = dataclasses.replace(
        small_run,
        run_dir=str(tmp_path / "run"),
        data=dataclasses.replace(small_run.data, paths=(str(data),)),
    )
    with pytest.raises(DataError, match="documents is damaged"):
        train(config, on_step=let_it_end)
    assert steps == [1]


def test_good_files_are_read_once_and_changed_ones_again(data, monkeypatch):
    read = []

    def digest(file):
        read.append(file.name)
        return sha256_file(file)

    sha256_file = verification.sha256_file
    monkeypatch.setattr(verification, "sha256_file", digest)
    both = [open_dataset(data), open_dataset(data, HELDOUT)]
    verification.verify(both)
    assert read == [f"{s}-00000.{e}" for s in ("train", "heldout") for e in ("tokens", "documents")]
    read.clear()
    verification.verify(both)
    assert read == []
    _flip(data / "heldout-00000.tokens", keep_time=True)
    with pytest.raises(DataError, match="tokens is damaged"):
        verification.verify(both)
    assert read == ["heldout-00000.tokens"]
    (data / verification.REMEMBERED).write_text("no JSON")
    with pytest.raises(DataError):
        verification.verify(both)
    copy = shutil.copytree(data, data.parent / "copy")  # with the same times
    read.clear()
    with pytest.raises(DataError):
        verification.verify([open_dataset(copy), open_dataset(copy, HELDOUT)])
    assert "train-00000.tokens" in read


def test_a_folder_that_takes_no_file_is_read_each_time(byte_data, make_disk):
    folder = make_disk(200) / "data"
    shutil.copytree(byte_data, folder)
    (folder / verification.REMEMBERED).unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", folder.parent], check=True)
    verification.verify([open_dataset(folder)])
    verification.verify([open_dataset(folder)])
    assert not (folder / verification.REMEMBERED).exists()
