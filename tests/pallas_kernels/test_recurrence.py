"""The linear recurrence against a float64 oracle: values, final state and every gradient."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels.recurrence import (
    api,
    pallas_gpu,
    pallas_tpu,
    reference,
    walked_gpu,
    xla,
)
from mmfree_jax.pallas_kernels.recurrence.api import linear_recurrence, mlgru_recurrence

STEPS = ("forward", "backward", "mlgru_forward", "mlgru_backward")


def interpreted(module, config):
    """The kernels of `module` as an implementation that runs anywhere."""
    return types.SimpleNamespace(
        **{
            name: functools.partial(getattr(module, name), config=config, interpret=True)
            for name in STEPS
        },
        TAKES_HELD=getattr(module, "TAKES_HELD", False),
    )


# Small cuts, so that tiny inputs still have several chunks, tiles, blocks and ragged ends.
INTERPRETED = {
    "gpu": interpreted(pallas_gpu, walked_gpu.Config(unroll=2, channels=32, stages=2)),
    "tpu": interpreted(pallas_tpu, pallas_tpu.Config(block_t=16, block_d=128)),
}


@pytest.fixture(autouse=True)
def _interpreted_implementations(monkeypatch):
    for name, module in INTERPRETED.items():
        monkeypatch.setitem(api._IMPLEMENTATIONS, name, module)


def make_inputs(shape, seed, *, optional):
    """Float64 arrays by name; resets, initial state and lower bound only when `optional`."""
    B, T, D = shape
    rng = np.random.default_rng(seed)
    arrays = {
        "f": 1 / (1 + np.exp(-rng.normal(1.0, 2.0, shape))),
        "x": rng.normal(size=shape),
        "h0": rng.normal(size=(B, D)) if optional else None,
        "bound": rng.uniform(0, 0.9, D) if optional else None,
        "reset": rng.random((B, T)) < 0.15 if optional else None,
        "dh": rng.normal(size=shape),
        "dh_last": rng.normal(size=(B, D)),
    }
    if optional:
        arrays["reset"][0, 0] = True
    return arrays


def value_and_gradients(function, arrays, dtype, state_dtype):
    """h, h_last and the gradients by name of `function(primals, reset)`."""
    primals = {name: jnp.asarray(arrays[name], dtype) for name in ("f", "x")}
    for name in ("h0", "bound"):
        if arrays[name] is not None:
            primals[name] = jnp.asarray(arrays[name], state_dtype)
    reset = None if arrays["reset"] is None else jnp.asarray(arrays["reset"])

    @jax.jit
    def run(primals, dh, dh_last):
        (h, h_last), pullback = jax.vjp(lambda p: function(p, reset), primals)
        return {"h": h, "h_last": h_last, **pullback((dh, dh_last))[0]}

    cotangents = (jnp.asarray(arrays["dh"], dtype), jnp.asarray(arrays["dh_last"], state_dtype))
    return run(primals, *cotangents)


def linear(function, **options):
    return lambda p, reset: function(p["f"], p["x"], reset_BT=reset, h0_BD=p.get("h0"), **options)


def mlgru(function, **options):
    return lambda p, reset: function(
        p["x"], p["f"], p.get("bound"), reset_BT=reset, h0_BD=p.get("h0"), **options
    )


OPS = {
    "linear": (linear, linear_recurrence, reference.linear_recurrence),
    "mlgru": (mlgru, mlgru_recurrence, reference.mlgru_recurrence),
}


@functools.cache
def oracle(op, shape, optional, dtype):
    """Inputs rounded to `dtype`, and what float64 makes of them."""
    arrays = make_inputs(shape, sum(shape), optional=optional)
    for name in ("f", "x", "dh"):
        arrays[name] = np.asarray(jnp.asarray(arrays[name], dtype), np.float64)
    call, _, function = OPS[op]
    with jax.enable_x64(True):
        results = value_and_gradients(call(function), arrays, jnp.float64, jnp.float64)
        return arrays, {name: np.asarray(value) for name, value in results.items()}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("implementation", "shape", "optional"),
    [
        ("xla", (2, 1, 5), True),
        ("xla", (3, 37, 13), False),
        ("xla", (3, 37, 13), True),
        ("gpu", (2, 21, 32), False),
        ("gpu", (2, 21, 32), True),
        ("tpu", (3, 37, 13), False),
        ("tpu", (3, 37, 13), True),
    ],
)
def test_matches_the_float64_oracle(op, implementation, shape, optional):
    call, function, _ = OPS[op]
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)):
        arrays, want = oracle(op, shape, optional, dtype)
        tested = call(function, implementation=implementation)
        got = value_and_gradients(tested, arrays, dtype, jnp.float32)
        assert got["h"].dtype == dtype
        assert got["h_last"].dtype == jnp.float32
        assert relative_rms(got["h_last"], want["h_last"]) < 1e-5, "the carry must be float32"
        for name, value in got.items():
            assert relative_rms(value, want[name]) < tolerance, (name, dtype)


def test_reset_cuts_documents_apart():
    arrays = make_inputs((1, 12, 4), 0, optional=True)
    f, x, h0 = (jnp.asarray(arrays[n], jnp.float32) for n in ("f", "x", "h0"))
    reset = jnp.zeros((1, 12), bool).at[0, 5].set(True)
    run = jax.jit(linear_recurrence)
    whole, last = run(f, x, reset_BT=reset, h0_BD=h0)
    left, _ = run(f[:, :5], x[:, :5], h0_BD=h0)
    right, right_last = run(f[:, 5:], x[:, 5:])
    np.testing.assert_allclose(whole, jnp.concatenate([left, right], 1), rtol=1e-6)
    np.testing.assert_allclose(last, right_last, rtol=1e-6)


def test_decoding_step_by_step_equals_the_whole_sequence():
    arrays = make_inputs((2, 6, 8), 1, optional=True)
    f, x, h0 = (jnp.asarray(arrays[n], jnp.float32) for n in ("f", "x", "h0"))
    reset = jnp.asarray(arrays["reset"])
    run = jax.jit(linear_recurrence)
    whole, last = run(f, x, reset_BT=reset, h0_BD=h0)
    state = h0
    for t in range(6):
        at = slice(t, t + 1)
        h, state = run(f[:, at], x[:, at], reset_BT=reset[:, at], h0_BD=state)
        np.testing.assert_allclose(h, whole[:, at], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "gpu", "tpu"])
def test_padding_holds_the_state(implementation):
    arrays = make_inputs((2, 9, 32), 3, optional=True)
    i, f, h0, bound = (jnp.asarray(arrays[n], jnp.float32) for n in ("x", "f", "h0", "bound"))
    padding = jnp.zeros((2, 9), bool).at[0, 4:].set(True)

    def last(i, f, padding):
        return mlgru_recurrence(
            i, f, bound, h0_BD=h0, padding_BT=padding, implementation=implementation
        )[1]

    padded = last(i, f, padding)
    # A kernel with padding is another program: it may fuse and combine its chunks otherwise.
    rtol = 0 if implementation == "xla" else 1e-6
    np.testing.assert_allclose(padded[0], last(i[:, :4], f[:, :4], None)[0], rtol=rtol)
    np.testing.assert_allclose(padded[1], last(i, f, None)[1], rtol=rtol)
    gradients = jax.grad(lambda i, f: last(i, f, padding).sum(), (0, 1))(i, f)
    assert all(not np.any(g[0, 4:]) and np.any(g[1, 4:]) for g in gradients)


def test_the_accelerators_scan_agrees_with_the_loop():
    """On the CPU only the loop runs by default, so the other branch is called by name."""
    arrays = make_inputs((2, 37, 5), 2, optional=True)
    f, x, h0, dh, dh_last = (
        jnp.asarray(arrays[n], jnp.float32) for n in ("f", "x", "h0", "dh", "dh_last")
    )
    reset = jnp.asarray(arrays["reset"])
    loop = xla._forward_loop(f, x, reset, h0)
    for a, b in zip(loop, jax.jit(xla._forward_scan)(f, x, reset, h0), strict=True):
        assert relative_rms(a, b) < 1e-6
    args = (f, loop[0], reset, h0, dh, dh_last)
    scan = jax.jit(xla._backward_scan)(*args)
    for a, b in zip(xla._backward_loop(*args), scan, strict=True):
        assert relative_rms(a, b) < 1e-6


def test_extreme_gates_stay_finite():
    i = jnp.array([[[-200.0, 200.0, 0.0, -88.0]]])
    f = jnp.array([[[200.0, -200.0, 0.0, 88.0]]])
    total, gradients = jax.value_and_grad(lambda i, f: mlgru_recurrence(i, f)[0].sum(), (0, 1))(
        i, f
    )
    assert np.isfinite(total)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bad_input_is_named():
    f = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match="x_BTD"):
        linear_recurrence(f, f[:, :2])
    with pytest.raises(ValueError, match="reset_BT"):
        linear_recurrence(f, f, reset_BT=jnp.zeros((3, 2), bool))
    with pytest.raises(TypeError, match="reset_BT"):
        linear_recurrence(f, f, reset_BT=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="h0_BD"):
        linear_recurrence(f, f, h0_BD=jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="implementation='cuda'"):
        linear_recurrence(f, f, implementation="cuda")
    with pytest.raises(ValueError, match="lower_bound_D"):
        mlgru_recurrence(f, f, jnp.zeros(3))
    with pytest.raises(ValueError, match="padding_BT"):
        mlgru_recurrence(f, f, padding_BT=jnp.zeros((2, 4), bool))
    with pytest.raises(ValueError, match=r"partition=.*needs a mesh"):
        linear_recurrence(f, f, partition=jax.sharding.PartitionSpec("data"))


def test_an_explicit_kernel_fails_loudly_where_it_cannot_run():
    f = jnp.ones((1, 4, 32))
    with pytest.raises(Exception, match=r"(?i)interpret|cpu|platform"):
        linear_recurrence(f, f, implementation="pallas_gpu")


@pytest.mark.parametrize("bounded", [False, True])
def test_layers_of_one_shape_share_their_kernels(bounded):
    x, h = jnp.ones((2, 64, 32)), jnp.zeros((2, 32))
    bound = jnp.zeros(32) if bounded else None
    walks = (
        lambda: pallas_gpu.forward(x, x, None, None),
        lambda: pallas_gpu.backward(x, x, None, None, x, h),
        lambda: pallas_gpu.mlgru_forward(x, x, bound, None, None),
        lambda: pallas_gpu.mlgru_backward(x, x, bound, x, None, None, x, h),
    )
    for walk in walks:
        jaxpr = jax.make_jaxpr(lambda walk=walk: [walk() for _ in range(3)])()
        inner = [eqn.params["jaxpr"] for eqn in jaxpr.eqns if "jaxpr" in eqn.params]
        assert len(inner) == 3
        assert len({id(each) for each in inner}) == 1
