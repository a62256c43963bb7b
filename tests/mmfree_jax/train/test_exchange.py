"""In which dtype, and how often, devices exchange the gradients of a step."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from mmfree_jax.config import MeshConfig, replace_model
from mmfree_jax.launch.ahead import topology
from mmfree_jax.launch.ahead.hlo import moved_within
from mmfree_jax.parallel.sharding import make_mesh
from mmfree_jax.presets import preset
from mmfree_jax.train.optimizer import make_optimizer
from mmfree_jax.train.schedule import schedule_values
from mmfree_jax.train.step import init_sharded, jit_train_step, state_shapes

MATRICES = {
    "embedding/weight", "head/weight", "blocks/glu/down_proj/weight",
    "blocks/glu/gate_up_proj/weight", "blocks/mixer/f_proj/weight", "blocks/mixer/g_proj/weight",
    "blocks/mixer/i_proj/weight", "blocks/mixer/o_proj/weight",
}  # fmt: skip


def _config(dtype):
    config = replace_model(preset("tiny"), residual_dtype="bfloat16")
    optimizer = dataclasses.replace(config.optimizer, gradient_dtype=dtype)
    data = dataclasses.replace(config.data, seq_len=16)
    return dataclasses.replace(config, batch_size=8, optimizer=optimizer, data=data)


def _batch():
    tokens = np.random.default_rng(0).integers(0, 256, (8, 17), dtype=np.int32)
    ones = np.ones((8, 16), np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones}


def _lowered(dtype, mesh):
    config = _config(dtype)
    optimizer = make_optimizer(config.optimizer, config.model)
    schedule = schedule_values(config.optimizer, config.steps)
    shapes = state_shapes(config, optimizer)
    with jax.set_mesh(mesh):
        return jit_train_step(config, optimizer, mesh).lower(shapes, _batch(), schedule)


@pytest.fixture(scope="module")
def steps():
    """The compiled step on data 2 x fsdp 2 in both dtypes, and the state and metrics after it."""
    mesh, found = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4]), {}
    for dtype in ("float32", "bfloat16"):
        config = _config(dtype)
        optimizer = make_optimizer(config.optimizer, config.model)
        compiled = _lowered(dtype, mesh).compile()
        state = init_sharded(config, optimizer, mesh)
        schedule = schedule_values(config.optimizer, config.steps)
        found[dtype] = compiled, *compiled(state, _batch(), schedule)
    return found


def _first_moments(state):
    moments = next(s for s in state.opt_state if hasattr(s, "mu")).mu
    leaves = jax.tree_util.tree_flatten_with_path(moments)[0]
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def test_in_bfloat16_the_matrices_gradients_differ_by_their_rounding_alone(steps):
    _, expected, metrics = steps["float32"]
    _, got, rounded = steps["bfloat16"]
    np.testing.assert_array_equal(rounded["loss"], metrics["loss"])
    np.testing.assert_allclose(rounded["grad_norm"], metrics["grad_norm"], rtol=1e-3)
    expected, got = _first_moments(expected), _first_moments(got)
    errors = {
        name: np.linalg.norm(got[name] - expected[name]) / (np.linalg.norm(expected[name]) + 1e-30)
        for name in expected
    }
    # Four devices round once each and at three sums: sqrt(7 / 3) 2^-9 at most.
    assert {name for name, error in errors.items() if error > 5e-4} == MATRICES
    assert max(errors.values()) < 4e-3


def test_on_one_device_nothing_is_exchanged_and_nothing_rounded():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert _lowered("bfloat16", mesh).as_text() == _lowered("float32", mesh).as_text()


def test_each_matrix_is_summed_over_the_devices_in_the_dtype_asked_for():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    sums = re.compile(r"stablehlo.add across dimensions = \[0\] : \(tensor<4x(\d+x\d+)x(\w+)>")
    for dtype, short in (("float32", "f32"), ("bfloat16", "bf16")):
        found = sums.findall(_lowered(dtype, mesh).as_text())
        # Those of the blocks once, in the body of the layer loop.
        shapes = ["64x64"] * 4 + ["512x64", "64x256"] + ["264x64"] * 2
        assert sorted(found) == sorted((shape, short) for shape in shapes)


def test_matrices_are_gathered_as_they_lie_in_memory(steps):
    # A part of the columns would be transposed before it travels, and the whole after.
    gather = re.compile(r"= \w+\[([\d,]+)\](\{[\d,]+\}) all-gather\(.* dimensions=(\{\d\})")
    found = gather.findall(steps["float32"][0].as_text())
    matrices = {(shape, *rest) for shape, *rest in found if shape in {"64,256", "264,64", "64,64"}}
    assert matrices == {(s, "{1,0}", "{0}") for s in ("64,256", "264,64", "64,64")}


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize(
    ("mesh", "kind"),
    [(MeshConfig(data=2), "all-reduce"), (MeshConfig(data=1, fsdp=2), "reduce-scatter")],
)
def test_h100s_exchange_matrices_in_bfloat16_and_gather_trits(mesh, kind):
    where = topology.parse_topology("h100x2")
    if topology.missing_compiler(where):
        pytest.skip("its compiler is not installed: run `make aot`")
    devices = topology.make_devices(where, simulated=False)
    with topology.as_if_on(devices):
        text = _lowered("bfloat16", make_mesh(mesh, devices)).compile().as_text()
    moved = re.findall(r"= (.*) (all-reduce|reduce-scatter|all-gather)(?:-start)?\(", text)
    matrices = [
        (op, dtype) for types, op in moved for dtype in re.findall(r"(\w+)\[\d+,\d+", types)
    ]
    assert {dtype for op, dtype in matrices if op == kind} == {"bf16"}
    # The embedding's rows are gathered in the residual stream's dtype.
    gathered = {dtype for op, dtype in matrices if op == "all-gather"}
    assert gathered == ({"s8", "bf16"} if mesh.fsdp > 1 else set())
    if mesh.fsdp > 1:
        # Less than one array of the 100,288 / 2 float32 weights of a device, read and written;
        # split by columns, 1.6 of them.
        assert moved_within(text) < 2 * 4 * 100_288 / 2
