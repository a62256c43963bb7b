"""Needle in a haystack: where the fact lies, and that reading it is what gets the answer."""

import pytest

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.needle import evaluate_needle
from mmfree_jax.evaluate.recall_figure import needle_png
from mmfree_jax.evaluate.scoring import Score

TOKENIZER = ByteTokenizer()
TEXT = " ".join(f"Sentence {i} says little of note." for i in range(200))
DEPTHS = (0.0, 0.5, 1.0)


class _Reader:
    """Knows the number if the fact is among the last `memory` bytes; keeps what it was asked."""

    def __init__(self, memory):
        self.memory, self.asked = memory, []

    def score(self, queries):
        scores = []
        for query in queries:
            text = TOKENIZER.decode(query.tokens)
            context, answer = TOKENIZER.decode(query.tokens[: -query.scored]), text[-4:]
            self.asked.append((context, answer))
            question = context[context.rindex("The secret") :]
            is_there = f"{question} {answer}." in context[-self.memory :]
            scores.append(Score(-1.0 if is_there else -9.0, is_there))
        return scores


def _ask(memory, **options):
    reader = _Reader(memory)
    settings = {"lengths": (300, 600), "depths": DEPTHS, "trials": 6, "candidates": 4} | options
    return evaluate_needle(reader.score, TOKENIZER, TEXT, **settings), reader.asked


def test_one_that_reads_all_answers_all_but_where_no_fact_is():
    scores, _ = _ask(memory=10_000)
    assert [(x.length, x.depth) for x in scores] == [
        (300, 0.0), (300, 0.5), (300, 1.0), (300, None),
        (600, 0.0), (600, 0.5), (600, 1.0), (600, None),
    ]  # fmt: skip
    for x in scores:
        right = 0 if x.depth is None else 6
        assert (x.chosen.right, x.written.right, x.chosen.asked) == (right, right, 6)
        assert x.nats == (9.0 if x.depth is None else 1.0)
        assert x.length - 70 < x.tokens <= x.length - 5


def test_one_that_forgets_answers_what_came_last():
    scores, _ = _ask(memory=120)
    found = {(x.length, x.depth): x.chosen.right for x in scores}
    assert found == {
        (300, 0.0): 0, (300, 0.5): 0, (300, 1.0): 6, (300, None): 0,
        (600, 0.0): 0, (600, 0.5): 0, (600, 1.0): 6, (600, None): 0,
    }  # fmt: skip


def test_the_fact_lies_at_its_depth_between_two_sentences():
    _, asked = _ask(memory=1, lengths=(600,), trials=2, candidates=2, depths=(0.0, 0.25, 0.5, 1.0))
    for k, depth in enumerate((0.0, 0.25, 0.5, 1.0)):
        for trial in range(2):
            context, answer = asked[4 * k + 2 * trial]
            assert asked[4 * k + 2 * trial + 1][0] == context
            at = context.index("The secret number of")
            fact = context[at : context.index(".", at) + 1]
            assert fact.endswith(f" is {answer}.")
            around = context.replace(fact, "")
            assert context.count(fact[:-6]) == 2
            assert not at or context[at - 2 : at] == ". " or depth == 1
            assert abs(at / (len(around) - len(fact)) - depth) < 0.07
    assert "The secret number of" in asked[-1][0]  # the question; without the fact
    assert asked[-1][0].count("The secret") == 1


def test_trials_are_those_of_the_seed_and_differ():
    def ask(seed):
        return _ask(memory=1, lengths=(300,), depths=(0.5,), seed=seed)[1]

    first = ask(0)
    assert ask(0) == first
    assert ask(1) != first
    assert len({context for context, _ in first[:24]}) == 6
    assert len({answer for _, answer in first[:4]}) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fact": "It is 5."}, ConfigError, "with {answer} behind its first words"),
        ({"fact": "{answer} it is"}, ConfigError, "with {answer} behind its first words"),
        ({"lengths": (50,)}, ConfigError, "lengths has 50: set --lengths of 77 or more"),
        (
            {"lengths": (90_000,)},
            DataError,
            "the text has 6,[0-9]{3} tokens, 8[0-9],[0-9]{3} fewer",
        ),
    ],
)
def test_what_has_no_room_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        _ask(memory=1, **options)


def test_the_figure_is_a_png():
    scores, _ = _ask(memory=120)
    assert needle_png(scores, 4).startswith(b"\x89PNG")
