"""Generation against a plain loop over the full-sequence forward."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from initial_params import initial_params

from mmfree_jax.errors import CheckpointError, ConfigError, DataError
from mmfree_jax.infer import api, decode
from mmfree_jax.infer.sample import Sampling
from mmfree_jax.model import LanguageModel, as_weights
from mmfree_jax.model_config import DENSE, ModelConfig

BASE = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    intermediate_size=48,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
ATTENTION = dataclasses.replace(
    BASE, mixer="attention", num_heads=2, mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE
)
# One kind of sampling for most tests, so that they share compiled programs.
DRAW = {"temperature": 0.9, "min_p": 0.02}
PROMPTS = [[5, 9, 11, 2, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]]


@functools.cache
def build(config):
    model = LanguageModel(config)
    params = initial_params(config, 3)
    # Larger weights give distributions with something to choose.
    params = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, params)
    return model, params


@functools.cache
def full_forward(config):
    model, params = build(config)
    return jax.jit(lambda tokens, ids: model.apply({"params": params}, tokens, ids))


# Where an activation falls on the other side of a rounding boundary, two orders of the same
# sums differ by about this much in a logit; the logits spread over more than 1.
FLIP = 0.03


def assert_greedy_by_full_forward(config, prompt, tokens, width=64):
    """Each token is the full forward's likeliest, or one rounding away from it."""
    row = [*prompt, *tokens]
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(row)] = row
    ids = (np.arange(width) < len(row)).astype(np.int32)[None]
    logits = np.asarray(full_forward(config)(jnp.asarray(padded), jnp.asarray(ids))[0])
    predicted = logits[len(prompt) - 1 : len(row) - 1]
    short = predicted.max(-1) - predicted[np.arange(len(tokens)), tokens]
    assert short.max() <= FLIP
    assert (short == 0).mean() >= 0.9


@pytest.fixture(params=[BASE, ATTENTION], ids=["mlgru", "attention"])
def config(request):
    return request.param


def test_greedy_stream_is_the_full_forwards(config):
    model, params = build(config)
    out = api.generate(model, params, PROMPTS, max_new_tokens=20, temperature=0)
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        assert len(tokens) == 20
        assert_greedy_by_full_forward(config, prompt, tokens)
    assert out.finish_reasons == ["length"] * 3


def test_a_prompts_result_does_not_depend_on_its_batch(config):
    model, params = build(config)
    options = {"max_new_tokens": 16, "seed": 11, **DRAW}
    together = api.generate(model, params, PROMPTS, **options).tokens
    for i, (prompt, tokens) in enumerate(zip(PROMPTS, together, strict=True)):
        alone = api.generate(model, params, [prompt], streams=[(i, 0)], **options).tokens
        assert alone == [tokens]


def test_equal_prompts_draw_from_streams_of_their_own():
    model, params = build(BASE)
    run = functools.partial(api.generate, model, params, max_new_tokens=12, temperature=1.0)
    three = run([[4, 5]] * 3, seed=1).tokens
    assert len(set(map(tuple, three))) == 3
    samples = run([[4, 5]] * 4, seed=1, streams=[(0, 0), (0, 1), (1, 0), (1, 1)]).tokens
    assert len(set(map(tuple, samples))) == 4
    assert samples[0] == three[0]
    assert samples[2] == three[1]
    # The same in batches of two, in another order.
    again = run([[4, 5]] * 2, seed=1, streams=[(1, 1), (0, 1)]).tokens
    assert again == [samples[3], samples[1]]
    # A seed of a row's own says it all.
    assert run([[4, 5]] * 2, seed=[1, 1]).tokens == [three[0]] * 2


def test_seeds_are_reproducible_and_matter():
    model, params = build(BASE)
    run = functools.partial(api.generate, model, params, max_new_tokens=12, **DRAW)
    assert run([[4, 5]], seed=1).tokens == run([[4, 5]], seed=1).tokens
    assert run([[4, 5]], seed=1).tokens != run([[4, 5]], seed=2).tokens
    by_prompt = run([[4, 5], [4, 5]], seed=[1, 2]).tokens
    assert by_prompt == [run([[4, 5]], seed=1).tokens[0], run([[4, 5]], seed=2).tokens[0]]


