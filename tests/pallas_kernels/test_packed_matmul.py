"""Packed formats and the decode kernels against plain jnp, on odd shapes, integers exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.decode import fused_gpu, token_gpu
from mmfree_jax.pallas_kernels.norm_quant.api import norm_quant
from mmfree_jax.pallas_kernels.norm_quant.reference import rms_norm
from mmfree_jax.pallas_kernels.packed_matmul import pallas_gpu, reference, rows_gpu
from mmfree_jax.pallas_kernels.packed_matmul.api import packed_matmul
from mmfree_jax.pallas_kernels.packed_matmul.dot4 import quantize4
from mmfree_jax.pallas_kernels.packed_matmul.words import from_words, plane_columns, to_words

EPS, OUTER_EPS = 1e-6, 1e-5


def random_trits(rng, *shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.int8)


@pytest.mark.parametrize("bits", ["2", "1.6"])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 17, 20, 64, 101])
def test_unpack_inverts_pack(bits, columns):
    trits = random_trits(np.random.default_rng(columns), 2, 3, columns)
    packed = reference.pack(trits, bits=bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, 3, reference.packed_columns(columns, bits))
    np.testing.assert_array_equal(reference.unpack(packed, columns, bits=bits), trits)


def test_the_planar_layout_is_as_documented():
    trits = np.array([[-1, 0, 1, 1, 0, -1, 1, -1]], np.int8)
    packed = np.asarray(reference.pack(jnp.asarray(trits)))
    for k in range(2):
        digits = [int(packed[0, k]) >> (2 * j) & 3 for j in range(4)]
        assert digits == [int(trits[0, 2 * j + k]) + 1 for j in range(4)]


@pytest.mark.parametrize(
    ("implementation", "bits"),
    [("xla", "2"), ("xla", "1.6"), ("pallas_gpu", "2"), ("pallas_tpu", "2")],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 19, 45), (17, 70, 261)])
def test_packed_product_is_exact(implementation, bits, m, n, k):
    rng = np.random.default_rng(0)
    trits = random_trits(rng, n, k)
    x = jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    packed = reference.pack(trits, bits=bits)
    call = functools.partial(
        packed_matmul, bits=bits, implementation=implementation, interpret=True
    )
    found = jax.jit(call)(x, packed)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.asarray(x, np.int64) @ np.asarray(trits, np.int64).T)
    np.testing.assert_array_equal(found, reference.packed_matmul(x, packed, bits=bits))


def test_operands_that_do_not_fit_are_named():
    x, packed = jnp.ones((2, 20), jnp.int8), jnp.ones((3, 5), jnp.uint8)
    with pytest.raises(TypeError, match="int8"):
        packed_matmul(x.astype(jnp.int32), packed)
    with pytest.raises(ValueError, match=r"\[N, 5\]"):
        packed_matmul(x, packed[:, :4])
    with pytest.raises(ValueError, match="bits='3'"):
        packed_matmul(x, packed, bits="3")
    with pytest.raises(ValueError, match="implementation='cuda'"):
        packed_matmul(x, packed, implementation="cuda")
    with pytest.raises(ValueError, match="takes bits='2'"):
        packed_matmul(x, packed[:, :4], bits="1.6", implementation="pallas_gpu")


@pytest.mark.parametrize("columns", [16, 20, 22, 64, 96])
def test_words_hold_four_trits_side_by_side(columns):
    trits = random_trits(np.random.default_rng(columns), 5, columns)
    words = np.asarray(to_words(reference.pack(trits), columns))
    size = plane_columns(columns)
    assert words.shape == (5, size // 4)
    found = np.zeros((5, 4 * size), np.int8)
    for plane in range(4):
        for byte in range(4):
            code = (words >> (2 * plane + 8 * byte)) & 3
            found[:, plane * size + byte : (plane + 1) * size : 4] = code - 1
    np.testing.assert_array_equal(found[:, :columns], trits)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 45), (17, 70, 261), (32, 64, 256)])
def test_stacked_products_and_unpacking_are_exact(m, n, k):
    rng = np.random.default_rng(k)
    trits = random_trits(rng, 2, n, k)
    x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    stack, layer = from_words(to_words(reference.pack(trits), k)), jnp.int32(1)
    found = pallas_gpu.unpack(stack, layer, k, interpret=True)
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, trits[1])
    # Powers of two: scaling by them is exact.
    x_scale = jnp.asarray(2.0 ** rng.integers(-3, 3, (m, 1)), jnp.float32)
    w_scale = jnp.asarray([[[8.0]], [[0.25]]])
    found = pallas_gpu.scaled_matmul(
        x, x_scale, stack, w_scale, layer, out_dtype=jnp.float32, interpret=True
    )
    sums = np.asarray(x, np.int64) @ np.asarray(trits[1], np.int64).T
    np.testing.assert_array_equal(found, sums * np.asarray(x_scale) / 4)


@pytest.mark.parametrize("form", ["residual", "times_silu", "gated"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantised_rows_are_those_of_the_model(form, dtype):
    rng = np.random.default_rng(7)
    rows, columns = 5, 83
    x = f32(rng, rows, 2 * columns if form == "gated" else columns).astype(dtype)
    norms = [jnp.asarray(rng.uniform(0.5, 1.5, (3, columns)), jnp.float32) for _ in range(3)]
    outer = None if form == "gated" else norms[2]
    options = {"gated": True}
    if form != "gated":
        options = {form: f32(rng, rows, columns).astype(dtype)}
    layer = 1
    stream, qs, scales = jax.jit(
        lambda: rows_gpu.quantize(
            x, jnp.int32(layer), norms[:2], outer, eps=EPS, outer_eps=OUTER_EPS, interpret=True,
            **options,
        )
    )()  # fmt: skip
    want = jax.jit(
        lambda: norm_quant(
            x, tuple(n[layer] for n in norms[:2]), None if outer is None else outer[layer],
            eps=EPS, outer_eps=OUTER_EPS, implementation="xla", **options,
        )
    )()  # fmt: skip
    if form == "residual":
        np.testing.assert_array_equal(stream.astype(jnp.float32), want[0].astype(jnp.float32))
    for q, scale, want_q, want_scale in zip(qs, scales, want[1], want[2], strict=True):
        close(scale, want_scale)
        # Two orders of a float32 sum: an integer may differ where the value was at a boundary.
        off = np.asarray(q, np.int32) - np.asarray(want_q, np.int32)
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 0.01


def make_layer(rng, layers, outputs, columns, count):
    """Weights for the kernels, and the trits for the reference."""
    trits = [random_trits(rng, layers, outputs, columns) for _ in range(count)]
    scales = [jnp.asarray(rng.uniform(0.01, 0.05, (layers, 1, 1)), jnp.float32) for _ in trits]
    norms = [jnp.asarray(rng.uniform(0.5, 1.5, (layers, columns)), jnp.float32) for _ in trits]
    words = [to_words(reference.pack(t), columns) for t in trits]
    return fused_gpu.Layer(words, scales, norms), trits


def expected(x, weights, trits, layer, outer, dtype):
    @jax.jit
    def call(x, weights, trits, outer):
        return bitlinear_many(
            x,
            tuple(n[layer] for n in weights.norms),
            (None,) * len(trits),
            tuple(t[layer] for t in trits),
            tuple(s[layer] for s in weights.scales),
            eps=EPS,
            outer_norm_weight=None if outer is None else outer[layer],
            outer_eps=OUTER_EPS,
            out_dtype=dtype,
            implementation="xla_int8",
        )

    return call(x, weights, trits, outer)


def f32(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


SHAPES = [(1, 48, 1), (3, 22, 2)]
OPTIONS = {"eps": EPS, "interpret": True}
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_mixer_in(layers, width, batch, dtype):
    rng = np.random.default_rng(width)
    weights, trits = make_layer(rng, layers, width, width, 3)
    x, outer = f32(rng, batch, width).astype(dtype), f32(rng, layers, width)
    bound = jnp.asarray(rng.uniform(0, 1, (layers, width)), jnp.float32)
    h = f32(rng, layers, batch, width)
    layer = layers - 1
    i, f, g = expected(x, weights, trits, layer, outer, dtype)
    i, f = i.astype(jnp.float32), f.astype(jnp.float32)
    forget = bound[layer] + (1 - bound[layer]) * jax.nn.sigmoid(f)
    new = forget * h[layer] + (1 - forget) * jax.nn.silu(i)
    found_g, found_h = fused_gpu.mixer_in(
        x, jnp.array([layer]), outer, weights, bound, h, dtype=dtype, outer_eps=OUTER_EPS,
        **OPTIONS,
    )  # fmt: skip
    assert found_g.dtype == dtype
    # In bfloat16 one unit in the last place; the integers behind it are the same.
    rtol = 2e-5 if dtype == jnp.float32 else 1e-2
    close(found_g.astype(jnp.float32), g.astype(jnp.float32), rtol=rtol)
    close(found_h, new, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_mixer_out(layers, width, batch):
    rng = np.random.default_rng(width)
    weights, trits = make_layer(rng, layers, width, width, 1)
    g, h, gate = f32(rng, batch, width), f32(rng, batch, width), f32(rng, layers, width)
    residual, layer = f32(rng, batch, width), layers - 1
    gated = rms_norm(g, gate[layer], eps=OUTER_EPS) * jax.nn.silu(h)
    (update,) = expected(gated, weights, trits, layer, None, jnp.float32)
    found = fused_gpu.mixer_out(
        g, h, jnp.array([layer]), gate, weights, residual, dtype=jnp.float32,
        outer_eps=OUTER_EPS, **OPTIONS,
    )  # fmt: skip
    close(found, residual + update)


@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_glu(layers, width, batch):
    rng = np.random.default_rng(width)
    inner = width + 6
    weights, trits = make_layer(rng, layers, 2 * inner, width, 1)
    x, outer, layer = f32(rng, batch, width), f32(rng, layers, width), layers - 1
    (gate_up,) = expected(x, weights, trits, layer, outer, jnp.float32)
    z = jax.nn.silu(gate_up[:, :inner]) * gate_up[:, inner:]
    found = fused_gpu.glu_in(
        x, jnp.array([layer]), outer, weights, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS
    )
    close(found, z)
    weights, trits = make_layer(rng, layers, width, inner, 1)
    (update,) = expected(z, weights, trits, layer, None, jnp.float32)
    found = fused_gpu.glu_out(z, jnp.array([layer]), weights, x, dtype=jnp.float32, **OPTIONS)
    close(found, x + update)


def test_head_and_exact_integers():
    rng = np.random.default_rng(1)
    weights, trits = make_layer(rng, 1, 83, 40, 1)
    x, outer = f32(rng, 3, 40), jnp.ones((1, 40))
    (logits,) = expected(x, weights, trits, 0, outer, jnp.float32)
    found = fused_gpu.head(x, outer, weights, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS)
    close(found, logits)
    # With the scales divided out, what remains are the integers of the reference.
    unit = weights._replace(scales=[jnp.ones((1, 1, 1))], norms=[jnp.ones((1, 40))])
    q = jnp.asarray(rng.integers(-127, 128, (2, 40)), jnp.float32).at[:, 0].set(127)
    rms = jnp.sqrt(jnp.mean(q * q, axis=1))
    sums = fused_gpu.head(q, outer, unit, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS)
    integers = np.asarray(q, np.int64) @ np.asarray(trits[0][0], np.int64).T
    np.testing.assert_array_equal(np.rint(np.asarray(sums * rms[:, None])), integers)


def test_too_many_rows_and_wrong_words_are_refused():
    rng = np.random.default_rng(0)
    weights, _ = make_layer(rng, 1, 8, 16, 1)
    outer = jnp.ones((1, 16))
    call = functools.partial(
        fused_gpu.head, outer_norm=outer, weights=weights, dtype=jnp.float32,
        outer_eps=OUTER_EPS, **OPTIONS,
    )  # fmt: skip
    with pytest.raises(ValueError, match="at most 8"):
        call(jnp.ones((9, 16)))
    with pytest.raises(ValueError, match="words are"):
        call(jnp.ones((1, 40)))


def lower_for_cuda(function, *args):
    mesh = AbstractMesh(
        (1,),
        ("x",),
        axis_types=(AxisType.Explicit,),
        abstract_device=AbstractDevice(
            device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
        ),
    )
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(("width", "inner", "batch"), [(1024, 2816, 1), (2560, 6912, 4)])
def test_kernels_lower_for_cuda(width, inner, batch):
    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(outputs, columns, count):
        words = plane_columns(columns) // 4
        return fused_gpu.Layer(
            [shape(2, outputs, words, dtype=jnp.int32)] * count,
            [shape(2, 1, 1)] * count,
            [shape(2, columns, dtype=jnp.bfloat16)] * count,
        )

    x, index = shape(batch, width, dtype=jnp.bfloat16), shape(1, dtype=jnp.int32)
    norm, h = shape(2, width), shape(batch, width)
    options = {"eps": EPS, "dtype": jnp.bfloat16}
    norms = options | {"outer_eps": OUTER_EPS}
    cases = [
        (fused_gpu.mixer_in, norms, x, index, norm, layer(width, width, 3), norm,
         shape(2, batch, width)),
        (fused_gpu.mixer_out, norms, x, h, index, norm, layer(width, width, 1), x),
        (fused_gpu.glu_in, norms, x, index, norm, layer(2 * inner, width, 1)),
        (fused_gpu.glu_out, options, shape(batch, inner, dtype=jnp.bfloat16), index,
         layer(width, inner, 1), x),
    ]  # fmt: skip
    for function, keywords, *args in cases:
        lowered = lower_for_cuda(functools.partial(function, **keywords), *args)
        assert "triton" in lowered.as_text()


def whole_tokens(layers, width, inner, vocabulary, dtype, config, steps):
    """The kernel of whole tokens, and the shapes that it takes."""

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(outputs, columns, count=1, depth=layers):
        words = plane_columns(columns) // 4
        return fused_gpu.Layer(
            [shape(depth, outputs, words, dtype=jnp.int32)] * count,
            [shape(depth, 1, 1)] * count,
            [shape(depth, columns, dtype=dtype)] * count,
        )

    norm = shape(layers, width)
    model = token_gpu.Model(
        layer(width, width, 3), layer(width, width), layer(2 * inner, width),
        layer(width, inner), layer(vocabulary, width, depth=1), norm, norm, norm,
        shape(1, width), norm, shape(vocabulary, width, dtype=dtype),
    )  # fmt: skip
    call = functools.partial(
        token_gpu.decode_tokens, steps=steps, eps=EPS, outer_eps=OUTER_EPS, dtype=dtype,
        residual_dtype=dtype, config=config,
    )  # fmt: skip
    one = shape(1, dtype=jnp.int32)
    return call, (one, model, shape(layers, 1, width), shape(1, vocabulary), one, one)


@pytest.mark.parametrize(
    ("warps", "dtype", "steps"), [(1, jnp.bfloat16, 1), (4, jnp.float32, 1), (4, jnp.bfloat16, 8)]
)
def test_the_kernel_of_whole_tokens_lowers_for_cuda(warps, dtype, steps):
    config = token_gpu.Config(programs=132, warps=warps, tile=4, ahead=1, copies=2)
    call, (token, model, h, *rest) = whole_tokens(2, 256, 704, 4096, dtype, config, steps)
    text = lower_for_cuda(call, token, model, h, *rest).as_text()
    assert "triton" in text
    wrong = model._replace(glu_out=model.mixer_out)
    with pytest.raises(ValueError, match="glu_out has words"):
        lower_for_cuda(call, token, wrong, h, *rest)
    with pytest.raises(ValueError, match="one row"):
        lower_for_cuda(call, jax.ShapeDtypeStruct((2,), jnp.int32), model, h, *rest)
    odd, shapes = whole_tokens(2, 250, 704, 4096, dtype, config, steps)
    with pytest.raises(ValueError, match="250 columns"):
        lower_for_cuda(odd, *shapes)


def test_four_values_round_into_a_word():
    rng = np.random.default_rng(0)
    # Half of them lie halfway between two integers.
    xs = [jnp.asarray(rng.integers(-254, 255, 40) / 2, jnp.float32) for _ in range(4)]
    found = np.asarray(quantize4(xs, jnp.ones(40), emulate=True)).view(np.int8).reshape(40, 4)
    np.testing.assert_array_equal(found, np.rint(np.stack(xs, 1)))


@pytest.mark.parametrize(("m", "n", "k"), [(128, 5120, 2560), (33, 45, 131)])
def test_the_product_lowers_for_its_devices(m, n, k):
    operands = (
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((n, reference.packed_columns(k)), jnp.uint8),
    )
    call = functools.partial(packed_matmul, implementation="pallas_gpu")
    assert "triton" in lower_for_cuda(call, *operands).as_text()
    call = jax.jit(functools.partial(packed_matmul, implementation="pallas_tpu"))
    lowered = call.trace(*operands).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
