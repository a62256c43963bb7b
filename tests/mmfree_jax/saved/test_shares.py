"""Each device's share of a state: copied beside training, written, read and gathered."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.sharding import SingleDeviceSharding as OneDevice
from orbax.checkpoint._src.serialization import replica_slices

from mmfree_jax.saved import array_files, shares
from mmfree_jax.saved.checkpoint import Checkpointer, restore
from mmfree_jax.saved.shares import Snapshots, local_bytes, share_sharding

METADATA = {
    "config": {},
    "data": {"fingerprints": [], "tokens": [], "paths": [], "tokenizer": {}},
}
GIB = 2**30


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def state(mesh):
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "step": put(jnp.int32(3)),
        "w": put(jax.random.normal(jax.random.key(0), (16, 6)), None, None),
        "mu": put(jax.random.normal(jax.random.key(1), (6, 8)), None, "fsdp"),
        "nu": put(jax.random.normal(jax.random.key(2), (6, 8)), "data", "fsdp"),
    }


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((16, 6), (), (("data", "fsdp"), None)),  # 2 and 4 divide 16
        ((6, 8), (None, "fsdp"), ("data", "fsdp")),
        ((3, 16), (None, "fsdp"), (None, ("fsdp", "data"))),  # 2 does not divide 3, but 16 / 4
        ((3, 4), (None, "fsdp"), (None, "fsdp")),
        ((2, 3), (), ("data", None)),  # nothing is left for fsdp
        ((), (), ()),
    ],
)
def test_unused_axes_split_the_first_dimension_that_they_divide(mesh, shape, spec, expected):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    share = share_sharding(sharding, shape)
    assert share.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*expected)), len(shape))
    held = sharding.devices_indices_map(shape)
    x = np.arange(np.prod(shape)).reshape(shape)
    for device, part in share.devices_indices_map(shape).items():
        assert np.isin(x[part], x[held[device]]).all(), "a share that is elsewhere must travel"


def test_one_device_has_its_own_share():
    sharding = OneDevice(jax.devices()[0])
    assert share_sharding(sharding, (8, 8)) is sharding


def test_bytes_of_the_shares(state):
    # w: 16 x 6 over 8 devices, mu and nu: 6 x 8 over 8, and a step on each.
    assert set(local_bytes(state).values()) == {4 + 4 * 12 + 4 * 6 + 4 * 6}
    assert len(local_bytes(state)) == 8


def _assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_copy_on_the_devices_is_what_is_saved(state, tmp_path, monkeypatch):
    monkeypatch.setattr(shares, "memory_of", lambda device: (0, GIB))
    written = []
    start = array_files.start_writing

    def start_writing(folder, state, *, is_ours):
        written.append((state["w"].sharding.spec, is_ours))
        return start(folder, state, is_ours=is_ours)

    monkeypatch.setattr("mmfree_jax.saved.checkpoint.start_writing", start_writing)
    expected = jax.device_get(state)
    mine = jax.tree.map(jnp.copy, state)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path)
    before = jax.live_arrays()  # kept, for a collection meanwhile would take others' garbage
    waiting = threading.Event()

    def to_host(arrays, *args, **kwargs):
        assert waiting.wait(60), "save() waits for what leaves the devices"
        return transfer(arrays, *args, **kwargs)

    transfer = replica_slices.transfer_arrays_to_host
    monkeypatch.setattr(replica_slices, "transfer_arrays_to_host", to_host)
    checkpointer.save(3, mine, METADATA)
    for _ in range(5):
        mine = advance(mine)
    jax.block_until_ready(mine)
    waiting.set()
    checkpointer.wait()
    assert written == [(PartitionSpec(("data", "fsdp"), None), True)]
    known = {id(array) for array in [*before, *jax.tree.leaves(mine)]}
    assert not [x for x in jax.live_arrays() if id(x) not in known], "the copy is given back"

    # Read by shares too, and gathered.
    monkeypatch.setattr(array_files, "_is_apart", lambda tree: True)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = restore(tmp_path / "3", abstract).state
    _assert_same(restored, expected)
    assert [x.sharding for x in jax.tree.leaves(restored)] == [
        x.sharding for x in jax.tree.leaves(state)
    ]


def test_arrays_are_written_as_they_are(tmp_path):
    zeros = {"w": jnp.zeros((512, 512))}  # 1 MiB, which zstd makes a few bytes of
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, zeros, METADATA)
    checkpointer.wait()
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) > 2**20


def test_a_copy_is_made_only_beside_what_training_needs(state, monkeypatch):
    size = next(iter(local_bytes(state).values()))
    peak = 0
    monkeypatch.setattr(shares, "memory_of", lambda device: (peak, 100 * size))

    def copies(snapshots):
        return snapshots.take(state) is not None

    snapshots, peak = Snapshots(), 93.5 * size
    assert copies(snapshots)  # 93.5 and 1 of 95
    peak = 94.5 * size  # the copy's own doing: training still needs 93.5
    assert copies(snapshots)
    peak = 94.6 * size  # not the copy's alone
    assert not copies(snapshots)
    assert not copies(Snapshots())
    monkeypatch.setattr(shares, "memory_of", lambda device: None)
    assert not copies(Snapshots())


def test_small_arrays_that_devices_hold_alike_are_written_by_one(mesh, tmp_path, monkeypatch):
    cut = []
    slice_in_dim = jax.lax.slice_in_dim

    def noted(x, **place):
        cut.append(x.nbytes)
        return slice_in_dim(x, **place)

    monkeypatch.setattr(jax.lax, "slice_in_dim", noted)
    alike = NamedSharding(mesh, PartitionSpec())
    large, small = (jax.device_put(np.ones((8, n), np.float32), alike) for n in (2**14, 2**13))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"large": large, "small": small}, METADATA)
    checkpointer.wait()
    assert set(cut) == {large.nbytes}
    assert len(cut) >= 8
