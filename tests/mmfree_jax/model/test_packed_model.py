"""The model on packed weights: the plain program, and the decode kernels against it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Widths that neither 4 nor 5 divides.
from small_packed_model import BASE, build

from mmfree_jax.infer import decode
from mmfree_jax.model import decode_kernels, init_state, packed_model
from mmfree_jax.model.packing import in_words
from mmfree_jax.model.packing import pack as pack_in_memory
from mmfree_jax.model.weights import EmbeddingTable, as_weights
from mmfree_jax.pallas_kernels.decode.api import Cut
from mmfree_jax.saved.pack import quantize_rows


def test_padded_and_held_rows_agree_with_the_model_layer():
    _, params = build(BASE)
    weights = as_weights(params, BASE)
    packed = pack_in_memory(weights, BASE)
    tokens = jnp.asarray([[1, 2, 3, 0], [4, 0, 0, 0]], jnp.int32)
    ids = jnp.asarray([[1, 1, 2, 0], [1, 0, 0, 0]], jnp.int32)
    outs = [decode.forward(v, BASE, tokens, init_state(BASE, 2), ids) for v in (weights, packed)]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), outs[0], outs[1]
    )


def quick_steps(step, tokens, state):
    """Logits [steps, B, V] and the last state of a jitted step over rows of tokens."""
    logits = []
    for token_B in tokens:
        out, state = step(jnp.asarray(token_B, jnp.int32), state)
        logits.append(out)
    return np.asarray(logits), state


TOKENS = [(3 * step, 5 * step + 1) for step in range(6)]


@pytest.fixture(scope="module")
def words():
    """The packed tree in both layouts, and what the plain program makes of TOKENS."""
    _, params = build(BASE)
    packed = pack_in_memory(as_weights(params, BASE), BASE)
    plain = jax.jit(lambda t, s: packed_model.decode(packed, BASE, t[:, None], s, None))
    expected = quick_steps(plain, TOKENS, init_state(BASE, 2))
    return in_words(packed), plain, expected


def test_prompts_go_through_the_words_unchanged(words):
    tree, _, (logits, _) = words
    prompt = jax.jit(lambda t, s: packed_model.decode(tree, BASE, t[:, None], s, None))
    found, _ = quick_steps(prompt, TOKENS, init_state(BASE, 2))
    np.testing.assert_array_equal(found, logits)


def test_the_decode_kernels_compute_the_packed_models_step(words):
    tree, _, (logits, after) = words
    fused = jax.jit(
        lambda t, s, held: decode_kernels.decode_token(
            tree, BASE, t, s, held, implementation="pallas_fused_gpu", interpret=True
        )
    )
    free = jnp.zeros(2, bool)
    found, state = quick_steps(lambda t, s: fused(t, s, free), TOKENS, init_state(BASE, 2))
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state.layers["h"], after.layers["h"], rtol=1e-5, atol=1e-5)
    _, held = fused(jnp.asarray([1, 2]), state, jnp.array([True, False]))
    np.testing.assert_array_equal(held.layers["h"][:, 0], state.layers["h"][:, 0])
    assert (held.layers["h"][:, 1] != state.layers["h"][:, 1]).any()
    np.testing.assert_array_equal(held.position_B, state.position_B + jnp.array([0, 1]))


@pytest.mark.slow
def test_the_kernel_of_a_whole_token_computes_the_packed_models_step(words):
    tree, _, (logits, after) = words
    # Three programs share 38, 47 and 61 outputs unevenly, in tiles that overhang.
    cut = Cut(programs=3, warps=2, tile=2, depth=2, copies=2)
    fused = jax.jit(
        lambda t, s, held: decode_kernels.decode_token(
            tree, BASE, t, s, held, implementation="pallas_token_gpu", cut=cut, interpret=True
        )
    )
    free, held = jnp.array([False]), jnp.array([True])
    found, state = quick_steps(
        lambda t, s: fused(t, s, free), [row[:1] for row in TOKENS], init_state(BASE, 1)
    )
    np.testing.assert_allclose(found, logits[:, :1], rtol=1e-5, atol=1e-5)
    h = after.layers["h"][:, :1]
    np.testing.assert_allclose(state.layers["h"], h, rtol=1e-5, atol=1e-5)
    _, kept = fused(jnp.array([1]), state, held)
    np.testing.assert_array_equal(kept.layers["h"], state.layers["h"])
    np.testing.assert_array_equal(kept.position_B, state.position_B)


@pytest.mark.slow
def test_tokens_chosen_in_the_kernel_are_the_likeliest(words):
    tree, _, _ = words
    table, scale = quantize_rows(tree.embedding.table_VD)
    tree = tree.replace(embedding=EmbeddingTable(jnp.asarray(table), jnp.asarray(scale)))
    cut = Cut(programs=3, warps=4, tile=8, depth=1, copies=2)
    steps = 4
    greedy = jax.jit(
        lambda state, logits, limit, stop: decode_kernels.decode_greedy(
            tree,
            BASE,
            state,
            logits,
            limit,
            stop,
            steps,
            implementation="pallas_token_gpu",
            cut=cut,
            interpret=True,
        )
    )
    step = jax.jit(lambda t, s: packed_model.decode(tree, BASE, t[:, None], s, None))
    start = jax.random.normal(jax.random.key(2), (1, BASE.vocab_size))
    logits, state, expected = start, init_state(BASE, 1), []
    for _ in range(steps):
        expected.append(int(jnp.argmax(logits)))
        logits, state = step(jnp.array(expected[-1:]), state)
    assert len(set(expected)) > 2, "a stream of one token shows little"

    def run(limit, stop):
        return greedy(init_state(BASE, 1), start, jnp.array([limit]), jnp.array([-1, stop]))

    tokens, found, after = run(steps, -1)
    assert tokens[0].tolist() == expected
    np.testing.assert_allclose(found, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after.layers["h"], state.layers["h"], rtol=1e-5, atol=1e-5)
    assert after.position_B.tolist() == [steps]

    stop = expected.index(expected[-1])  # Ends before the first of its kind.
    tokens, found, after = run(steps, expected[-1])
    assert tokens[0].tolist() == expected[:stop] + [-1] * (steps - stop)
    assert after.position_B.tolist() == [stop]
    tokens, found, after = run(2, -1)
    assert tokens[0].tolist() == [*expected[:2], -1, -1]
    again, _, _ = greedy(after, found, jnp.array([3]), jnp.array([-1, -1]))
    assert again[0].tolist()[:2] == expected[2:]
    tokens, found, after = run(0, -1)
    assert tokens[0].tolist() == [-1] * steps
    np.testing.assert_array_equal(found, start)
    assert not after.layers["h"].any()


@pytest.mark.parametrize("unpack_tokens", [512, 1])
def test_the_kernels_for_many_rows_compute_the_same(words, unpack_tokens, monkeypatch):
    monkeypatch.setattr(packed_model, "UNPACK_TOKENS", unpack_tokens)
    tree, _, _ = words
    tokens = jnp.asarray([[1, 2, 3, 0, 5], [4, 0, 0, 0, 0]], jnp.int32)
    ids = jnp.asarray([[1, 1, 2, 2, 0], [1, 0, 0, 0, 0]], jnp.int32)
    outs = [
        jax.jit(functools.partial(packed_model.decode, config=BASE, **how))(
            tree, tokens_BT=tokens, state=init_state(BASE, 2), segment_ids_BT=ids
        )
        for how in ({"kernels": False}, {"kernels": True, "interpret": True})
    ]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), outs[0], outs[1]
    )


def test_rows_in_turn_are_each_as_alone(words):
    tree, _, _ = words
    logits = jax.random.normal(jax.random.key(3), (3, BASE.vocab_size))
    limits, stop = jnp.array([4, 0, 2]), jnp.array([-1])

    def greedy(rows: slice) -> Any:
        count = len(limits[rows])
        return decode_kernels.decode_greedy(
            tree, BASE, init_state(BASE, count), logits[rows], limits[rows], stop, 4,
            implementation="xla",
        )  # fmt: skip

    tokens, after_logits, state = greedy(slice(None))
    assert state.position_B.tolist() == [4, 0, 2]
    assert (np.asarray(tokens) >= 0).sum(axis=1).tolist() == [4, 0, 2]
    for row in range(3):
        alone, its_logits, its_state = greedy(slice(row, row + 1))
        np.testing.assert_array_equal(tokens[row], alone[0])
        np.testing.assert_allclose(after_logits[row], its_logits[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            state.layers["h"][:, row], its_state.layers["h"][:, 0], rtol=1e-5, atol=1e-5
        )
