"""Compiles the kernels for a TPU v5e and GPUs that are not here, at real models' shapes.

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
from mmfree_jax.pallas_kernels.cross_entropy.pallas_gpu import softmax_rows
from mmfree_jax.pallas_kernels.decode import fused_gpu, token_gpu
from mmfree_jax.pallas_kernels.decode.api import Arithmetic, Cut, Linears, Model
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.norm_quant.xla import Statistics
from mmfree_jax.pallas_kernels.packed_matmul import pallas_gpu as packed_gpu
from mmfree_jax.pallas_kernels.packed_matmul import pallas_tpu as packed_tpu
from mmfree_jax.pallas_kernels.packed_matmul.api import quantize_rows
from mmfree_jax.pallas_kernels.packed_matmul.words import plane_columns
from mmfree_jax.pallas_kernels.recurrence import pallas_gpu, pallas_tpu
from mmfree_jax.pallas_kernels.ternary_matmul import pallas_mosaic_gpu
from mmfree_jax.pallas_kernels.ternary_matmul.api import (
    mosaic_config,
    mosaic_gated_config,
    ternarize,
)

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore:The Pallas Triton")]

# What XLA asks a GPU about itself: name, compute capability, multiprocessors, threads and bytes of
# shared memory of each, and bytes that a block may take (CUDA's tables of compute capabilities).
_CARDS = {
    "a100": ("NVIDIA A100-SXM4-80GB", "8.0", 108, 2048, 167936, 166912),
    "l4": ("NVIDIA L4", "8.9", 58, 1536, 102400, 101376),
    "h100": ("NVIDIA H100 80GB HBM3", "9.0", 132, 2048, 233472, 232448),
    "b200": ("NVIDIA B200", "10.0", 148, 2048, 233472, 232448),
}


def _target(card):
    name, capability, multiprocessors, threads, shared, of_a_block = _CARDS[card]
    major, minor = capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} threads_per_core_limit: {threads}
  core_count: {multiprocessors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: {of_a_block}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""


def _topology(platform, card):
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
        platform="cuda", topology_name="", target_config=_target(card), topology="1x1x1"
    )


@functools.cache
def _mesh(platform, card):
    devices = np.array(_topology(platform, card).devices[:1])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def compile_for(platform, function, *shapes, card="h100"):
    """Compiles the function for one device of the platform."""
    mesh = _mesh(platform, card)
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


def whole_model(width, glu, layers=2, vocabulary=32000):
    """The shapes of a packed model's weights, and how to make one."""

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(rows, columns, count=1, depth=layers):
        return Linears(
            (shape(depth, rows, plane_columns(columns) // 4, dtype=jnp.int32),) * count,
            (shape(depth, 1, 1, dtype=jnp.float32),) * count,
            (shape(depth, columns),) * count,
        )

    norm = shape(layers, width)
    return shape, Model(
        layer(width, width, 3), layer(width, width), layer(2 * glu, width), layer(width, glu),
        layer(vocabulary, width, depth=1), norm, norm, norm, shape(1, width),
        shape(layers, width, dtype=jnp.float32), shape(vocabulary, width),
    )  # fmt: skip


ARITHMETIC = Arithmetic(1e-6, 1e-6, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))


def compile_whole_token(width, glu, cut, card):
    shape, model = whole_model(width, glu)
    one = shape(1, dtype=jnp.int32)
    state, logits = shape(2, 1, width, dtype=jnp.float32), shape(1, 32000, dtype=jnp.float32)
    leaves, tree = jax.tree.flatten((one, model, state, logits, one, one))

    def call(*leaves):
        return token_gpu.decode_tokens(
            *jax.tree.unflatten(tree, leaves), steps=8, cut=cut, arithmetic=ARITHMETIC
        )

    return compile_for("cuda", call, *[(leaf.shape, leaf.dtype) for leaf in leaves], card=card)


@pytest.mark.parametrize(
    ("width", "glu", "warps", "copies"), [(1024, 2816, 2, 4), (5120, 13824, 8, 1)]
)
def test_a_whole_token(width, glu, warps, copies):
    cut = Cut(programs=132, warps=warps, ahead=1, copies=copies)
    assert marks("cuda") in compile_whole_token(width, glu, cut, "h100").as_text()


def _packed(card):
    call = functools.partial(quantize_rows, eps=1e-6, outer_eps=1e-6)
    stack, rows = ((2, 1024), jnp.bfloat16), ((64, 1024), jnp.bfloat16)
    compile_for("cuda", lambda x, i, n: call(x, i, [n], n), rows, ((), jnp.int32), stack, card=card)
    return compile_for(
        "cuda", packed_gpu.packed_matmul, ((512, 1024), jnp.int8), ((1024, 256), jnp.uint8),
        card=card,
    )  # fmt: skip


def _few_rows(card):
    shape, model = whole_model(1024, 2816)
    rows = shape(8, dtype=jnp.int32), shape(2, 8, 1024, dtype=jnp.float32)
    leaves, tree = jax.tree.flatten((model, *rows))

    def call(*leaves):
        return fused_gpu.decode_token(*jax.tree.unflatten(tree, leaves), arithmetic=ARITHMETIC)

    return compile_for("cuda", call, *[(leaf.shape, leaf.dtype) for leaf in leaves], card=card)


def _one_row(card):
    ahead = int(float(_CARDS[card][1]) >= 9)  # as `decode.device.measured_cut` has it
    cut = Cut(programs=_CARDS[card][2], warps=2, ahead=ahead, copies=4)
    return compile_whole_token(1024, 2816, cut, card)


@pytest.mark.parametrize("card", [card for card in _CARDS if card != "h100"])
@pytest.mark.parametrize("compiled", [_packed, _few_rows, _one_row])
def test_other_cards(compiled, card):
    assert marks("cuda") in compiled(card).as_text()


@pytest.mark.parametrize("channels", [1024, 2560])
def test_the_recurrence_and_its_gradients_on_a_tpu(channels):
    wide = ((2, 2048, channels), jnp.bfloat16)
    state, lane = ((2, channels), jnp.float32), ((channels,), jnp.float32)
    reset = ((2, 2048), jnp.bool_)
    forward = compile_for("tpu", pallas_tpu.mlgru_forward, wide, wide, lane, reset, state)
    backward = compile_for(
        "tpu", pallas_tpu.mlgru_backward, wide, wide, lane, wide, reset, state, wide, state
    )
    for compiled in (forward, backward):
        assert marks("tpu") in compiled.as_text()


@pytest.mark.parametrize(
    ("k", "count", "form"),
    [
        (1024, 3, "residual"),
        (2048, 1, "times_silu"),
        (2560, 3, "residual"),
        (2816, 1, "gated"),
        (6912, 1, "gated"),
    ],
)
def test_the_norms_by_mosaic_gpu(k, count, form):
    gated = form == "gated"

    def both(x, beside, b, a, g, scalar):
        options = {"eps": 1e-6, "implementation": "pallas_gpu"}
        weights, outer = (b,) * count, None if gated else a
        times = {"gated": gated, "times_silu": beside if form == "times_silu" else None}
        added = beside if form == "residual" else None
        stats = Statistics(None if gated else scalar, scalar, (scalar,) * count)
        return (
            norm_quant.norm_quant(x, weights, outer, residual=added, **times, **options),
            norm_quant.norm_backward(
                x, weights, outer, stats, (g,) * count, (jnp.ones((1, 1)),) * count,
                d_skip=added, **times, **options,
            ),
        )  # fmt: skip

    rows, vector = ((16384, k), jnp.bfloat16), ((k,), jnp.float32)
    x = ((16384, 2 * k), jnp.bfloat16) if gated else rows
    compiled = compile_for("cuda", both, x, rows, vector, vector, rows, ((16384, 1), jnp.float32))
    assert compiled.as_text().count("mosaic_gpu") >= 2


@pytest.mark.parametrize("width", [1024, 2560])
@pytest.mark.parametrize("resets", [False, True])
def test_the_recurrence_by_mosaic_gpu(width, resets):
    wide, lane = ((8, 2048, width), jnp.bfloat16), ((width,), jnp.float32)
    state, reset = ((8, width), jnp.float32), ((8, 2048), jnp.bool_)

    def forward(i, f, bound, reset, h0):
        return pallas_gpu.mlgru_forward(i, f, bound, reset if resets else None, h0)

    def backward(i, f, bound, h, reset, h0, dh, dh_last):
        given = reset if resets else None
        return pallas_gpu.mlgru_backward(i, f, bound, h, given, h0, dh, dh_last)

    shapes = (wide, wide, lane, wide, reset, state, wide, state)
    for compiled in (
        compile_for("cuda", forward, wide, wide, lane, reset, state),
        compile_for("cuda", backward, *shapes),
    ):
        assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (256, 16), (256, 96)])
