"""Checkpoints: exact, whole or absent, and honest about damage."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmfree_jax.errors import CheckpointError, OutputError
from mmfree_jax.saved.checkpoint import Checkpointer, restore, restore_newest, steps_to_delete
from mmfree_jax.saved.manifest import MANIFEST, checkpoint_steps

METADATA = {
    "config": {"steps": 3},
    "data": {"fingerprints": [], "tokens": [8], "paths": [], "tokenizer": {}},
}


def _mesh(shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))


def _state(seed=0, shape=(16, 8)):
    mesh = _mesh((4, 2), ("a", "b"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    return {
        "step": put(jnp.int32(seed)),
        "params": {"w": put(jax.random.normal(jax.random.key(seed), shape), "a", "b")},
        "mu": (put(jnp.ones(shape, jnp.bfloat16) * seed, None, "b"),),
    }


def _abstract(state, sharding=None):
    def one(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding)

    return jax.tree.map(one, state)


def _save(folder, *steps, **kwargs):
    checkpointer = Checkpointer(folder, **kwargs)
    for step in steps:
        checkpointer.save(step, _state(step), METADATA)
    checkpointer.wait()
    return checkpointer


def _assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def _largest_data_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_onto_another_mesh(tmp_path):
    _save(tmp_path, 3)
    mesh = _mesh((8,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    abstract = _abstract(_state(), sharding)
    abstract["params"]["w"] = jax.ShapeDtypeStruct(
        (16, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    restored = restore(tmp_path / "3", abstract)
    _assert_same(restored.state, _state(3))
    assert restored.step == 3
    assert restored.manifest.config == {"steps": 3}
    assert restored.state["params"]["w"].sharding == abstract["params"]["w"].sharding


def test_the_state_may_be_donated_right_after_save(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    state = _state(3)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpointer.save(3, state, METADATA)
    for _ in range(10):
        state = advance(state)
    jax.block_until_ready(state)
    checkpointer.wait()
    _assert_same(restore(tmp_path / "3", _abstract(_state())).state, _state(3))


def test_retention(tmp_path):
    _save(tmp_path, 1, 2, 3, 4, 5, keep_last=2, keep_every=3)
    assert checkpoint_steps(tmp_path) == [3, 4, 5]
    assert sorted(os.listdir(tmp_path)) == ["3", "4", "5"]
    assert steps_to_delete([10, 20, 30, 40], 1, 20) == [10, 30]
    assert steps_to_delete([10, 20], 2, None) == []
    assert steps_to_delete([7, 10, 20, 30], 1, None, (7, 20, 99)) == [10]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_newest_checkpoint_falls_back_and_is_named(tmp_path, damage):
    _save(tmp_path, 1, 2)
    victim = _largest_data_file(tmp_path / "2" / "state")
    if damage == "manifest":
        victim = tmp_path / "2" / MANIFEST
        victim.write_text(victim.read_text()[:50])
    elif damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 4
        victim.write_bytes(data)
    elif damage == "truncate":
        os.truncate(victim, victim.stat().st_size - 7)
    else:
        victim.unlink()
    with pytest.warns(UserWarning, match=rf"{tmp_path}/2.*falling back"):
        restored = restore_newest(tmp_path, _abstract(_state()))
    assert restored is not None
    assert restored.step == 1
    _assert_same(restored.state, _state(1))
    # It is kept for inspection, and its step can be saved again.
    assert (tmp_path / "2.damaged").is_dir()
    _save(tmp_path, 2)
    assert checkpoint_steps(tmp_path) == [1, 2]
    assert (tmp_path / "2.damaged").is_dir()


def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path):
    _save(tmp_path, 1)
    os.truncate(_largest_data_file(tmp_path / "1" / "state"), 10)
    with (
        pytest.warns(UserWarning, match="falling back"),
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
        restore_newest(tmp_path, _abstract(_state()))


def test_an_empty_folder_restores_nothing(tmp_path):
    assert restore_newest(tmp_path / "none", _abstract(_state())) is None


def test_unfinished_saves_are_ignored_and_removed(tmp_path):
    _save(tmp_path, 1, 2)
    (tmp_path / "2" / MANIFEST).unlink()
    (tmp_path / "7.orbax-checkpoint-tmp-3").mkdir()
    with pytest.warns(UserWarning, match=rf"{tmp_path}/2 has no manifest.json.*falling back"):
        restored = restore_newest(tmp_path, _abstract(_state()))
    assert restored is not None
    assert restored.step == 1
    Checkpointer(tmp_path)
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["params"].update(w=jnp.zeros((16, 4))), r"\['params'\]\['w'\].*\[16, 4\]"),
        (lambda s: s.update(mu=(s["mu"][0].astype("float32"),)), r"\['mu'\]\[0\].*bfloat16"),
        (lambda s: s["params"].update(v=jnp.zeros(2)), r"has no \['params'\]\['v'\]"),
        (lambda s: s["params"].pop("w"), r"holds \['params'\]\['w'\]"),
    ],
)
def test_other_shapes_name_the_leaf(tmp_path, change, message):
    _save(tmp_path, 1)
    state = _state()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        restore_newest(tmp_path, _abstract(state))
    assert checkpoint_steps(tmp_path) == [1]


def test_a_newer_format_is_refused(tmp_path):
    _save(tmp_path, 1)
    path = tmp_path / "1" / MANIFEST
    values = json.loads(path.read_text()) | {"format": 99}
    del values["sha256"]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(values | {"sha256": digest}))
    with pytest.raises(CheckpointError, match="format 99"):
        restore_newest(tmp_path, _abstract(_state()))
    assert checkpoint_steps(tmp_path) == [1]


_FULL_DISK = """
    import os, resource, sys, warnings
    import jax, jax.numpy as jnp
    from pathlib import Path
    from mmfree_jax.errors import CheckpointError
    from mmfree_jax.saved.checkpoint import Checkpointer
    from mmfree_jax.saved.manifest import checkpoint_steps
    folder = Path(sys.argv[1])
    checkpointer = Checkpointer(folder)
    state = {"w": jax.random.normal(jax.random.key(0), (256, 256))}  # 256 KiB
    checkpointer.save(1, state, {})
    checkpointer.wait()
    if sys.argv[2] == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
    else:
        with open(folder / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
    # Many arrays, so that some still write when the first failure ends the save.
    many = {str(i): jax.random.normal(jax.random.key(i), (64, 256)) for i in range(32)}
    try:
        checkpointer.save(2, many, {})
        checkpointer.wait()
    except CheckpointError as e:
        print(e)
    print(checkpoint_steps(folder), sorted(os.listdir(folder)))
"""


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_a_full_disk_keeps_what_was_there(tmp_path, kind):
    script = tmp_path / "save.py"
    script.write_text(textwrap.dedent(_FULL_DISK))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    command = [sys.executable, str(script), str(folder), kind]
    if kind == "tmpfs":  # a real full disk, where user namespaces are allowed
        mount = f'mount -t tmpfs -o size=600k none "{folder}" && exec "$@"'
        enter = ["unshare", "-rm", "sh", "-c"]
        try:
            probe = subprocess.run([*enter, mount, "sh", "true"], capture_output=True)
        except FileNotFoundError:
            pytest.skip("unshare is not installed")
        if probe.returncode:
            pytest.skip("this system does not allow mounts in a user namespace")
        command = [*enter, mount, "sh", *command]
    root = Path(__file__).parents[3]
    env = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    # Orbax logs a traceback of what its threads raise, beside raising it.
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") < 5, result.stderr
    message, listing = result.stdout.strip().splitlines()
    assert "checkpoint of step 2 could not be saved" in message
    assert "last good checkpoint is step 1" in message
    if kind == "tmpfs":
        assert "No space left on device" in message
    assert listing.startswith("[1] ['1'")
    assert "'2" not in listing


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="give another --run-dir"):
        Checkpointer(tmp_path / "file" / "checkpoints")
