"""A NaN that goes into a GPU kernel comes out of it.

Every kernel is run on rows of which one is poisoned: in an interpreter, and on a GPU where there is
one (`pytest tests/pallas_kernels/test_nan.py -k on_a_gpu`). Triton's maximum returns the other
operand where one is NaN: its kernels are interpreted with a maximum of that kind, and none of them,
lowered, holds a bare maximum or minimum of floats. XLA's programs are run on such rows as they are.
"""

import functools
import math
import re

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.interpreters import mlir
from jax._src.lib.mlir.dialects import hlo
from jax._src.pallas.triton import pallas_call_registration

from mmfree_jax.pallas_kernels.bitlinear import int8_backward
from mmfree_jax.pallas_kernels.cross_entropy.pallas_gpu import softmax_rows
from mmfree_jax.pallas_kernels.decode import token_choice
from mmfree_jax.pallas_kernels.decode.api import Arithmetic, Cut, decode_greedy, decode_token
from mmfree_jax.pallas_kernels.decode.inline import EMPTY
from mmfree_jax.pallas_kernels.decode.token_board import board_size
from mmfree_jax.pallas_kernels.decode.token_plan import make_plan, places
from mmfree_jax.pallas_kernels.keep_nan import at_least, largest_magnitude
from mmfree_jax.pallas_kernels.norm_quant.api import norm_quant
from mmfree_jax.pallas_kernels.packed_matmul.api import pack, quantize_rows, scaled_matmul
from mmfree_jax.pallas_kernels.recurrence import pallas_gpu
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternary_matmul
from mmfree_jax.pallas_kernels.timing import largest_difference

ROWS, COLUMNS, BAD = 3, 128, 1  # BAD: the row with the NaN
FORMS = ("own", "outer", "residual", "times_silu", "gated", "weight")


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def poisoned(*shape, seed=0):
    x = values(*shape, seed=seed)
    x[BAD, 5] = np.nan
    return jnp.asarray(x)


def apart(rows):
    """The poisoned row of an array, and the others."""
    return rows[BAD], jnp.delete(rows, BAD, axis=0)


def operands(form):
    """x, one consumer's norm weight, the outer weight and what else a form of the input takes."""
    x, weight = poisoned(ROWS, 2 * COLUMNS if form == "gated" else COLUMNS), jnp.ones(COLUMNS)
    outer = None if form in ("own", "gated") else jnp.ones(COLUMNS)
    options = {"gated": True} if form == "gated" else {}
    if form in ("residual", "times_silu"):
        options = {form: jnp.asarray(values(ROWS, COLUMNS, seed=1))}
    if form == "weight":
        x, weight = jnp.asarray(values(ROWS, COLUMNS)), weight.at[7].set(jnp.nan)
    return x, weight, outer, options


def norms(form, interpret):
    x, weight, outer, options = operands(form)
    scales = norm_quant(
        x, (weight,), outer, eps=1e-6, implementation="pallas_gpu", interpret=interpret,
        **options,
    )[2]  # fmt: skip
    return (scales[0], jnp.ones(1)) if form == "weight" else apart(scales[0])


def norm_without_weights(interpret):
    scales = norm_quant(
        poisoned(ROWS, COLUMNS), (None,), eps=1e-6, implementation="pallas_gpu",
        interpret=interpret,
    )[2]  # fmt: skip
    return apart(scales[0])


def rows_of_a_stack(form, interpret):
    x, weight, outer, options = operands(form)
    scales = quantize_rows(
        x, jnp.int32(0), [weight[None]], None if outer is None else outer[None], eps=1e-6,
        outer_eps=1e-6, interpret=interpret, **options,
    )[2]  # fmt: skip
    return (scales[0], jnp.ones(1)) if form == "weight" else apart(scales[0])


def packed_product(interpret):
    x, packed = jnp.ones((ROWS, COLUMNS), jnp.int8), pack(jnp.ones((1, 16, COLUMNS), jnp.int8))
    scale = jnp.ones((ROWS, 1)).at[BAD].set(jnp.nan)
    return apart(
        scaled_matmul(
            x, scale, packed, jnp.ones((1, 1, 1)), jnp.int32(0), out_dtype=jnp.bfloat16,
            interpret=interpret,
        )
    )  # fmt: skip


