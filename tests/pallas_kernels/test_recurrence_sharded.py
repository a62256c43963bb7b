"""The recurrence on a mesh of simulated devices, and its lowering for cuda and tpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.pallas_kernels.recurrence import pallas_gpu, pallas_tpu, walked_gpu
from mmfree_jax.pallas_kernels.recurrence.api import linear_recurrence, mlgru_recurrence

B, T, D = 4, 24, 6


def make_mesh(names_and_sizes):
    sizes = tuple(names_and_sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, tuple(names_and_sizes), axis_types=(AxisType.Auto,) * len(sizes))


def make_primals(optional):
    rng = np.random.default_rng(5)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    primals = {"i": array(B, T, D), "f": array(B, T, D)}
    reset = None
    if optional:
        primals |= {"h0": array(B, D), "bound": jnp.abs(array(D)) % 0.9}
        reset = jnp.asarray(rng.random((B, T)) < 0.1)
    return primals, reset, (array(B, T, D), array(B, D))


def run(op, primals, reset, cotangents, **options):
    def apply(p):
        optional = {"reset_BT": reset, "h0_BD": p.get("h0")}
        if op == "mlgru":
            return mlgru_recurrence(p["i"], p["f"], p.get("bound"), **optional, **options)
        return linear_recurrence(jax.nn.sigmoid(p["f"]), p["i"], **optional, **options)

    outputs, pullback = jax.vjp(apply, primals)
    return outputs, pullback(cotangents)[0]


@pytest.mark.parametrize("op", ["linear", "mlgru"])
@pytest.mark.parametrize(
    ("axes", "partition", "optional"),
    [
        ({"data": 2, "model": 3}, P("data", None, "model"), True),
        ({"time": 4}, P(None, "time"), False),
        ({"data": 2, "time": 4}, P("data", "time"), True),
        ({"a": 2, "b": 2, "model": 2}, P(None, ("a", "b"), "model"), True),
    ],
)
def test_sharded_equals_unsharded(op, axes, partition, optional):
    mesh = make_mesh(axes)
    primals, reset, cotangents = make_primals(optional)
    want = jax.jit(lambda *a: run(op, *a))(primals, reset, cotangents)
    sharded = jax.jit(lambda *a: run(op, *a, mesh=mesh, partition=partition))
    got = sharded(primals, reset, cotangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_batch_and_channel_axes_need_no_collective():
    """Only the lower bound's gradient crosses devices, as one all-reduce."""
    mesh = make_mesh({"data": 2, "model": 3})
    partition = P("data", None, "model")
    primals, reset, cotangents = make_primals(True)
    whole, state = NamedSharding(mesh, partition), NamedSharding(mesh, P("data", "model"))
    placed = {
        "i": jax.device_put(primals["i"], whole),
        "f": jax.device_put(primals["f"], whole),
        "h0": jax.device_put(primals["h0"], state),
        "bound": jax.device_put(primals["bound"], NamedSharding(mesh, P("model"))),
    }
    reset = jax.device_put(reset, NamedSharding(mesh, P("data")))
    cotangents = (jax.device_put(cotangents[0], whole), jax.device_put(cotangents[1], state))
    for op, all_reduces in (("linear", 0), ("mlgru", 1)):
        step = jax.jit(lambda *a, op=op: run(op, *a, mesh=mesh, partition=partition))
        text = step.lower(placed, reset, cotangents).compile().as_text()
        assert text.count(" all-reduce(") == all_reduces
        for collective in (" all-gather(", " all-to-all(", " collective-permute("):
            assert collective not in text


def test_the_mesh_in_context_serves_too():
    primals, reset, cotangents = make_primals(True)
    want = jax.jit(lambda *a: run("mlgru", *a))(primals, reset, cotangents)
    with jax.set_mesh(make_mesh({"data": 2, "time": 4})):
        step = jax.jit(lambda *a: run("mlgru", *a, partition=P("data", "time")))
        got = step(primals, reset, cotangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_uneven_partition_is_named():
    mesh = make_mesh({"time": 7})
    primals, *_ = make_primals(False)
    with pytest.raises(ValueError, match="unevenly"):
        linear_recurrence(primals["f"], primals["i"], mesh=mesh, partition=P(None, "time"))


def kernel_cases(module, gpu):
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    bf16 = jax.ShapeDtypeStruct((2, 100, 192), jnp.bfloat16)
    reset, state, lane = jax.ShapeDtypeStruct((2, 100), jnp.bool_), f32(2, 192), f32(192)
    config = walked_gpu.Config(unroll=8) if gpu else pallas_tpu.Config(64, 128)
    options = {"config": config}
    return [
        (module.forward, (bf16, bf16, reset, state), options),
        (module.backward, (bf16, bf16, reset, state, bf16, state), options),
        (module.mlgru_forward, (bf16, bf16, lane, reset, state), options),
        (module.mlgru_backward, (bf16, bf16, lane, bf16, reset, state, bf16, state), options),
    ]


def lower(function, arguments, options, platform):
    call = jax.jit(lambda *a: function(*a, **options))
    return call.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def test_kernels_lower_for_cuda_without_a_gpu():
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=h100)
    with jax.sharding.use_abstract_mesh(mesh):
        for case in kernel_cases(pallas_gpu, True):
            assert "mosaic_gpu" in lower(*case, "cuda")


def test_kernels_lower_for_tpu_without_a_tpu():
    for case in kernel_cases(pallas_tpu, False):
        assert "tpu_custom_call" in lower(*case, "tpu")
