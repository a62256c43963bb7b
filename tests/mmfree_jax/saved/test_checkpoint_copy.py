"""Of a checkpoint in a bucket the parameters are copied, whole and compared, and nothing else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bucket_files import do_not_wait

from mmfree_jax import storage
from mmfree_jax.errors import CheckpointError
from mmfree_jax.saved import array_files, checkpoint_copy, checkpoint_files
from mmfree_jax.saved.array_files import read_arrays
from mmfree_jax.saved.checkpoint import Checkpointer
from mmfree_jax.saved.checkpoint_copy import copy_parameters
from mmfree_jax.saved.manifest import DamagedCheckpointError
from mmfree_jax.storage import list_below, parse_url, read_bytes, write_bytes

META = {
    "config": {"steps": 7},
    "data": {"fingerprints": ["x"], "tokens": [3], "paths": ["p"], "tokenizer": {}},
}
WEIGHTS = {f"layer{i}": np.arange(i, i + 4096, dtype=np.float32).reshape(64, 64) for i in range(3)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty folder for copies."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    return tmp_path / "cache"


@pytest.fixture
def saved(gcs_bucket, monkeypatch):
    """A checkpoint with a file for each array or so; four fifths are the optimiser's."""
    monkeypatch.setattr(array_files, "_FILE_BYTES", 8192)
    monkeypatch.setattr(array_files, "_CHUNK_BYTES", 8192)
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    state = {"params": params, "opt_state": [params] * 4, "step": jnp.int32(7)}
    folder = parse_url(f"{gcs_bucket.url}/run/checkpoints")
    checkpointer = Checkpointer(folder)
    checkpointer.save(7, state, META)
    checkpointer.wait()
    gcs_bucket.proxy.clear()
    return folder / "7"


def _read(folder):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for n, x in WEIGHTS.items()}
    return read_arrays(folder, {"params": wanted}, partial=True)["params"]


def _arrays(url):
    """The objects that arrays lie in."""
    return [o for o in list_below(url) if "/d/" in o.url.key and o.size > 4096]


def test_parameters_are_fetched_once_and_the_optimisers_arrays_never(saved, gcs_bucket):
    folder = copy_parameters(saved)
    assert str(folder).endswith(f"/{saved.path}")
    for name, expected in WEIGHTS.items():
        np.testing.assert_array_equal(_read(folder)[name], expected)
    objects = _arrays(saved)
    fetched = [r for r in gcs_bucket.proxy.requests("^GET /download/.*/d/") if "alt=media" in r]
    arrays = sum(x.nbytes for x in WEIGHTS.values())
    copied = sum(f.stat().st_size for f in folder.rglob("*") if "d" in f.parts and f.is_file())
    assert sum(o.size for o in objects) > 5 * arrays
    assert arrays < copied < 1.5 * arrays
    assert len(fetched) == len(set(fetched)) < len(objects)
    gcs_bucket.proxy.clear()
    assert copy_parameters(saved) == folder
    assert not gcs_bucket.proxy.requests("^GET /download/.*/ocdbt.process_0/d/")


def _holds_parameters(saved, folder):
    """Files with arrays, those of the copy first."""
    return sorted(
        _arrays(saved), key=lambda o: not (folder / o.url.key[len(saved.key) + 1 :]).exists()
    )


@pytest.mark.parametrize("which", ["parameters", "optimiser"])
def test_damage_counts_where_it_is_read(saved, cache, tmp_path, monkeypatch, which):
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "other"))
    objects = _holds_parameters(saved, copy_parameters(saved))
    monkeypatch.setenv("MMFREE_CACHE", str(cache))
    url = objects[0 if which == "parameters" else -1].url
    data = bytearray(read_bytes(url))
    data[100] ^= 1
    write_bytes(url, bytes(data))
    if which == "optimiser":
        np.testing.assert_array_equal(_read(copy_parameters(saved))["layer1"], WEIGHTS["layer1"])
        return
    name = url.key[len(saved.key) + 1 :]
    with pytest.raises(DamagedCheckpointError, match=f"{name} does not match its checksum"):
        copy_parameters(saved)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_file_that_is_missing_or_short_is_damage_whoever_reads_it(saved):
    objects = _arrays(saved)
    data = read_bytes(objects[-1].url)
    write_bytes(objects[-1].url, data[:-1])
    with pytest.raises(DamagedCheckpointError, match=f"has {len(data) - 1} bytes, not"):
        copy_parameters(saved)
    storage.delete(objects[-1].url)
    with pytest.raises(DamagedCheckpointError, match="is missing"):
        copy_parameters(saved)


def test_interrupted_it_leaves_nothing_that_is_taken_for_whole(saved, cache, monkeypatch):
    read, calls = checkpoint_files.read_bytes, []

    def interrupt(url, *range_):
        calls.append(url)
        if "ocdbt.process_0/d/" in url.key:
            raise KeyboardInterrupt
        return read(url, *range_)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "read_bytes", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copy_parameters(saved)
    assert calls
    assert not [path for path in cache.iterdir() if path.is_dir()]
    np.testing.assert_array_equal(_read(copy_parameters(saved))["layer2"], WEIGHTS["layer2"])


def test_a_copy_that_was_damaged_later_is_named(saved, cache):
    folder = copy_parameters(saved)
    file = next(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size > 4096)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"the copy of .* is damaged .*: remove {cache}/"):
        copy_parameters(saved)


def test_of_another_layout_all_is_fetched(saved, monkeypatch):
    def unknown(*_):
        raise ValueError("no such tree")

    monkeypatch.setattr(checkpoint_copy, "_walk", unknown)
    folder = copy_parameters(saved)
    manifest = json.loads(read_bytes(saved / "manifest.json"))
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    np.testing.assert_array_equal(_read(folder)["layer0"], WEIGHTS["layer0"])