def product(interpret):
    x, trits = jnp.ones((ROWS, COLUMNS), jnp.int8), jnp.ones((16, COLUMNS), jnp.int8)
    scale = jnp.ones((ROWS, 1)).at[BAD].set(jnp.nan)
    return apart(
        ternary_matmul(
            x, scale, trits, jnp.ones((1, 1)), implementation="pallas_triton", interpret=interpret
        )
    )


def softmax(interpret):
    targets = jnp.full(ROWS, 3, jnp.int32)
    logits = poisoned(ROWS, COLUMNS).at[:, 3].set(9.0)
    loss, correct, lse, gradient = softmax_rows(
        logits, targets, 1e-4, jnp.float32, interpret=interpret
    )
    # A row that holds a NaN has no likeliest token.
    right = jnp.where(correct == jnp.array([True, False, True]), 1.0, jnp.nan)
    bad, sound = apart(jnp.concatenate([loss[:, None], lse[:, None], gradient], axis=1))
    return bad, jnp.concatenate([sound.reshape(-1), right])


def recurrence(interpret):
    f, x = jnp.full((1, 40, COLUMNS), 0.5), jnp.ones((1, 40, COLUMNS)).at[0, 9, 2].set(jnp.nan)
    h, last = pallas_gpu.forward(f, x, None, None, interpret=interpret)
    bad = jnp.concatenate([h[0, 9:, 2], last[:, 2]])
    return bad, jnp.concatenate([h[0, :9].reshape(-1), h[0, 9:, 3]])


def gated_recurrence(interpret):
    f = jnp.ones((1, 40, COLUMNS)).at[0, 9, 2].set(jnp.nan)
    i, bound = jnp.ones_like(f), jnp.zeros(COLUMNS)
    h, last = pallas_gpu.mlgru_forward(i, f, bound, None, None, interpret=interpret)
    return jnp.concatenate([h[0, 9:, 2], last[:, 2]]), h[0, :9]


ARITHMETIC = Arithmetic(1e-6, 1e-6, jnp.dtype("bfloat16"), jnp.dtype("bfloat16"))
CUT = Cut(programs=3, warps=2, tile=2, copies=2)
SIZES = (2, 32, 32, 48, 64)


def few_rows(model, interpret):
    logits, h = decode_token(
        model, jnp.arange(ROWS), jnp.zeros((2, ROWS, 32)), arithmetic=ARITHMETIC,
        implementation="pallas_fused_gpu", interpret=interpret,
    )  # fmt: skip
    return apart(jnp.concatenate([logits, *h], axis=1))


def whole_token(model, interpret):
    def read(token):
        logits, h = decode_token(
            model, jnp.array([token]), jnp.zeros((2, 1, 32)), arithmetic=ARITHMETIC, cut=CUT,
            implementation="pallas_token_gpu", interpret=interpret,
        )  # fmt: skip
        return jnp.concatenate([logits.reshape(-1), h.reshape(-1)])

    bad, sound = jax.lax.map(read, jnp.array([BAD, 0]))  # one compilation
    return bad, sound


def whole_tokens(model, interpret):
    start = jnp.zeros((1, 64)).at[0, BAD].set(1.0)
    tokens, logits, _ = decode_greedy(
        model, jnp.zeros((2, 1, 32)), start, jnp.array([2]), jnp.array([-1]), steps=2,
        arithmetic=ARITHMETIC, implementation="pallas_token_gpu", cut=CUT, interpret=interpret,
    )  # fmt: skip
    return logits, tokens[:1].astype(jnp.float32)


