"""Preparing a data set that was stopped: it goes on, or says why not, and loses nothing."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_data import TEXTS, run, shard_bytes

from mmfree_jax.data import dataset as dataset_lib
from mmfree_jax.data import provenance, sources, writer
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import DataError, OutputError
from mmfree_jax.files import InUseError

REPOSITORY = Path(__file__).resolve().parents[3]


# Resuming. The child process kills itself, so that moments can be chosen exactly.

CHILD = """
import os, resource, signal, sys
from mmfree_jax.data import sources
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
if __name__ == "__main__":
    source, out, moment, workers, limit = sys.argv[1:]
    sources.BATCH_BYTES = 2000
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    calls = 0
    def show(progress):
        global calls
        calls += 1
        if calls == int(moment):
            os.kill(os.getpid(), signal.SIGKILL)
    config = PrepareConfig(out=out, input=(source,), heldout_fraction=0.3, shard_tokens=9000,
                           workers=int(workers))
    prepare_dataset(config, show, commit_bytes=5000)
    assert "jax" not in sys.modules
"""


def child(tmp_path, source, out, *, moment=0, workers=1, limit=0):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, str(script), source, str(out), str(moment), str(workers), str(limit)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["train-00000.tokens", "heldout-00000.documents"])
def test_a_finished_folder_that_lost_something_is_not_taken_to_be_done(source, tmp_path, name):
    """What else is said of such a folder is to prepare it again."""
    settings_ = {"input": (source,), "heldout_fraction": 0.3}
    run(tmp_path / "out", **settings_)
    file = tmp_path / "out" / name
    file.write_bytes(file.read_bytes()[:-8])
    way_out = f"remove {tmp_path / 'out'} and prepare the data set again"
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, its index says .*; {way_out}"):
        run(tmp_path / "out", **settings_)
    file.unlink()
    with pytest.raises(DataError, match=rf"{name}: No such file or directory; {way_out}"):
        run(tmp_path / "out", **settings_)


def test_a_file_in_the_folder_s_place_is_no_full_disk(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"out cannot be written \(.*\): give another --out$"):
        run(tmp_path / "out", input=(source,))


def test_killed_and_gone_on_with(source, tmp_path):
    settings_ = {"input": (source,), "heldout_fraction": 0.3, "shard_tokens": 9000}
    run(tmp_path / "whole", **settings_)
    out = tmp_path / "out"
    for moment, workers in ((1, 1), (4, 2), (2, 1), (7, 1)):
        result = child(tmp_path, source, out, moment=moment, workers=workers)
        assert result.returncode == -signal.SIGKILL, result.stderr
        with pytest.raises(DataError, match="unfinished"):
            dataset_lib.open_dataset(out)
    journal = json.loads((out / "progress.json").read_text())
    assert journal["record"] > 5  # it did get on
    result = child(tmp_path, source, out)
    assert result.returncode == 0, result.stderr
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
    assert dataset_lib.load_index(out).splits == dataset_lib.load_index(tmp_path / "whole").splits


def test_a_disk_that_is_full_keeps_what_was_there(source, tmp_path):
    """A file-size limit stands in for a full disk: a real write fails half way."""
    out = tmp_path / "out"
    result = child(tmp_path, source, out, limit=12_000)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"mmfree_jax.errors.OutputError: {out}")
    assert "run the same command again to go on" in last
    assert (out / "progress.json").exists()
    assert child(tmp_path, source, out).returncode == 0
    run(tmp_path / "whole", input=(source,), heldout_fraction=0.3, shard_tokens=9000)
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")


def test_a_script_is_not_run_again_by_each_worker(source, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "from mmfree_jax.data import PrepareConfig, prepare_dataset\n"
        f"config = PrepareConfig(out='out', input=({source!r},), workers=2)\n"
        "print(len(prepare_dataset(config)[0].splits))\n"
        "class Mine: pass\n"
        "import pickle; print(type(pickle.loads(pickle.dumps(Mine()))) is Mine)\n"
    )
    command = [sys.executable, str(script)]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "2\nTrue\n"), done.stderr


def test_no_space_is_one_clear_error(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer._GrowingFile, "append", full)
    with pytest.raises(OutputError, match=r"No space left on device.*what was finished is kept"):
        run(tmp_path / "out", input=(source,))


def interrupt(source, out, monkeypatch):
    """Leaves an unfinished folder with finished shards and an open one."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 2000)
    config = PrepareConfig(out=str(out), input=(source,), heldout_fraction=0.3, shard_tokens=9000,
                           workers=1)  # fmt: skip
    calls = []

    def show(progress):
        calls.append(progress)
        if len(calls) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(config, show, commit_bytes=5000)
    assert 0 < calls[-1].documents < len(TEXTS)
    assert calls[-1].read_bytes <= calls[-1].total_bytes
    return config


@pytest.mark.parametrize("name", ["train-00000.tokens", "train-00001.tokens"])
def test_damage_to_an_unfinished_folder_is_noticed(name, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = interrupt(source, out, monkeypatch)
    data = (out / name).read_bytes()
    (out / name).write_bytes(b"\x07" + data[1:])
    with pytest.raises(DataError, match=f"{name} (is missing or )?was changed"):
        prepare_dataset(config)


def test_other_settings_or_inputs_are_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    config = interrupt(source, out, monkeypatch)
    bpe = tmp_path / "bpe"
    train_bpe(TEXTS, 300).save(bpe)
    for change, reason in [
        ({"heldout_fraction": 0.2}, "heldout_fraction 0.3, not 0.2"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"tokenizer": str(bpe)}, r"tokenizer 'byte \(258 .* not 'bpe \(300"),
    ]:
        with pytest.raises(DataError, match=f"holds an unfinished data set made with {reason}"):
            prepare_dataset(dataclasses.replace(config, **change))
    text = Path(source).read_text()
    Path(source).write_text(text.replace("people", "PEOPLE"))
    with pytest.raises(DataError, match=r"other inputs \(texts\.jsonl differs\)"):
        prepare_dataset(config)
    Path(source).write_text(text)

    index, worked = prepare_dataset(dataclasses.replace(config, workers=2))
    assert worked
    again, worked = prepare_dataset(config)
    assert not worked
    assert again == index
    with pytest.raises(DataError, match="holds a data set made with seed"):
        prepare_dataset(dataclasses.replace(config, seed=1))


def test_a_folder_that_is_something_else_is_left_alone(source, tmp_path):
    out = tmp_path / "mine"
    (out / "tokenizer").mkdir(parents=True)
    (out / "tokenizer" / "tokenizer.json").write_text("precious")
    with pytest.raises(DataError, match=r"mine is not empty \(it holds tokenizer\)"):
        run(out, input=(source,))
    assert (out / "tokenizer" / "tokenizer.json").read_text() == "precious"
    assert [p.name for p in out.iterdir()] == ["tokenizer"]


def test_two_processes_do_not_share_a_folder(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (
        provenance.locked(out),
        pytest.raises(InUseError, match="out is in use by another job"),
    ):
        run(out, input=(source,))
