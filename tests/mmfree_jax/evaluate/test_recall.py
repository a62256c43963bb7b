"""MQAR: a model that looks its answers up gets all, one that forgets those that are near."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.data.mqar import Mqar, mqar_row
from mmfree_jax.errors import ConfigError
from mmfree_jax.evaluate.recall import evaluate_mqar, right_share
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import param_shapes, unflatten
from mmfree_jax.model_config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=1, intermediate_size=16,
    compute_dtype="float32", residual_dtype="float32",
)  # fmt: skip
TASK, T, ROWS = Mqar(pairs=4, vocab=32), 24, 100


@dataclasses.dataclass(frozen=True)
class _LookUp:
    """Says what stood behind the first place of the token, among the last `memory` tokens."""

    memory: int
    config: ModelConfig = CONFIG

    def variables(self, params: Any) -> Any:
        return params

    def hidden(self, variables, tokens_BT, segment_ids_BT, state):
        place_T = jnp.arange(tokens_BT.shape[1])
        back_TS = place_T[:, None] - place_T[None]
        same_BTS = tokens_BT[:, :, None] == tokens_BT[:, None]
        weight_BTS = jnp.where(same_BTS & (back_TS > 0) & (back_TS <= self.memory), back_TS, 0)
        behind_BSV = jax.nn.one_hot(jnp.roll(tokens_BT, -1, axis=1), self.config.vocab_size)
        return 100.0 * weight_BTS.astype(jnp.float32) @ behind_BSV, None

    def logits(self, variables, x_BTD):
        return x_BTD


def _evaluate(memory, **options):
    forward = _LookUp(memory)
    return evaluate_mqar(LanguageModel(CONFIG), {}, TASK, T, ROWS, forward=forward, **options)


@pytest.mark.parametrize("batch_tokens", [7 * T, 64 * T])
def test_a_look_up_answers_all(batch_tokens):
    found = _evaluate(memory=T, batch_tokens=batch_tokens)
    assert (found.accuracy.right, found.accuracy.asked, found.accuracy.rows) == (400, 400, 100)
    assert found.nats < 1e-6
    assert 0.95 < found.accuracy.low < 0.97  # of 100 rows, not 400 answers: 1 / (1 + 1.96^2 / 100)


def test_a_short_memory_answers_what_is_near_and_no_other_place_counts():
    memory, near = 9, 0
    for number in range(ROWS):
        row = mqar_row(TASK, "heldout", number, T)
        tokens = row["tokens"].tolist()
        for at in np.flatnonzero(row["targets"] >= 0):
            before = [s for s in range(max(0, at - memory), at) if tokens[s] == tokens[at]]
            near += bool(before) and tokens[before[0] + 1] == row["targets"][at]
    found = _evaluate(memory)
    assert 40 < near < 360
    assert found.accuracy.right == near
    assert found.accuracy.low < found.accuracy.share < found.accuracy.high


def test_an_untrained_model_is_at_chance():
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), unflatten(param_shapes(CONFIG))
    )
    found = evaluate_mqar(LanguageModel(CONFIG), params, TASK, T, ROWS)
    assert found.to_dict()["chance"] == 1 / 32
    assert found.accuracy.low <= 2 / 32  # of whatever value it likes, one in 16 of those there are
    assert found.accuracy.share < 0.15
    assert found.nats > np.log(16)


def test_what_does_not_fit_the_model_is_refused():
    model = LanguageModel(CONFIG)
    with pytest.raises(ConfigError, match="vocab is 64, the model has 32 tokens"):
        evaluate_mqar(model, {}, Mqar(4, 64), T, ROWS)
    with pytest.raises(ConfigError, match="rows is 4097: set --rows to at most 4096"):
        evaluate_mqar(model, {}, TASK, T, 4097)


@pytest.mark.parametrize(
    ("right", "each", "low", "high"),
    [
        ([1] * 5 + [0] * 5, 1, 0.2366, 0.7634),  # Wilson, 5 of 10
        ([0] * 10, 1, 0.0, 0.2775),  # 1.96^2 / (10 + 1.96^2)
        ([2] * 10, 2, 0.7225, 1.0),  # all right: ten sequences, not twenty answers
        ([2, 0] * 5, 2, 0.2265, 0.7735),  # answers that go together: nine sequences say it
        ([1] * 10, 2, 0.2366, 0.7634),  # no variance between sequences: theirs again
    ],
)
def test_intervals_are_wilsons_over_sequences(right, each, low, high):
    found = right_share(np.array(right), each)
    assert found.share == sum(right) / (len(right) * each)
    np.testing.assert_allclose([found.low, found.high], [low, high], atol=6e-4)