def test_long_prompts_are_read_in_pieces(config, monkeypatch):
    model, params = build(config)
    prompts = [list(np.random.default_rng(0).integers(0, 97, n)) for n in (30, 3, 17)]
    whole = api.generate(model, params, prompts, max_new_tokens=8, temperature=0)
    monkeypatch.setattr(api, "PREFILL_PIECE", 16)
    pieces = api.generate(model, params, prompts, max_new_tokens=8, temperature=0)
    assert pieces.tokens == whole.tokens


def test_a_session_goes_on_where_it_ended(config):
    model, params = build(config)
    run = functools.partial(api.generate, model, params, seed=5, **DRAW)
    whole = run(PROMPTS, max_new_tokens=24)
    first = run(PROMPTS, max_new_tokens=9)
    rest = run([[], [], []], max_new_tokens=15, session=first.session)
    again = run([[], [], []], max_new_tokens=15, session=first.session)
    assert [a + b for a, b in zip(first.tokens, rest.tokens, strict=True)] == whole.tokens
    assert again.tokens == rest.tokens


def test_a_forked_session_is_prompt_caching(config):
    model, params = build(config)
    shared, endings = [5, 6, 7, 8, 9, 10], [[1], [2, 3], [4, 5, 6]]
    cache = api.prefill(model, params, [shared])
    forked = api.generate(
        model, params, endings, max_new_tokens=10, temperature=0, session=decode.fork(cache, 3)
    )
    whole = api.generate(
        model, params, [shared + e for e in endings], max_new_tokens=10, temperature=0
    )
    assert forked.tokens == whole.tokens


def test_stop_ids_end_a_row_and_leave_the_others(config):
    model, params = build(config)
    free = api.generate(model, params, PROMPTS, max_new_tokens=20, temperature=0).tokens
    stop = next(t for t in free[0] if t not in free[1])
    out = api.generate(model, params, PROMPTS, max_new_tokens=20, temperature=0, stop_ids=[stop])
    assert out.tokens[0] == free[0][: free[0].index(stop)]
    assert out.finish_reasons[0] == "stop_id"
    assert out.tokens[1] == free[1]
    assert out.finish_reasons[1] == "length"
    # The stopped row's state is that of its prompt and answer, without the stop token.
    expected = api.prefill(model, params, [PROMPTS[0] + out.tokens[0]])
    np.testing.assert_allclose(
        out.session.logits_BV[0], expected.logits_BV[0], rtol=1e-4, atol=1e-4
    )
    assert int(out.session.state.position_B[0]) == int(expected.state.position_B[0])


def test_callback_sees_every_token_in_order_and_can_stop(config):
    model, params = build(config)
    free = api.generate(model, params, PROMPTS, max_new_tokens=40, temperature=0).tokens
    seen = [[], [], []]

    def on_tokens(row, tokens):
        seen[row] += tokens

    out = api.generate(
        model, params, PROMPTS, max_new_tokens=40, temperature=0, on_tokens=on_tokens
    )
    assert seen == out.tokens == free

    total = [0, 0, 0]

    def stop_at_13(row, tokens):
        total[row] += len(tokens)
        over = total[row] - 13
        return len(tokens) - over if row == 0 and over >= 0 else None

    out = api.generate(
        model, params, PROMPTS, max_new_tokens=40, temperature=0, on_tokens=stop_at_13
    )
    assert out.tokens == [free[0][:13], *free[1:]]
    assert out.finish_reasons == ["stop", "length", "length"]
    more = api.generate(
        model, params, [[], [], []], max_new_tokens=9, temperature=0, session=out.session
    )
    assert more.tokens[0] == free[0][13:22]


