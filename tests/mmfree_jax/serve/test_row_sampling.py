"""Rows sampled each in its own way, against the filters of `infer.sample` one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.infer import sample
from mmfree_jax.serve.requests import Request, RowSampling
from mmfree_jax.serve.row_sampling import Draw, choose, draw_of, settings_of

V = 50
LOGITS = 3 * jax.random.normal(jax.random.key(0), (6, V))
NOTHING = jnp.zeros((6, V), jnp.int32)


def chosen(
    samplings: list[RowSampling],
    draw: Draw,
    counts: jax.Array = NOTHING,
    logits_BV: jax.Array = LOGITS,
) -> list[int]:
    requests = [Request((1,), 5, one, seed=7, sample=i) for i, one in enumerate(samplings)]
    token_B = jax.jit(choose, static_argnames="draw")(
        logits_BV[: len(samplings)],
        settings_of(requests, V),
        draw=draw,
        position_B=jnp.arange(len(samplings), dtype=jnp.int32),
        seen_BV=counts[: len(samplings)] > 0,
        counts_BV=counts[: len(samplings)],
    )
    return token_B.tolist()


def drawn(logits_BV: jax.Array) -> list[int]:
    """What each row draws of filtered logits, by `infer.sample`'s own noise."""
    rows = len(logits_BV)
    keys = sample.row_keys(
        jnp.full(rows, 7, jnp.uint32),
        jnp.stack([jnp.zeros(rows, jnp.uint32), jnp.arange(rows, dtype=jnp.uint32)], 1),
    )
    return [
        int(jax.random.categorical(jax.random.fold_in(keys[row], row), logits_BV[row]))
        for row in range(rows)
    ]


def test_rows_are_filtered_as_one_after_another_would_be() -> None:
    samplings = [
        RowSampling(),
        RowSampling(1.5, top_k=4),
        RowSampling(1.5, top_p=0.6),
        RowSampling(1.5, min_p=0.2),
        RowSampling(2.0, top_k=9, top_p=0.7, min_p=0.05),
        RowSampling(2.0, top_k=900),
    ]
    wanted = []
    for row, one in enumerate(samplings):
        logits_1V = LOGITS[row : row + 1] / one.temperature
        if one.top_k:
            logits_1V = sample.keep_top_k(logits_1V, one.top_k)
        if one.top_p < 1:
            logits_1V = sample.keep_top_p(logits_1V, one.top_p)
        wanted.append(sample.keep_min_p(logits_1V, one.min_p))
    assert chosen(samplings, "full") == drawn(jnp.concatenate(wanted))


def test_what_a_program_contains_for_others_changes_nothing() -> None:
    samplings = [RowSampling(0.0), RowSampling(0.7), RowSampling()]
    assert chosen(samplings, "plain") == chosen(samplings, "full")
    assert chosen([RowSampling(0.0)] * 6, "greedy") == np.argmax(LOGITS, axis=1).tolist()


def test_penalties_and_biases_move_the_logits() -> None:
    logits = np.asarray(LOGITS) / 3
    best = np.argsort(-logits, axis=1)
    gap = [float(logits[row, best[row, 0]] - logits[row, best[row, 1]]) for row in range(6)]
    assert max(gap) < 1.5
    assert all(logits[row, best[row, 0]] > 0 for row in range(6))
    counts = NOTHING.at[jnp.arange(6), best[:, 0]].set(2)
    samplings = [
        RowSampling(0.0, presence_penalty=gap[0] + 0.01),
        RowSampling(0.0, presence_penalty=gap[1] - 0.01),
        RowSampling(0.0, frequency_penalty=(gap[2] + 0.01) / 2),  # once for each time
        RowSampling(0.0, frequency_penalty=(gap[3] - 0.01) / 2),
        RowSampling(0.0, repetition_penalty=100.0),
        RowSampling(0.0, logit_bias=((3, 100.0), (int(best[5, 0]), -100.0))),
    ]
    second = [best[row, 1 if row in (0, 2, 4) else 0] for row in range(5)]
    assert chosen(samplings, "full", counts, jnp.asarray(logits)) == [*second, 3]


@pytest.mark.parametrize(
    ("request_", "draw"),
    [
        (Request((1,), 1, RowSampling(0.0)), "greedy"),
        (Request((1,), 1, RowSampling(0.0, top_p=0.5)), "greedy"),
        (Request((1,), 1, RowSampling(0.0, presence_penalty=0.1)), "full"),
        (Request((1,), 1, RowSampling(0.0), logprobs=0), "full"),
        (Request((1,), 1, RowSampling(0.3)), "plain"),
        (Request((1,), 1, RowSampling(0.3, min_p=0.1)), "full"),
        (Request((1,), 1, RowSampling(0.3, logit_bias=((1, 1.0),))), "full"),
    ],
)
def test_the_least_that_a_program_must_contain(request_: Request, draw: Draw) -> None:
    assert draw_of(request_) == draw
