"""Shares of questions answered right, and how well a model recalls pairs of its context (MQAR).

Shapes: B rows, T tokens, Q answers asked for in a row.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmfree_jax.data.dataset import HELDOUT
from mmfree_jax.data.mqar import Mqar, MqarRows
from mmfree_jax.errors import ConfigError
from mmfree_jax.evaluate.batching import batch_rows, check_finite, put_batch, to_host
from mmfree_jax.evaluate.forward import FloatForward, Forward
from mmfree_jax.model import LanguageModel

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class RightShare:
    """The share of questions answered right, with a 95 % interval.

    Attributes:
      share: right / asked.
      low: lower end.
      high: upper end.
      right: questions answered right.
      asked: questions.
      rows: sequences that they lie in.
    """

    share: float
    low: float
    high: float
    right: int
    asked: int
    rows: int


def right_share(right_R: np.ndarray, each: int = 1) -> RightShare:
    """Wilson's interval, which holds at 0 and 1 too, over sequences rather than questions.

    Questions of one sequence stand or fall together: the interval is that of as many independent
    ones as have the variance found between sequences; of one a sequence where all are right or
    all wrong and none is found.

    Args:
      right_R: questions answered right in each of R sequences.
      each: questions in each.
    """
    rows, right = len(right_R), int(np.sum(right_R))
    asked = rows * each
    p, n = right / asked, float(rows)
    between = float(np.var(right_R / each, ddof=1)) / rows if each > 1 and rows > 1 else 0.0
    if between:
        n = min(asked, p * (1 - p) / between)
    middle, width = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    low, high = max(0.0, (middle - width) / scale), min(1.0, (middle + width) / scale)
    return RightShare(p, min(low, p), max(high, p), right, asked, rows)


@dataclass(frozen=True)
class MqarScore:
    """What a model recalls of rows of one task.

    Attributes:
      task: what the rows ask.
      length: of a row (tokens).
      accuracy: where a key is asked for, and nowhere else.
      nats: mean negative log-probability of the answers.
    """

    task: Mqar
    length: int
    accuracy: RightShare
    nats: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; beside them what guessing gets, and one of the row's values."""
        return {
            "pairs": self.task.pairs,
            "length": self.length,
            "accuracy": vars(self.accuracy),
            "nats": self.nats,
            "chance": 1 / self.task.vocab,
            "chance_of_a_value_of_the_row": 1 / self.task.pairs,
        }


def evaluate_mqar(
    model: LanguageModel,
    params: Any,
    task: Mqar,
    length: int,
    rows: int,
    *,
    mesh: Mesh | None = None,
    batch_tokens: int | None = None,
    forward: Forward | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> MqarScore:
    """Asks a model for the answers of the first held-out rows, which no run trains on.

    Args:
      model: the model.
      params: its parameters, or the variables of a packed model.
      task: what the rows ask.
      length: T.
      rows: how many.
      mesh: where `params` lie; None: the default device.
      batch_tokens: tokens in one batch; None: by the device's memory.
      forward: how the model computes; None: as it was trained.
      progress: called with the number of rows read since the last call.

    Raises:
      ConfigError: the task has more tokens than the model, or fewer rows.
      DataError: the task does not fit into such rows.
      CheckpointError: the model gives logits that are not finite.
    """
    forward, source = forward or FloatForward(model.config), MqarRows(task, HELDOUT)
    if task.vocab > model.config.vocab_size:
        raise ConfigError(
            f"vocab is {task.vocab}, the model has {model.config.vocab_size} tokens: set --vocab "
            "to at most that"
        )
    if rows > source.num_rows(length):
        raise ConfigError(f"rows is {rows}: set --rows to at most {source.num_rows(length)}")
    size = batch_rows(model.config, mesh, length, batch_tokens)
    right_R, nats = np.zeros(rows), 0.0
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        variables = forward.variables(params)
        for first, tokens_BT, place_BQ, answer_BQ in _batches(source, length, rows, size):
            found = _answers(
                variables, *put_batch(mesh, tokens_BT, place_BQ, answer_BQ), forward=forward
            )
            nll_BQ, right_BQ = to_host(*found)
            check_finite(nll_BQ)
            count = min(size, rows - first)
            right_R[first : first + count] = right_BQ[:count].sum(axis=1)
            nats += float(nll_BQ[:count].sum(dtype=np.float64))
            progress(count)
    return MqarScore(task, length, right_share(right_R, task.pairs), nats / (rows * task.pairs))


def _batches(
    source: MqarRows, length: int, rows: int, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Number of the first row; tokens [size, T], places and values of the answers [size, Q].

    The last batch is filled with its last row.
    """
    for first in range(0, rows, size):
        numbers = np.minimum(np.arange(first, first + size), rows - 1)
        batch = [source.row(int(r), length) for r in numbers]
        targets_BT = np.stack([row["targets"] for row in batch])
        place_BQ = np.stack([np.flatnonzero(row >= 0) for row in targets_BT]).astype(np.int32)
        answer_BQ = np.take_along_axis(targets_BT, place_BQ, axis=1)
        yield first, np.stack([row["tokens"] for row in batch]), place_BQ, answer_BQ


@functools.partial(jax.jit, static_argnames="forward")
def _answers(
    variables: Any,
    tokens_BT: jax.Array,
    place_BQ: jax.Array,
    answer_BQ: jax.Array,
    *,
    forward: Forward,
) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of each answer, float32, and whether it leads; [B, Q]."""
    x_BTD, _ = forward.hidden(variables, tokens_BT, None, None)

    def one(asked: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        place_B, answer_B = asked
        x_B1D = jnp.take_along_axis(x_BTD, place_B[:, None, None], axis=1)
        logits_BV = forward.logits(variables, x_B1D)[:, 0].astype(jnp.float32)
        chosen_B = jnp.take_along_axis(logits_BV, answer_B[:, None], axis=-1)[:, 0]
        nll_B = jax.nn.logsumexp(logits_BV, axis=-1) - chosen_B
        return nll_B, jnp.argmax(logits_BV, axis=-1) == answer_B

    nll_QB, right_QB = jax.lax.map(one, (place_BQ.T, answer_BQ.T))
    return nll_QB.T, right_QB.T
