"""The filters against independent NumPy definitions, and the draw's statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.errors import ConfigError
from mmfree_jax.infer import sample as s


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def draw(logits, sampling, seeds, positions=None, seen=None):
    logits = jnp.asarray(logits, jnp.float32)
    positions = jnp.zeros(len(logits), jnp.int32) if positions is None else jnp.asarray(positions)
    seen = jnp.zeros(logits.shape, bool) if seen is None else jnp.asarray(seen)
    return np.asarray(
        s.sample(
            logits,
            sampling.filters(),
            sampling.numbers(),
            key_B=s.row_keys(
                jnp.asarray(seeds, jnp.uint32), jnp.zeros((len(logits), 2), jnp.uint32)
            ),
            position_B=positions,
            seen_BV=seen,
        )
    )


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(5, 37)).astype(np.float32) * 3


@pytest.mark.parametrize("k", [1, 4, 37, 100])
def test_top_k_keeps_the_k_largest(logits, k):
    kept = np.isfinite(s.keep_top_k(jnp.asarray(logits), k))
    for row, mask in zip(logits, kept, strict=True):
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    kept = np.isfinite(s.keep_top_p(jnp.asarray(logits), p))
    for row, mask in zip(logits, kept, strict=True):
        probability = softmax(row.astype(np.float64))
        order = np.argsort(-probability)
        count = int(np.searchsorted(np.cumsum(probability[order]), p) + 1)
        assert set(np.flatnonzero(mask)) == set(order[:count])


def test_min_p_drops_what_is_below_the_share(logits):
    kept = np.isfinite(s.keep_min_p(jnp.asarray(logits), 0.05))
    for row, mask in zip(logits, kept, strict=True):
        probability = softmax(row.astype(np.float64))
        np.testing.assert_array_equal(mask, probability >= 0.05 * probability.max())


def test_min_p_of_one_keeps_the_likeliest(logits):
    kept = np.isfinite(s.keep_min_p(jnp.asarray(logits), 1.0))
    np.testing.assert_array_equal(kept.sum(-1), 1)


def test_repetition_penalty_makes_seen_tokens_less_likely(logits):
    seen = np.zeros(logits.shape, bool)
    seen[:, ::3] = True
    out = np.asarray(s.penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), 1.7))
    assert (out[seen] < logits[seen]).all()
    np.testing.assert_array_equal(out[~seen], logits[~seen])
    np.testing.assert_allclose(out[seen & (logits > 0)], logits[seen & (logits > 0)] / 1.7, 1e-6)


def test_temperature_zero_is_greedy_whatever_the_seed(logits):
    for seed in (0, 7):
        picked = draw(logits, s.Sampling(temperature=0, top_p=0.5), [seed] * 5)
        np.testing.assert_array_equal(picked, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1.2e-38, 1e-37, 1e-20])
def test_temperatures_next_to_zero_are_greedy_too(logits, temperature):
    for options in ({}, {"top_p": 0.5, "min_p": 0.1}):
        picked = draw(logits, s.Sampling(temperature=temperature, **options), [3] * 5)
        np.testing.assert_array_equal(picked, logits.argmax(-1))


def test_draws_follow_the_tempered_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0])
    count = 20_000
    picked = draw(np.tile(logits, (count, 1)), s.Sampling(temperature=0.7), np.arange(count))
    frequency = np.bincount(picked, minlength=4) / count
    np.testing.assert_allclose(frequency, softmax(logits / 0.7), atol=0.015)


def test_a_draw_depends_on_its_own_row_alone(logits):
    seeds, positions = np.arange(5) + 3, np.arange(5) * 2
    sampling = s.Sampling(temperature=1.3, top_k=20, top_p=0.95, min_p=0.01)
    together = draw(logits, sampling, seeds, positions)
    alone = [
        draw(logits[i : i + 1], sampling, seeds[i : i + 1], positions[i : i + 1])[0]
        for i in range(5)
    ]
    np.testing.assert_array_equal(together, alone)


def test_seed_and_position_change_the_draw():
    logits = np.zeros((64, 1000))
    by_seed = draw(logits, s.Sampling(), np.arange(64))
    by_position = draw(logits, s.Sampling(), np.zeros(64, int), np.arange(64))
    assert len(set(by_seed)) > 50
    assert len(set(by_position)) > 50


def test_every_stream_of_a_seed_is_its_own():
    logits = jnp.zeros((64, 1000))
    places = np.stack(np.divmod(np.arange(64), 8), axis=1)
    keys = s.row_keys(np.full(64, 7, np.uint32), jnp.asarray(places, jnp.uint32))
    sampling = s.Sampling()
    drawn = s.sample(
        logits,
        sampling.filters(),
        sampling.numbers(),
        key_B=keys,
        position_B=jnp.zeros(64, jnp.int32),
        seen_BV=logits > 0,
    )
    assert len(set(drawn.tolist())) > 50
    assert len(np.unique(jax.random.key_data(keys), axis=0)) == 64


def test_filters_renormalise_in_the_documented_order():
    # Temperature comes before top-p: flattened, more tokens are needed to reach p.
    logits = jnp.log(jnp.array([[0.6, 0.3, 0.1]]))
    for temperature, kept in ((1.0, 1), (4.0, 2)):
        sampling = s.Sampling(temperature=temperature, top_p=0.55)
        out = s.filter_logits(
            logits, sampling.filters(), sampling.numbers(), jnp.zeros((1, 3), bool)
        )
        assert np.isfinite(out).sum() == kept


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=field):
        s.Sampling(**{field: value})


def test_a_new_temperature_does_not_compile_again():
    assert s.Sampling(temperature=0.5).filters() == s.Sampling(temperature=0.9).filters()
    assert isinstance(hash(s.Sampling(top_k=3).filters()), int)
    assert jax.tree.structure(s.Sampling().numbers())