BY_MOSAIC = {
    **{f"norm_quant-{form}": functools.partial(norms, form) for form in FORMS},
    "norm_quant-bare": norm_without_weights,
    "softmax_rows": softmax,
    "recurrence": recurrence,
    "gated_recurrence": gated_recurrence,
}
BY_TRITON = {
    **{f"quantize_rows-{form}": functools.partial(rows_of_a_stack, form) for form in FORMS},
    "packed_product": packed_product,
    "product": product,
    "few_rows": few_rows,
    "whole_token": whole_token,
    "whole_tokens": whole_tokens,
}
SLOW = ("whole_token", "whole_tokens")
WITH_MODEL = ("few_rows", *SLOW)

each_kernel = pytest.mark.parametrize("name", BY_TRITON)
each_kernel_quickly = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in BY_TRITON]
)


@pytest.fixture
def kernel(name, random_model):
    """A kernel on poisoned rows: interpret -> (what must be NaN, what must be finite)."""
    if name not in WITH_MODEL:
        return BY_TRITON[name]
    model = random_model(*SIZES)
    object.__setattr__(model, "embedding", model.embedding.at[BAD, 5].set(jnp.nan))
    return functools.partial(BY_TRITON[name], model)


def losing_nan(rule, one_operand):
    """A lowering rule of XLA's maximum or minimum, made one in which NaN loses."""

    def lower(ctx, *args, **options):
        if not jnp.issubdtype(ctx.avals_in[0].dtype, jnp.floating):
            return rule(ctx, *args, **options)
        if one_operand is None:
            sharding = getattr(ctx.avals_out[0], "sharding", None)
            args = mlir.multi_broadcast_in_dim(
                ctx, args, ctx.avals_in, ctx.avals_out[0].shape, sharding
            )
            ctx = ctx.replace(avals_in=ctx.avals_out * 2)
        is_nan = [mlir.compare_hlo(a, a, "NE", "FLOAT") for a in args]
        if one_operand is not None:
            least = mlir.full_like_aval(ctx, one_operand, ctx.avals_in[0])
            return rule(ctx, hlo.select(is_nan[0], least, args[0]), **options)
        (result,) = rule(ctx, *args, **options)
        x, y = args
        return [hlo.select(is_nan[0], y, hlo.select(is_nan[1], x, result))]

    return lower


@pytest.fixture
def maxnum():
    """Gives this process, and so the interpreter, a maximum and minimum in which NaN loses."""
    table = mlir._platform_specific_lowerings["cpu"]
    losing = {lax.max_p: None, lax.min_p: None, lax.reduce_max_p: -np.inf}
    losing[lax.reduce_min_p] = np.inf
    before = {p: table.get(p) for p in losing}
    jax.clear_caches()
    for primitive, identity in losing.items():
        rule = mlir._lowerings[primitive].rule
        mlir.register_lowering(primitive, losing_nan(rule, identity), platform="cpu")
    yield
    for primitive, entry in before.items():
        if entry is None:
            table.pop(primitive)
        else:
            table[primitive] = entry
    jax.clear_caches()


def test_the_interpreter_has_the_devices_maximum(maxnum):
    x = jnp.array([1.0, jnp.nan, 3.0])
    assert jnp.maximum(x, 2.0).tolist() == [2, 2, 3]
    assert jnp.minimum(jnp.nan, x[:1]).tolist() == [1]
    assert jax.jit(jnp.max)(x) == 3
    assert jnp.min(x) == 1
    assert jnp.isnan(largest_magnitude(x))
    assert jnp.isnan(at_least(x, 2.0)).tolist() == [False, True, False]
    np.testing.assert_array_equal(largest_magnitude(jnp.array([-4.0, 3.0, -0.0])), 4)
    np.testing.assert_array_equal(largest_magnitude(jnp.array([-jnp.inf, 3.0])), jnp.inf)


@each_kernel_quickly
def test_a_nan_survives_where_the_maximum_loses_it(name, kernel, maxnum):
    bad, sound = jax.jit(functools.partial(kernel, True))()
    assert np.isnan(np.asarray(bad, np.float32)).all()
    assert np.isfinite(np.asarray(sound, np.float32)).all()


