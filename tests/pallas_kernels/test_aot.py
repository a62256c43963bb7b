"""Compiles the kernels for a TPU v5e and an H100 that are not here, at real models' shapes.

Lowering alone misses what only the device's compiler knows: tiles that do not fit its fast
memory, unaligned slices, operations it lacks. `make aot` installs the two compilers (3 GB) and
runs this; without them the tests skip.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.decode import token_gpu
from mmfree_jax.pallas_kernels.decode.api import Arithmetic, Cut, Linears, Model
from mmfree_jax.pallas_kernels.packed_matmul import pallas_gpu as packed_gpu
from mmfree_jax.pallas_kernels.packed_matmul import pallas_tpu as packed_tpu
from mmfree_jax.pallas_kernels.packed_matmul.words import plane_columns
from mmfree_jax.pallas_kernels.recurrence import pallas_gpu, pallas_tpu
from mmfree_jax.pallas_kernels.ternary_matmul import pallas_mosaic_gpu
from mmfree_jax.pallas_kernels.ternary_matmul.api import (
    mosaic_config,
    mosaic_gated_config,
    ternarize,
)

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:The Pallas Triton")]

# What XLA asks a device about itself, as an H100 SXM answers.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def _topology(platform):
    from jax.experimental import topologies

    if platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            pytest.skip("libtpu is not installed: run `make aot`")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("JAX's CUDA plugin is not installed: run `make aot`")
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=_H100, topology="1x1x1"
    )


@functools.cache
def _mesh(platform):
    devices = np.array(_topology(platform).devices[:1])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def compile_for(platform, function, *shapes):
    """Compiles the function for one device of the platform."""
    mesh = _mesh(platform)
    # Inside shard_map the kernels' lowering rules see which device they are for.
    local = jax.shard_map(
        function, mesh=mesh, in_specs=(P(),) * len(shapes), out_specs=P(), check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
        for shape, dtype in shapes
    ]
    return jax.jit(local).trace(*arguments).lower().compile()


def marks(platform):
    return {"tpu": "tpu_custom_call", "cuda": "custom-call"}[platform]


@pytest.mark.parametrize(
    ("platform", "implementation"), [("tpu", "pallas_tpu"), ("cuda", "pallas_mosaic_gpu")]
)
@pytest.mark.parametrize(
    ("k", "widths", "form", "backward"),
    [
        (1024, (1024, 1024, 1024), "outer", "bf16"),
        (2560, (13824,), "outer", "bf16"),
        (2560, (2560,), "times_silu", "bf16"),
        (6912, (2560,), "gated", "bf16"),
        (2048, (2048, 2048, 2048), "outer", "int8"),
        (5632, (2048,), "gated", "int8"),
        (2048, (11264,), "outer", "int8_dx"),
    ],
)
def test_a_layer_and_its_gradients(platform, implementation, k, widths, form, backward):
    def loss(x, a, norms, ws):
        trits, scales = zip(*(ternarize(jax.lax.stop_gradient(w)) for w in ws), strict=True)
        options = {"outer": {"outer_norm_weight": a}, "gated": {"gated": True}}.get(form)
        if options is None:
            options = {"outer_norm_weight": a, "times_silu": x * 2}
        ys = bitlinear_many(
            x,
            norms,
            ws,
            trits,
            scales,
            eps=1e-6,
            implementation=implementation,
            backward=backward,
            **options,
        )
        return sum(jnp.sum(y.astype(jnp.float32) ** 2) for y in ys)

    def step(x, a, *ws):
        return jax.value_and_grad(loss, (0, 2, 3))(x, a, (a,) * len(ws), ws)

    wide = 2 * k if form == "gated" else k
    compiled = compile_for(
        platform, step, ((2, 1024, wide), jnp.bfloat16), ((k,), jnp.float32),
        *[((n, k), jnp.float32) for n in widths],
    )  # fmt: skip
    assert marks(platform) in compiled.as_text()


@pytest.mark.parametrize(
    ("n", "k", "gated"),
    [
        (1024, 1024, False),
        (2560, 2560, False),
        (2560, 6912, False),
        (2816, 1024, True),
        (6912, 2560, True),
    ],
)
def test_products_of_a_prompt(n, k, gated):
    m = 2048
    config = (mosaic_gated_config if gated else mosaic_config)(m, n, k)
    call = functools.partial(
        pallas_mosaic_gpu.ternary_matmul, out_dtype=jnp.bfloat16, config=config,
        multiprocessors=132, gated=gated,
    )  # fmt: skip
    compiled = compile_for(
        "cuda", call, ((m, k), jnp.int8), ((m,), jnp.float32),
        ((2 * n if gated else n, k), jnp.int8), ((1,), jnp.float32),
    )  # fmt: skip
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(
    ("width", "glu", "warps", "copies"), [(1024, 2816, 2, 4), (5120, 13824, 8, 1)]
)
def test_a_whole_token(width, glu, warps, copies):
    layers, vocabulary = 2, 32000

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(rows, columns, count=1, depth=layers):
        return Linears(
            (shape(depth, rows, plane_columns(columns) // 4, dtype=jnp.int32),) * count,
            (shape(depth, 1, 1, dtype=jnp.float32),) * count,
            (shape(depth, columns),) * count,
        )

    norm, state = shape(layers, width), shape(layers, 1, width, dtype=jnp.float32)
    model = Model(
        layer(width, width, 3), layer(width, width), layer(2 * glu, width), layer(width, glu),
        layer(vocabulary, width, depth=1), norm, norm, norm, shape(1, width),
        shape(layers, width, dtype=jnp.float32), shape(vocabulary, width),
    )  # fmt: skip
    one = shape(1, dtype=jnp.int32)
    logits = shape(1, vocabulary, dtype=jnp.float32)
    leaves, tree = jax.tree.flatten((one, model, state, logits, one, one))
    cut = Cut(programs=132, warps=warps, ahead=1, copies=copies)

    def call(*leaves):
        return token_gpu.decode_tokens(
            *jax.tree.unflatten(tree, leaves), steps=8, cut=cut,
            arithmetic=Arithmetic(1e-6, 1e-6, jnp.dtype("bfloat16"), jnp.dtype("bfloat16")),
        )  # fmt: skip

    compiled = compile_for("cuda", call, *[(leaf.shape, leaf.dtype) for leaf in leaves])
    assert marks("cuda") in compiled.as_text()


@pytest.mark.parametrize(("platform", "module"), [("tpu", pallas_tpu), ("cuda", pallas_gpu)])
@pytest.mark.parametrize("channels", [1024, 2560])
def test_the_recurrence_and_its_gradients(platform, module, channels):
    wide = ((2, 2048, channels), jnp.bfloat16)
    state, lane = ((2, channels), jnp.float32), ((channels,), jnp.float32)
    reset = ((2, 2048), jnp.bool_)
    forward = compile_for(platform, module.mlgru_forward, wide, wide, lane, reset, state)
    backward = compile_for(
        platform, module.mlgru_backward, wide, wide, lane, wide, reset, state, wide, state
    )
    for compiled in (forward, backward):
        assert marks(platform) in compiled.as_text()


@pytest.mark.parametrize(("platform", "module"), [("tpu", packed_tpu), ("cuda", packed_gpu)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 1024), (128, 2560, 6912)])
def test_the_packed_product(platform, module, m, n, k):
    compiled = compile_for(
        platform, module.packed_matmul, ((m, k), jnp.int8), ((n, k // 4), jnp.uint8)
    )
    assert marks(platform) in compiled.as_text()
