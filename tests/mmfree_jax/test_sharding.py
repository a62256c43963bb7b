"""Which device stands where, and which rows a process reads."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.parallel import sharding
from mmfree_jax.presets import preset


def _slices(count, each):
    """Devices of `count` slices, in an order that mixes them."""
    return [
        SimpleNamespace(
            id=s * each + i, slice_index=s, process_index=s, platform="gpu", device_kind="x"
        )
        for i in range(each)
        for s in range(count)
    ]


@pytest.mark.parametrize(
    ("shape", "crossing"),
    [
        ((4, 1, 1, 2), 0),  # 2 slices of 4: data crosses
        ((2, 4, 1, 1), 0),
        ((1, 4, 1, 2), 1),  # no data axis to cross: fsdp does
    ],
)
def test_only_the_outermost_axis_crosses_slices(shape, crossing):
    array = sharding._arrange(_slices(2, 4), shape)
    slice_of = np.vectorize(lambda d: d.slice_index)(array)
    for axis, size in enumerate(shape):
        alike = np.all(slice_of == np.take(slice_of, [0], axis=axis))
        assert alike == (axis != crossing or size == 1)
    along = np.moveaxis(slice_of, crossing, 0).reshape(shape[crossing], -1)[:, 0]
    assert list(along) == sorted(along), "a slice's devices are neighbours"


def test_slices_that_the_mesh_cannot_divide_are_refused():
    with pytest.raises(ConfigError, match=r"3 slices or hosts: make mesh\.data"):
        sharding._arrange(_slices(3, 2), (1, 2, 1, 1))


def test_rows_and_columns_of_each_device_reach_it():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, tensor=2))
    rows = sharding.process_rows(mesh, (6, 4))
    assert rows == tuple(range(6))
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(6, 4)}
    placed = sharding.place_batch(mesh, batch, rows, 6)["tokens"]
    np.testing.assert_array_equal(np.asarray(placed), batch["tokens"])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 2)}


def test_a_process_may_hold_rows_that_are_not_neighbours():
    mesh = sharding.make_mesh(MeshConfig())
    local = np.arange(16, dtype=np.int32).reshape(8, 2)
    # All rows are needed here; what is checked is that each is found among those read.
    placed = sharding.place_batch(mesh, {"x": local}, tuple(range(8)), 8)["x"]
    np.testing.assert_array_equal(np.asarray(placed), local)


def test_tokens_are_flattened_in_each_devices_own_order():
    mesh = sharding.make_mesh(MeshConfig(data=2, sequence=4))
    x = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, sharding.batch_sharding(mesh))
        compiled = jax.jit(sharding.flatten_tokens).lower(placed).compile()
        flat = compiled(placed)
    assert sorted(np.asarray(flat)) == list(range(32))
    assert not any(name in compiled.as_text() for name in ("all-gather", "all-to-all", "permute"))


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        (MeshConfig(data=2, sequence=4), {"seq_len": 18}, r"data\.seq_len is 18: .* \(4\)"),
        (MeshConfig(data=4, sequence=2), {"preset": "tiny-transformer"}, "attention needs whole"),
    ],
)
def test_sequences_that_cannot_be_split_are_refused(mesh, changes, message):
    config = preset(changes.get("preset", "tiny"))
    data = dataclasses.replace(config.data, seq_len=changes.get("seq_len", 256))
    with pytest.raises(ConfigError, match=message):
        sharding.check_divisible(dataclasses.replace(config, data=data), sharding.make_mesh(mesh))