@pytest.mark.parametrize("columns", [64, 300, 1024, 5632])
def test_a_nan_survives_xlas_programs(columns):
    """On a CPU XLA's maximum of floats loses it where rows are wide."""
    x = values(16, columns)
    x[BAD, 7] = np.nan

    @jax.jit
    def run(x):
        _, _, scales, stats = norm_quant(
            x, (jnp.ones(columns),), eps=1e-6, outer_eps=1e-6, implementation="xla"
        )
        return scales[0], stats.absmaxes[0], int8_backward.quantize(x, 1)[1]

    for found in run(x):
        assert np.isfinite(found).ravel().tolist() == [row != BAD for row in range(16)]
    by_column = jax.jit(lambda x: int8_backward.quantize(x, 0)[1])(x.T)
    assert np.isnan(by_column).ravel().tolist() == [row == BAD for row in range(16)]


@pytest.mark.parametrize("name", BY_MOSAIC)
def test_a_nan_survives_mosaic_gpu(name):
    on_a_gpu = jax.default_backend() == "gpu"
    bad, sound = jax.jit(functools.partial(BY_MOSAIC[name], not on_a_gpu))()
    assert np.isnan(np.asarray(bad, np.float32)).all()
    assert np.isfinite(np.asarray(sound, np.float32)).all()


@each_kernel
def test_a_nan_survives_on_a_gpu(name, kernel):
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU")
    bad, sound = jax.jit(functools.partial(kernel, False))()
    assert np.isnan(np.asarray(bad, np.float32)).all()
    assert np.isfinite(np.asarray(sound, np.float32)).all()


@each_kernel
def test_no_lowered_kernel_has_a_maximum_that_loses_nan(name, kernel, lower_for_cuda, monkeypatch):
    texts = []
    lowering = pallas_call_registration.lowering
    original = lowering.lower_jaxpr_to_triton_module

    def record(*args, **options):
        result = original(*args, **options)
        texts.append(str(result.module.operation))
        return result

    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", record)
    jax.clear_caches()
    lower_for_cuda(lambda: kernel(False))
    assert texts
    found = [op for text in texts for op in re.findall(r"arith\.(?:max|min)numf", text)]
    assert not found


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_a_token_chosen_without_all_programs_is_not_read(lost, random_model):
    """A program that waited in vain for another's logit goes on with NaN, not with a token."""
    plan = make_plan(random_model(*SIZES), ARITHMETIC, boards=1, cut=CUT, emulate=True)
    shape = places(plan).shape

    def choose(board_ref, token_ref, patience_ref):
        refs = {"board": board_ref, "program": 0, "step": jnp.int32(0)}
        for program in range(3):
            key = jnp.full(shape, 10 * program, jnp.int32)
            pair = (key, jnp.full(shape, 7 + program))
            for number, y in enumerate(pair):
                if lost is None or (program, number) != (2, lost):
                    refs["program"] = program
                    token_choice.publish(
                        refs, plan, "best", plan.layers - 1, 2 * program + number + places(plan),
                        places(plan) == 0, y,
                    )  # fmt: skip
        refs["program"] = 0
        token, patience = token_choice.choose(refs, plan, jnp.ones(shape, jnp.int32))
        token_ref[...], patience_ref[...] = jnp.full(shape, token), patience

    board = jnp.full(board_size(plan), EMPTY, jnp.int32)
    out = [jax.ShapeDtypeStruct(shape, jnp.int32) for _ in range(2)]
    token, patience = pl.pallas_call(choose, out_shape=out, interpret=True)(board)
    assert 0 <= int(token[0, 0]) < 64
    assert (int(token[0, 0]) == 9) == (lost is None)
    assert bool((patience == 0).all()) == (lost is not None)


@pytest.mark.parametrize("place", [0, 1])
def test_a_nan_is_the_largest_difference(place):
    """Python's max leaves out one behind a number, so that a wrong kernel would agree."""
    expected = (jnp.ones(4), jnp.ones(3))
    got = tuple(x.at[0].set(jnp.nan) if i == place else x for i, x in enumerate(expected))
    assert math.isnan(largest_difference(got, expected))
    assert largest_difference(expected, expected) == 0
