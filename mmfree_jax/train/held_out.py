"""Held-out loss during training: exact sums, in all and by source.

The devices give each token's loss in float32; every process adds them up alike, in float64 and
in the order of the rows, so that neither the mesh nor the number of processes shows in a sum.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmfree_jax.data.pipeline import EvalBatches
from mmfree_jax.parallel.sharding import place_batch
from mmfree_jax.readable import bits_per_byte, perplexity
from mmfree_jax.saved.history import Record
from mmfree_jax.train.loss import Batch, TokenLosses


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model makes of held-out text.

    Attributes:
      loss: nats a token.
      accuracy: share of tokens predicted right.
      tokens: predicted.
      bytes_per_token: text bytes for each of them; 0: not known.
    """

    loss: float
    accuracy: float
    tokens: int
    bytes_per_token: float

    def record(self) -> Record:
        """The numbers of a record."""
        return {
            "loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": bits_per_byte(self.loss, self.bytes_per_token),
            "accuracy": self.accuracy,
            "eval_tokens": self.tokens,
        }


@dataclass(frozen=True)
class HeldOutLosses:
    """An evaluation: over all rows, and of a mixture over those of each source, by its name."""

    total: HeldOutLoss
    by_source: dict[str, HeldOutLoss] = dataclasses.field(default_factory=dict)

    def record(self) -> Record:
        """The numbers of a record; those of a source have its name behind a slash."""
        found = self.total.record()
        for source, loss in self.by_source.items():
            found |= {f"{name}/{source}": value for name, value in loss.record().items()}
        return found


def evaluate(
    eval_step: Callable[[Any, Batch], TokenLosses],
    params: dict[str, Any],
    batches: EvalBatches,
    mesh: Mesh,
    on_batch: Callable[[int], None] = lambda number: None,
) -> HeldOutLosses:
    """The loss of `params` on held-out rows; all processes call it alike and get the same.

    Args:
      eval_step: of `jit_eval_step` for the mesh.
      params: master weights on the mesh.
      batches: this process's part of them.
      mesh: of the run.
      on_batch: called with the number of each batch, from 0, before it is read.
    """
    sums = np.zeros((len(batches.sources), 3))  # loss, predicted right, predicted

    def add(number: int, found: TokenLosses) -> None:
        found = jax.device_get(found)
        per_row = np.stack([np.sum(x, axis=1, dtype=np.float64) for x in found], axis=1)
        sources = batches.sources_of(number)
        np.add.at(sums, sources[sources >= 0], per_row[sources >= 0])

    # The next batch is made and dispatched while the devices are at one.
    under_way: tuple[int, TokenLosses] | None = None
    for number, host_batch in enumerate(batches):
        on_batch(number)
        batch = place_batch(mesh, host_batch, batches.rows, batches.batch_size)
        with jax.set_mesh(mesh):
            found = eval_step(params, batch)
        if under_way is not None:
            add(*under_way)
        under_way = number, found
    if under_way is not None:
        add(*under_way)
    by_source = {
        source.name: _mean(row, source.bytes_per_token)
        for source, row in zip(batches.sources, sums, strict=True)
        if row[2]
    }
    total = _mean(sums.sum(axis=0), batches.bytes_per_token)
    return HeldOutLosses(total, by_source if len(batches.sources) > 1 else {})


def _mean(sums: np.ndarray, bytes_per_token: float) -> HeldOutLoss:
    loss, correct, tokens = map(float, sums)
    return HeldOutLoss(loss / tokens, correct / tokens, int(tokens), bytes_per_token)


def losses_by_source(record: Record) -> Iterator[tuple[str, float | None]]:
    """Name and loss of each source in a record of an evaluation; None: not finite, as read back."""
    for name, value in record.items():
        metric, slash, source = name.partition("/")
        if slash and metric == "loss":
            yield source, value
