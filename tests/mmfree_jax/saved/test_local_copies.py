"""Copies of a state on a machine: whole or not, on any mesh, of this run alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import MeshConfig
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.saved import local_copies
from mmfree_jax.saved.local_copies import LocalCopies

METADATA = {
    "config": {"steps": 9},
    "data": {"fingerprints": ["f"], "tokens": [1], "paths": ["p"], "tokenizer": {}},
    "meter": {"window": {}, "skipped": 1, "skipped_in_a_row": 0},
}
SPECS = {"matrix": P("fsdp", "data"), "short": P(None, "fsdp"), "step": P()}


def _shardings(**mesh):
    on = make_mesh(MeshConfig(**mesh))
    return {name: NamedSharding(on, spec) for name, spec in SPECS.items()}


def _state(scale=1.0, **mesh):
    matrix = scale * np.arange(64, dtype=np.float32).reshape(8, 8)
    matrix[0, :3] = [-0.0, np.nan, -np.inf]
    values = {
        "matrix": matrix,
        "short": jnp.full((4, 8), 1.5, jnp.bfloat16),
        "step": np.int32(7),
    }
    return jax.device_put(values, _shardings(**mesh))


def _abstract(**mesh):
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_shardings(**mesh)[name])
        for name, x in _state(fsdp=8).items()
    }


def _bits(state):
    return {name: np.asarray(x).tobytes() for name, x in state.items()}


def _save(copies, step, state):
    copies.save(step, state, METADATA)
    copies.wait()


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 4, "fsdp": 2}, {"data": 8}])
def test_a_copy_is_read_on_any_mesh_bit_for_bit(tmp_path, mesh):
    state = _state(fsdp=4)
    _save(LocalCopies(tmp_path, "run"), 7, state)
    restored, notes = LocalCopies(tmp_path, "run").restore(_abstract(**mesh), newer_than=6)
    assert notes == ()
    assert _bits(restored.state) == _bits(state)
    assert all(x.sharding == _shardings(**mesh)[name] for name, x in restored.state.items())
    assert (restored.step, restored.manifest.config) == (7, {"steps": 9})
    assert restored.manifest.meter == METADATA["meter"]


def test_pieces_that_a_process_lacks_come_over_the_devices_network():
    state, wanted = _state(fsdp=4), _abstract(data=4, fsdp=2)
    pieces = local_copies._local_pieces(state)
    for name, x in wanted.items():
        owned = {b: piece for (leaf, b), piece in pieces.items() if leaf == f"['{name}']"}
        found = local_copies._spread(owned, x)
        assert found.sharding == x.sharding
        assert np.asarray(found).tobytes() == np.asarray(state[name]).tobytes()


def test_only_newer_ones_of_this_run_are_taken(tmp_path):
    _save(LocalCopies(tmp_path, "run"), 7, _state(fsdp=4))
    assert LocalCopies(tmp_path, "run").restore(_abstract(fsdp=4), newer_than=7) == (None, ())
    assert LocalCopies(tmp_path, "other").restore(_abstract(fsdp=4), newer_than=0) == (None, ())


def test_their_number_is_bounded_and_what_is_after_the_start_goes(tmp_path):
    first = LocalCopies(tmp_path, "run")
    for step in (2, 4, 6, 8):
        _save(first, step, _state(fsdp=4))
    here = tmp_path / "run"
    assert sorted(p.name for p in here.glob("*/*")) == ["6", "8"]
    second = LocalCopies(tmp_path, "run")
    second.drop_after(6)
    assert [p.name for p in here.glob("*/*")] == ["6"]
    _save(second, 8, _state(2.0, fsdp=4))
    assert sorted(p.name for p in here.glob("*/*")) == ["6", "8"]
    _save(second, 10, _state(fsdp=4))
    assert sorted(p.name for p in here.glob("*/*")) == ["10", "8"]
    second.remove()
    assert not here.exists()


def test_one_that_is_damaged_or_in_part_is_passed_over_and_told(tmp_path):
    copies = LocalCopies(tmp_path, "run")
    for step in (5, 7):
        _save(copies, step, _state(float(step), fsdp=4))
    (file,) = tmp_path.glob("run/*/7/pieces.safetensors")
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    restored, notes = copies.restore(_abstract(fsdp=4), newer_than=0)
    assert _bits(restored.state) == _bits(_state(5.0, fsdp=4))
    assert notes == (
        f"warning: a local copy of step 7 in {tmp_path / 'run'} is damaged, or of another model",
    )
    file.write_bytes(good)
    part = {"matrix": _state(fsdp=4)["matrix"]}
    _save(copies, 9, part)
    restored, notes = copies.restore(_abstract(fsdp=4), newer_than=0)
    assert restored.step == 7
    assert notes == (
        f"warning: the local copies of step 9 in {tmp_path / 'run'} are not whole: parts of the "
        "state are on no machine of this run",
    )


def test_a_full_disk_costs_a_copy_and_not_the_run(tmp_path, monkeypatch, capsys):
    copies = LocalCopies(tmp_path, "run")
    _save(copies, 5, _state(fsdp=4))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(local_copies, "tensor_writer", full)
    _save(copies, 7, _state(fsdp=4))
    assert "warning: no local copy of step 7: [Errno 28] No space" in capsys.readouterr().err
    assert copies.restore(_abstract(fsdp=4), newer_than=0)[0].step == 5


def test_a_copy_of_other_shapes_is_passed_over(tmp_path):
    copies = LocalCopies(tmp_path, "run")
    _save(copies, 5, _state(fsdp=4))
    other = _abstract(fsdp=4)
    other["step"] = jax.ShapeDtypeStruct((), jnp.float32, sharding=other["step"].sharding)
    restored, notes = copies.restore(other, newer_than=0)
    assert restored is None
    assert "is damaged, or of another model" in notes[0]