def test_the_recurrence_of_short_rows_by_mosaic_gpu(rows, tokens):
    wide, held = ((rows, tokens, 640), jnp.bfloat16), ((rows, tokens), jnp.bool_)

    def forward(i, f, bound, h0, held):
        return pallas_gpu.mlgru_forward(i, f, bound, None, h0, held_BT=held)

    lane, state = ((640,), jnp.float32), ((rows, 640), jnp.float32)
    compiled = compile_for("cuda", forward, wide, wide, lane, state, held)
    assert "mosaic_gpu" in compiled.as_text()


def test_rows_of_logits_by_mosaic_gpu():
    compiled = compile_for(
        "cuda",
        lambda x, t: softmax_rows(x, t, 1e-4, jnp.bfloat16),
        ((2048, 32000), jnp.float32), ((2048,), jnp.int32),
    )  # fmt: skip
    assert "mosaic_gpu" in compiled.as_text()


@pytest.mark.parametrize(("platform", "module"), [("tpu", packed_tpu), ("cuda", packed_gpu)])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1024, 1024), (128, 2560, 6912)])
def test_the_packed_product(platform, module, m, n, k):
    compiled = compile_for(
        platform, module.packed_matmul, ((m, k), jnp.int8), ((n, k // 4), jnp.uint8)
    )
    assert marks(platform) in compiled.as_text()
