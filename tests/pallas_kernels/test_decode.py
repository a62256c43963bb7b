"""The decode op: its kernels against the oracle, the choice between them, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.decode import api, device, reference, token_gpu
from mmfree_jax.pallas_kernels.decode.api import Arithmetic, Cut, Linears, Model
from mmfree_jax.pallas_kernels.decode.dot4 import quantize4
from mmfree_jax.pallas_kernels.packed_matmul.words import plane_columns

EPS, OUTER_EPS = 1e-6, 1e-5
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def arithmetic(dtype=jnp.float32):
    return Arithmetic(EPS, OUTER_EPS, jnp.dtype(dtype), jnp.dtype(dtype))


# Widths that neither 4 nor 16 divides; three programs share them unevenly, in tiles that overhang.
SIZES = (2, 38, 38, 47, 61)
CUT = Cut(programs=3, warps=2, tile=2, depth=2, copies=2)


@pytest.mark.parametrize(
    ("implementation", "rows"),
    [("pallas_fused_gpu", 3), pytest.param("pallas_token_gpu", 1, marks=pytest.mark.slow)],
)
def test_the_kernels_read_tokens_as_the_oracle_does(implementation, rows, random_model):
    model = random_model(*SIZES)
    call = jax.jit(
        functools.partial(
            api.decode_token, arithmetic=arithmetic(), implementation=implementation, cut=CUT,
            interpret=True,
        )
    )  # fmt: skip
    oracle = jax.jit(functools.partial(reference.decode_token, arithmetic=arithmetic()))
    h = want_h = jnp.zeros((2, rows, 38))
    none = jnp.zeros(rows, bool)  # held, from the start: one compilation
    for token in ([5, 9, 5], [0, 60, 7], [33, 1, 2]):
        token = jnp.asarray(token[:rows], jnp.int32)
        logits, h = call(model, token, h, none)
        want, want_h = oracle(model, token, want_h)
        assert float(jnp.std(want)) > 0.1
        close(logits, want)
        close(h, want_h)
    held = jnp.asarray([True, False, True][:rows])
    _, kept = call(model, token, h, held)
    np.testing.assert_array_equal(kept[:, 0], h[:, 0])
    assert rows == 1 or (kept[:, 1] != h[:, 1]).any()


def test_the_oracle_is_the_equations_in_float64(random_model):
    """Written out by hand, from the trits, for one layer and one row."""
    model = random_model(1, 6, 6, 5, 9)
    f64 = functools.partial(np.asarray, dtype=np.float64)

    def trits(words, columns):
        size = plane_columns(columns)
        out = np.zeros((words.shape[0], 4 * size))
        for plane in range(4):
            for byte in range(4):
                code = (np.asarray(words) >> (2 * plane + 8 * byte)) & 3
                out[:, plane * size + byte : (plane + 1) * size : 4] = code - 1
        return out[:, :columns]

    def norm(x, weight, eps):
        return x / np.sqrt(np.mean(x * x) + eps) * f64(weight)

    def linear(linears, i, x):
        y = norm(x, linears.norms[i][0], EPS)
        absmax = max(np.abs(y).max(), 1e-5)
        q = np.clip(np.rint(y * 127 / absmax), -128, 127)
        scale = absmax / 127 * float(linears.scales[i][0, 0, 0])
        return trits(linears.words[i][0], x.size) @ q * scale

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x, h0 = f64(model.embedding[3]), np.linspace(-1, 1, 6)
    y = norm(x, model.mixer_norm[0], OUTER_EPS)
    i, f, g = (linear(model.mixer_in, number, y) for number in range(3))
    bound = f64(model.lower_bound[0])
    f = bound + (1 - bound) * sigmoid(f)
    h = f * h0 + i * sigmoid(i) * (1 - f)
    x = x + linear(model.mixer_out, 0, norm(g, model.gate_norm[0], OUTER_EPS) * h * sigmoid(h))
    gate, up = np.split(linear(model.glu_in, 0, norm(x, model.glu_norm[0], OUTER_EPS)), 2)
    x = x + linear(model.glu_out, 0, gate * sigmoid(gate) * up)
    want = linear(model.head, 0, norm(x, model.final_norm[0], OUTER_EPS))
    logits, found_h = reference.decode_token(
        model, jnp.array([3]), jnp.asarray(h0, jnp.float32)[None, None], arithmetic=arithmetic()
    )
    close(found_h[0, 0], h)
    close(logits[0], want)


@pytest.mark.slow
def test_tokens_chosen_in_the_kernel_are_the_oracles(random_model):
    model = random_model(*SIZES)
    options = {"arithmetic": arithmetic(), "steps": 4}
    cut = dataclasses.replace(CUT, warps=4, tile=8, depth=1)
    kernel = jax.jit(
        functools.partial(
            api.decode_greedy, implementation="pallas_token_gpu", cut=cut, interpret=True, **options
        )
    )
    oracle = jax.jit(functools.partial(api.decode_greedy, implementation="xla", **options))
    start, h = jax.random.normal(jax.random.key(2), (1, 61)), jnp.zeros((2, 1, 38))
    whole = oracle(model, h, start, jnp.array([4]), jnp.array([-1, -1]))[0].tolist()
    assert len(set(whole)) > 2
    for limit, stop in ((4, -1), (4, whole[2]), (2, -1), (0, -1)):
        arguments = (model, h, start, jnp.array([limit]), jnp.array([-1, stop]))
        found, want = kernel(*arguments), oracle(*arguments)
        assert found[0].tolist() == want[0].tolist()
        expected = whole[: min(limit, whole.index(stop) if stop in whole else 4)]
        assert want[0].tolist() == expected + [-1] * (4 - len(expected))
        close(found[1], want[1])
        close(found[2], want[2])


def test_unknown_names_and_too_many_rows_are_refused(random_model):
    model = random_model(*SIZES)
    h, logits, one = jnp.zeros((2, 9, 38)), jnp.zeros((1, 61)), jnp.ones(1, jnp.int32)
    options = {"arithmetic": arithmetic(), "interpret": True}
    token = jnp.zeros(9, jnp.int32)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        api.decode_token(model, token, h, implementation="cuda", **options)
    with pytest.raises(ValueError, match="at most 8"):
        api.decode_token(model, token, h, implementation="pallas_fused_gpu", **options)
    with pytest.raises(ValueError, match="one row"):
        api.decode_token(
            model, token[:2], h[:, :2], implementation="pallas_token_gpu", cut=CUT, **options
        )
    with pytest.raises(ValueError, match="implementation='pallas_fused_gpu'"):
        api.decode_greedy(
            model, h[:, :1], logits, one, one, steps=2, implementation="pallas_fused_gpu", **options
        )


def best(rows, width=1024, state_size=1024, glu_size=2816):
    return api.measured_best(rows, width=width, state_size=state_size, glu_size=glu_size)


def test_the_form_follows_the_device_the_rows_and_the_width(monkeypatch):
    assert best(1) is None, "there is no GPU"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device, "multiprocessors", lambda: 132)
    assert best(1) == "pallas_token_gpu"
    assert best(1, glu_size=2815) == "pallas_fused_gpu", "16 does not divide it"
    found = []
    for width in (38, 1024, 1025, 2048, 2560, 5120):
        found.append(max(n for n in range(1, 9) if best(n, width) is not None))
    assert found == [4, 4, 3, 3, 2, 2]
    in_turn = functools.partial(api.greedy_rows, state_size=1024, glu_size=2816)
    assert [in_turn(width=width) for width in (38, 1024, 1025, 2560)] == [2, 2, 3, 3]
    assert api.greedy_rows(width=1024, state_size=1024, glu_size=2815) == 0
    monkeypatch.setenv(api.KERNELS_VARIABLE, "layers")
    assert best(1) == "pallas_fused_gpu"
    assert in_turn(width=1024) == 0
    monkeypatch.delenv(api.KERNELS_VARIABLE)
    monkeypatch.setattr(device, "multiprocessors", lambda: 63)
    assert best(1) == "pallas_fused_gpu"


def test_every_width_has_a_cut(monkeypatch):
    monkeypatch.setattr(device, "multiprocessors", lambda: 132)
    assert device.measured_cut(64).ahead == 0, "no instruction for it on this device"
    monkeypatch.setattr(device, "prefetches", lambda: True)
    assert device.measured_cut(64).ahead > 0
    for width in (64, 1024, 1300, 4096, 9000):
        found = device.measured_cut(width)
        assert found.programs % 132 == 0
        assert found.warps in (1, 2, 4, 8, 16)
        # All programs must be able to run at once: their registers are at most 255 a thread.
        assert found.programs // 132 * found.warps * 32 * 256 <= 65536
    assert device.measured_cut(5120) == device.measured_cut(7000)


def whole_tokens(layers, width, inner, vocabulary, dtype, cut, steps):
    """The kernel of whole tokens, and the shapes that it takes."""

    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(outputs, columns, count=1, depth=layers):
        words = plane_columns(columns) // 4
        return Linears(
            (shape(depth, outputs, words, dtype=jnp.int32),) * count,
            (shape(depth, 1, 1),) * count,
            (shape(depth, columns, dtype=dtype),) * count,
        )

    norm = shape(layers, width)
    model = Model(
        layer(width, width, 3), layer(width, width), layer(2 * inner, width),
        layer(width, inner), layer(vocabulary, width, depth=1), norm, norm, norm,
        shape(1, width), norm, shape(vocabulary, width, dtype=dtype),
    )  # fmt: skip
    call = functools.partial(
        token_gpu.decode_tokens, steps=steps, arithmetic=arithmetic(dtype), cut=cut
    )
    one = shape(1, dtype=jnp.int32)
    return call, (one, model, shape(layers, 1, width), shape(1, vocabulary), one, one)


@pytest.mark.parametrize(
    ("warps", "dtype", "steps"), [(1, jnp.bfloat16, 1), (4, jnp.float32, 1), (4, jnp.bfloat16, 8)]
)
def test_the_kernel_of_whole_tokens_lowers_for_cuda(warps, dtype, steps, lower_for_cuda):
    cut = Cut(programs=132, warps=warps, tile=4, ahead=1, copies=2)
    call, (token, model, h, *rest) = whole_tokens(2, 256, 704, 4096, dtype, cut, steps)
    text = lower_for_cuda(call, token, model, h, *rest).as_text()
    assert "triton" in text
    wrong = dataclasses.replace(model, glu_out=model.mixer_out)
    with pytest.raises(ValueError, match="glu_out has words"):
        lower_for_cuda(call, token, wrong, h, *rest)
    with pytest.raises(ValueError, match="one row"):
        lower_for_cuda(call, jax.ShapeDtypeStruct((2,), jnp.int32), model, h, *rest)
    odd, shapes = whole_tokens(2, 250, 704, 4096, dtype, cut, steps)
    with pytest.raises(ValueError, match="250 columns"):
        lower_for_cuda(odd, *shapes)


def test_four_values_round_into_a_word():
    rng = np.random.default_rng(0)
    # Half of them lie halfway between two integers.
    xs = [jnp.asarray(rng.integers(-254, 255, 40) / 2, jnp.float32) for _ in range(4)]
    found = np.asarray(quantize4(xs, jnp.ones(40), emulate=True)).view(np.int8).reshape(40, 4)
    np.testing.assert_array_equal(found, np.rint(np.stack(xs, 1)))