def test_repetition_penalty_counts_prompt_and_answer(config):
    model, params = build(config)
    # A crushing penalty: no token may occur twice while others are left.
    out = api.generate(
        model,
        params,
        [[1, 2, 3], [4]],
        max_new_tokens=30,
        temperature=0,
        repetition_penalty=1e9,
    )
    for prompt, tokens in zip([[1, 2, 3], [4]], out.tokens, strict=True):
        assert len(set(prompt + tokens)) == len(prompt + tokens)
    seen = np.asarray(out.session.seen_BV)
    assert set(np.flatnonzero(seen[0])) == {1, 2, 3, *out.tokens[0]}


@pytest.mark.parametrize("pattern", ["attention", "mlgru,attention"])
def test_rows_that_begin_need_no_cache(pattern):
    """Read as what has no past, and as what goes on from a session of nothing."""
    config = dataclasses.replace(ATTENTION, mixer=pattern)
    _, params = build(config)
    weights = as_weights(params, config)
    # 32 tokens of padding in all, for a cache of 24 places.
    tokens = np.zeros((3, 32), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    lengths = [len(prompt) for prompt in PROMPTS]
    fresh, other = (
        decode.prefill(
            weights,
            decode.init_session(config, 3, 24),
            jnp.asarray(tokens),
            jnp.asarray(lengths),
            config=config,
            fresh=fresh,
        )
        for fresh in (True, False)
    )
    np.testing.assert_allclose(fresh.logits_BV, other.logits_BV, atol=1e-5)
    # What follows looks at the places that hold a prompt, and overwrites the others.
    after = [
        decode.prefill(
            weights, session, jnp.asarray([[4, 8]] * 3), jnp.asarray([2] * 3), config=config
        )
        for session in (fresh, other)
    ]
    np.testing.assert_allclose(after[0].logits_BV, after[1].logits_BV, atol=1e-5)
    for row, prompt in enumerate(PROMPTS):
        whole = np.asarray([[*prompt, 4, 8]])
        logits = full_forward(config)(whole, np.ones_like(whole))[0, -1]
        np.testing.assert_allclose(after[0].logits_BV[row], logits, atol=1e-4)


def test_seen_tokens_are_kept_without_a_penalty_too():
    model, params = build(BASE)
    out = api.generate(model, params, [[1, 2]], max_new_tokens=10, seed=3, **DRAW)
    assert set(np.flatnonzero(out.session.seen_BV[0])) == {1, 2, *out.tokens[0]}


def test_the_recurrent_session_does_not_grow():
    model, params = build(BASE)
    short = api.generate(model, params, [[1]], max_new_tokens=1, **DRAW).session
    long = api.generate(model, params, [[1] * 32], max_new_tokens=300, **DRAW).session
    sizes = [sum(x.nbytes for x in jax.tree.leaves(s)) for s in (short, long)]
    assert sizes[0] == sizes[1]


@pytest.mark.slow
def test_memory_is_constant_over_many_tokens():
    model, params = build(BASE)
    weights = as_weights(params, BASE)
    session = api.generate(model, weights, [[1]], max_new_tokens=200, **DRAW).session

    def held():
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    before = held()
    for _ in range(4):
        out = api.generate(model, weights, [[]], max_new_tokens=5000, session=session, **DRAW)
        session = out.session
    assert int(session.state.position_B[0]) == 20_201
    assert held() == before


def test_one_program_serves_all_lengths_and_settings():
    model, params = build(BASE)
    weights = as_weights(params, BASE)
    api.generate(model, weights, [[1, 2]], max_new_tokens=3, **DRAW)
    before = decode.generate_chunk._cache_size()
    for count, temperature in ((1, 0.7), (150, 1.1)):
        options = DRAW | {"max_new_tokens": count, "temperature": temperature}
        api.generate(model, weights, [[1, 2, 3]], **options)
    assert decode.generate_chunk._cache_size() == before


def test_zero_new_tokens_reads_the_prompt_only():
    model, params = build(BASE)
    out = api.generate(model, params, [[1, 2]], max_new_tokens=0)
    assert out.tokens == [[]]
    assert int(out.session.state.position_B[0]) == 2


@pytest.mark.parametrize("bitlinear", ["fused", "plain"])
def test_master_weights_of_ternary_layers_are_dropped(bitlinear):
    config = dataclasses.replace(BASE, bitlinear=bitlinear)
    model, params = build(config)
    weights = as_weights(params, config)
    kept = "weight" in weights.params["head"]
    assert kept == (bitlinear == "plain")
    assert "weight" in weights.params["embedding"]
    out = api.generate(model, weights, [[1, 2, 3]], max_new_tokens=8, temperature=0)
    assert_greedy_by_full_forward(config, [1, 2, 3], out.tokens[0])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "match"),
    [
        ([], {}, DataError, "at least one prompt"),
        ([[1], []], {}, DataError, "prompt 1 is empty"),
        ([[1, 97]], {}, DataError, "token id 97 at position 1.*0 to 96"),
        ([[-1]], {}, DataError, "token id -1"),
        ([[1]], {"max_new_tokens": -1}, ConfigError, "max_new_tokens"),
        ([[1]], {"stop_ids": [97]}, ConfigError, "stop_ids holds 97"),
        ([[1]], {"seed": [1, 2]}, ConfigError, "seed has 2 entries"),
        ([[1]], {"seed": -1}, ConfigError, "seed is -1"),
        ([[1]], {"streams": [(0, 0), (1, 0)]}, ConfigError, "streams has 2 entries"),
        ([[1]], {"temperature": -1.0}, ConfigError, "temperature"),
        ([[1]], {"temperature": np.float32(-1)}, ConfigError, "temperature"),
        ("ab", {}, DataError, "prompts is 'ab': give a list"),
        ([1, 2], {}, DataError, "prompt 0 is 1: give a list of token ids"),
        (["ab"], {}, DataError, "prompt 0 is 'ab'.*generate_text"),
        ([[1, 2.5]], {}, DataError, "prompt 0 has 2.5 at position 1: give whole"),
        ([np.array([True, False])], {}, DataError, "prompt 0 has True at position 0"),
        ([[1]], {"max_new_tokens": 2.5}, ConfigError, "max_new_tokens is 2.5: set a whole"),
        ([[1]], {"stop_ids": 5}, ConfigError, "stop_ids is 5: give a list"),
        ([[1]], {"seed": 1.5}, ConfigError, "seed is 1.5: set a whole"),
        ([[1]], {"streams": [(0,)]}, ConfigError, "no pairs"),
        ([[1]], {"top_k": 2.5}, ConfigError, "top_k is 2.5: set a whole"),
    ],
)
def test_bad_input_is_named(prompts, options, error, match):
    model, params = build(BASE)
    with pytest.raises(error, match=match):
        api.generate(model, params, prompts, **options)


def test_arrays_are_prompts_and_settings_too():
    model, params = build(BASE)
    wanted = api.generate(model, params, [[1, 2, 3]], max_new_tokens=4, seed=7).tokens
    for prompts in (np.array([[1, 2, 3]], np.uint8), jnp.array([[1, 2, 3]]), [jnp.arange(1, 4)]):
        options = {"max_new_tokens": np.int64(4), "seed": jnp.uint32(7)}
        found = api.generate(model, params, prompts, **options, stop_ids=np.array([], int))
        assert found.tokens == wanted


def test_logits_that_are_not_finite_are_an_error():
    model, params = build(BASE)
    damaged = params | {"embedding": {"weight": params["embedding"]["weight"].at[7].set(jnp.nan)}}
    with pytest.raises(CheckpointError, match="not finite"):
        api.generate(model, damaged, [[7]], max_new_tokens=3, **DRAW)


def test_a_session_of_other_rows_is_refused():
    model, params = build(BASE)
    session = api.prefill(model, params, [[1, 2]])
    with pytest.raises(ConfigError, match="session has 1 rows"):
        api.generate(model, params, [[1], [2]], session=session)


def test_sampling_defaults_draw_from_the_model():
    assert Sampling().filters() == (False, None, False, False, False)
