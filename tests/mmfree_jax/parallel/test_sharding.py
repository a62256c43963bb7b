"""Which device stands where, and which rows a process reads."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mmfree_jax.config import MeshConfig
from mmfree_jax.errors import ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import param_shapes, unflatten
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
    with pytest.raises(ConfigError, match=r"3 slices or hosts: make --mesh\.data"):
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
        (MeshConfig(data=2, sequence=4), {"seq_len": 18}, r"not .* \(4\): set --data\.seq-len 20"),
        (MeshConfig(data=4, sequence=2), {"preset": "tiny-transformer"}, "attention needs whole"),
    ],
)
def test_sequences_that_cannot_be_split_are_refused(mesh, changes, message):
    config = preset(changes.get("preset", "tiny"))
    data = dataclasses.replace(config.data, seq_len=changes.get("seq_len", 256))
    with pytest.raises(ConfigError, match=message):
        sharding.check_divisible(dataclasses.replace(config, data=data), sharding.make_mesh(mesh))


# Written out by hand: [out, in] matrices that read the residual stream have their outputs over
# tensor and their inputs over fsdp, those that write it the other way round; blocks have a layer
# axis in front; vectors are everywhere.
_COLUMN, _ROW = P(None, "tensor", "fsdp"), P(None, "fsdp", "tensor")
_BOTH = {
    "embedding/weight": P("tensor", "fsdp"),
    "blocks/mixer_norm/scale": P(),
    "blocks/glu_norm/scale": P(),
    "blocks/mixer/o_proj/weight": _ROW,
    "blocks/glu/gate_up_proj/weight": _COLUMN,
    "blocks/glu/down_proj/weight": _ROW,
    "final_norm/scale": P(),
    "head/weight": P("tensor", "fsdp"),
}
_MATMUL_FREE = _BOTH | {
    "lower_bounds": P(),
    "blocks/mixer/i_proj/weight": _COLUMN,
    "blocks/mixer/f_proj/weight": _COLUMN,
    "blocks/mixer/g_proj/weight": _COLUMN,
    "blocks/mixer/i_proj/norm_scale": P(),
    "blocks/mixer/f_proj/norm_scale": P(),
    "blocks/mixer/g_proj/norm_scale": P(),
    "blocks/mixer/o_proj/norm_scale": P(),
    "blocks/mixer/gate_norm/scale": P(),
    "blocks/glu/gate_up_proj/norm_scale": P(),
    "blocks/glu/down_proj/norm_scale": P(),
    "head/norm_scale": P(),
}
_TRANSFORMER = _BOTH | {
    "blocks/mixer/q_proj/weight": _COLUMN,
    "blocks/mixer/k_proj/weight": _COLUMN,
    "blocks/mixer/v_proj/weight": _COLUMN,
}


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("tiny", {}, _MATMUL_FREE),
        ("tiny", {"short_conv": 4}, _MATMUL_FREE | {"blocks/mixer/conv/kernel": P()}),
        (
            "tiny",
            {"short_conv": 4, "share_short_conv": False},
            _MATMUL_FREE | {"blocks/mixer/i_conv/kernel": P(), "blocks/mixer/f_conv/kernel": P()},
        ),
        ("tiny-transformer", {}, _TRANSFORMER),
        (
            "tiny-transformer",
            {"attention_bias": "qkvo", "qk_norm": True},
            _TRANSFORMER
            | {f"blocks/mixer/{p}_proj/bias": P() for p in "qkvo"}
            | {f"blocks/mixer/{p}_norm/scale": P() for p in "qk"},
        ),
    ],
    ids=["matmulfree", "convolution", "convolutions", "transformer", "options"],
)
def test_every_parameter_is_laid_out_as_written_here(name, changes, expected):
    config = dataclasses.replace(preset(name).model, **changes)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shapes = jax.eval_shape(
        LanguageModel(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]
    found = jax.tree_util.tree_flatten_with_path(sharding.param_shardings(mesh, shapes))[0]
    specs = {"/".join(k.key for k in path): s.spec for path, s in found}
    assert specs == expected


def test_without_tensor_every_matrix_is_split_by_its_rows_where_they_divide():
    config = dataclasses.replace(preset("tiny").model, vocab_size=257)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    layouts = sharding.param_shardings(mesh, unflatten(param_shapes(config)))
    found = jax.tree_util.tree_flatten_with_path(layouts)[0]
    split = {"/".join(k.key for k in path): s.spec for path, s in found if "fsdp" in s.spec}
    rows, columns = P(None, "fsdp", None), P("tensor", "fsdp")
    assert split == {
        # 257 words are no multiple of 4.
        "embedding/weight": columns,
        "head/weight": columns,
        "blocks/mixer/i_proj/weight": rows,
        "blocks/mixer/f_proj/weight": rows,
        "blocks/mixer/g_proj/weight": rows,
        "blocks/mixer/o_proj/weight": rows,
        "blocks/glu/gate_up_proj/weight": rows,
        "blocks/glu/down_proj/weight": rows,
    }
    even = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    for name in ("embedding", "head"):
        layout = sharding.param_shardings(mesh, {name: {"weight": even}})[name]["weight"]
        assert layout.spec == P("fsdp", None)


@pytest.mark.parametrize(
    "path",
    [
        "head/bias",
        "blocks/glu/n_proj/weight",
        "blocks/mixer/n_proj/kernel",
        "blocks/mixer/n_matrix/weight",
        "xhead/weight",
        "head/weight/more",
    ],
)
def test_a_parameter_without_a_line_is_an_error(path):
    with pytest.raises(KeyError, match="no line in the sharding table"):
        sharding.param_spec(path)
    tree = {}
    for name in reversed(path.split("/")):
        tree = {name: tree or jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    with pytest.raises(KeyError, match=path):
        sharding.param_shardings(sharding.make_mesh(MeshConfig()), tree)
