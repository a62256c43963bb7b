"""Log-likelihoods of token sequences, in a handful of compiled programs.

A sequence is padded on the right to the next of a few lengths and always runs in batches of
that length's own size. The model is causal, so that padding behind a sequence cannot reach
it, and each row is computed alone: a score does not depend on what else is scored.

An MLGRU reads a long context apart from its continuation and keeps the state after it, which
is of constant size. Sequences with the same context (the choices of one question) go on from
the same state, so that it is read once.

Shapes: B rows, T tokens of a padded length, C positions whose logits are held at once.
"""

import bisect
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.batching import (
    HEAD_POSITIONS,
    batch_rows,
    check_finite,
    free_memory,
    put_batch,
    replicate,
    to_host,
)
from mmfree_jax.evaluate.forward import FloatForward, Forward
from mmfree_jax.model import LanguageModel, State, init_state
from mmfree_jax.model_config import ModelConfig

# Padded lengths: a third or less of a batch is padding, and tasks need few of them.
_LENGTHS = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
# Contexts whose states are kept at once: as many as this memory holds (bytes), within bounds.
_STATE_MEMORY = 256 * 2**20
_FEWEST_STATES, _MOST_STATES = 64, 8192
# Shortest context that is read apart (tokens): a shorter one costs less than its padding.
_SHORTEST_CONTEXT = 16

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Query:
    """A sequence, of whose tokens the last are scored.

    Attributes:
      tokens: the context and the continuation; the first token is never scored.
      scored: number of tokens at the end to score, below the number of tokens.
    """

    tokens: Sequence[int]
    scored: int


@dataclass(frozen=True)
class Score:
    """What a query's scored tokens are worth to the model.

    Attributes:
      log_likelihood: sum of their log-probabilities (nats).
      greedy: whether each is the likeliest token at its place.
    """

    log_likelihood: float
    greedy: bool


@dataclass
class _Piece:
    """What one query runs through the model: its tokens behind the context read apart."""

    query: int
    inputs: Sequence[int]
    targets: Sequence[int]
    scored: int
    state: int  # row of the table of states; 0 is the state before any token


class Scorer:
    """Scores sequences with one model. Not thread-safe.

    Attributes:
      model: the model.
      variables: what the programs read: parameters and trits.
      programs: (kind, length, rows) of every program compiled so far.
      tokens_read: tokens put through the model so far, padding included.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax.evaluate import Query, Scorer
      >>> scores = Scorer(model, params).score([Query([1, 2, 3, 4], scored=2), Query([5, 6], 1)])
      >>> [score.log_likelihood < 0 for score in scores]
      [True, True]
    """

    def __init__(
        self,
        model: LanguageModel,
        params: dict[str, Any],
        *,
        mesh: Mesh | None = None,
        batch_tokens: int | None = None,
        share_contexts: bool = True,
        max_length: int = 2048,
        forward: Forward | None = None,
    ) -> None:
        """Prepares a model for scoring; its weights are ternarised here, once.

        Args:
          model: the model.
          params: its parameters, or the variables of a packed model, laid out on `mesh`.
          mesh: whose devices share each batch; None: the default device.
          batch_tokens: tokens in one batch, padding included; None: by the device's memory.
          share_contexts: read a context that several queries share once (MLGRU only).
          max_length: longest sequence (tokens).
          forward: how the model computes; None: as it was trained.

        Raises:
          ConfigError: a setting that does not fit.
        """
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}: set 2 or more")
        if batch_tokens is not None and batch_tokens < 1:
            raise ConfigError(f"batch_tokens is {batch_tokens}: set a value above 0")
        self.model, self.mesh, self.max_length = model, mesh, max_length
        self.forward = forward or FloatForward(model.config)
        self._shares = share_contexts and model.config.recurrent
        self._lengths = [n for n in _LENGTHS if n < max_length]
        while (self._lengths or [0])[-1] < max_length:
            self._lengths.append(min(max_length, max(_LENGTHS[0], 2 * ([0, *self._lengths][-1]))))
        with self._on_mesh():
            self.variables = self.forward.variables(params)
        self._batch_tokens = batch_tokens
        self._limits = free_memory(mesh)
        self._states = _states_kept(model.config) if self._shares else 0
        self.programs: set[tuple[str, int, int]] = set()
        self.tokens_read = 0

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def padded_length(self, length: int) -> int:
        """The length that a piece of `length` tokens is padded to."""
        return self._lengths[bisect.bisect_left(self._lengths, length)]

    def batch_size(self, length: int) -> int:
        """Rows of a batch of padded length `length`: always the same."""
        return batch_rows(self.model.config, self.mesh, length, self._batch_tokens, self._limits)

    def score(self, queries: Sequence[Query], *, progress: Progress | None = None) -> list[Score]:
        """Scores every query, in the order given.

        Args:
          queries: to score.
          progress: called with the number of queries scored since the last call.

        Raises:
          DataError: a query without scored tokens or context, too long, or with a token that
            the model does not have.
          CheckpointError: the model gives logits that are not finite.
        """
        self._check(queries)
        scores: list[Score | None] = [None] * len(queries)
        with self._on_mesh():
            for contexts, pieces in self._windows(queries):
                table = self._read_contexts(contexts, progress)
                for batch, results in self._score_pieces(pieces, table):
                    for piece, result in zip(batch, results, strict=True):
                        scores[piece.query] = result
                    if progress is not None:
                        progress(len(batch))
        return [s for s in scores if s is not None]

    def _check(self, queries: Sequence[Query]) -> None:
        vocab = self.model.config.vocab_size
        for i, query in enumerate(queries):
            length = len(query.tokens)
            if not 0 < query.scored < length or query.scored % 1:
                raise DataError(
                    f"query {i} scores {query.scored} of {length} tokens: score at least one, and "
                    "give at least one token before them"
                )
            if length - 1 > self.max_length:
                raise DataError(
                    f"query {i} has {length} tokens: cut it to max_length + 1 "
                    f"({self.max_length + 1})"
                )
            tokens = np.asarray(query.tokens)
            if tokens.dtype.kind not in "iu":
                raise DataError(f"query {i} has tokens of {tokens.dtype}: give whole numbers")
            if tokens.min() < 0 or tokens.max() >= vocab:
                bad = next(t for t in query.tokens if not 0 <= t < vocab)
                raise DataError(
                    f"query {i} has token id {bad}: the model's ids go from 0 to {vocab - 1}"
                )

    def _windows(
        self, queries: Sequence[Query]
    ) -> Iterable[tuple[list[tuple[int, ...]], list[_Piece]]]:
        """Contexts to read apart and pieces to score: as many contexts as states are kept."""
        rows: dict[tuple[int, ...], int] = {}
        pieces: list[_Piece] = []
        for i, query in enumerate(queries):
            # The token before the first scored one is read with them: it predicts that one.
            length = len(query.tokens) - query.scored - 1
            state = 0
            if not self._shares or length < _SHORTEST_CONTEXT:
                length = 0
            else:
                context = tuple(query.tokens[:length])
                if context not in rows and len(rows) == self._states:
                    yield list(rows), pieces
                    rows, pieces = {}, []
                state = rows.setdefault(context, len(rows) + 1)
            rest = query.tokens[length:]
            pieces.append(_Piece(i, rest[:-1], rest[1:], query.scored, state))
        if pieces:
            yield list(rows), pieces

    def _batches(self, items: list[Any], length_of: Callable[[Any], int]) -> Iterable[Any]:
        """(padded length, rows, items) of each batch; longest first, so that memory fails early."""
        by_length: dict[int, list[Any]] = {}
        for item in items:
            by_length.setdefault(self.padded_length(length_of(item)), []).append(item)
        for length in sorted(by_length, reverse=True):
            rows = self.batch_size(length)
            for start in range(0, len(by_length[length]), rows):
                yield length, rows, by_length[length][start : start + rows]

    def _read_contexts(
        self, contexts: list[tuple[int, ...]], progress: Progress | None = None
    ) -> Any:
        """Table of states: row 0 is the empty one, row i the state after context i - 1."""
        if not self._shares:
            return None
        # Row 0 is the empty state; the last row takes what is written for filling.
        shapes = jax.eval_shape(lambda: init_state(self.model.config, self._states + 2).layers)
        table = jax.tree.map(lambda s: replicate(np.zeros(s.shape, s.dtype), self.mesh), shapes)
        numbered = list(enumerate(contexts, 1))
        for length, rows, batch in self._batches(numbered, lambda item: len(item[1])):
            tokens = np.zeros((rows, length), np.int32)
            held = np.zeros((rows, length), np.int32)
            places = np.full(rows, self._states + 1, np.int32)
            for row, (place, context) in enumerate(batch):
                tokens[row, : len(context)] = context
                held[row, : len(context)] = 1
                places[row] = place
            self.programs.add(("context", length, rows))
            self.tokens_read += tokens.size
            table = _read_context_batch(
                self.variables,
                table,
                *put_batch(self.mesh, tokens, held, places),
                forward=self.forward,
            )
            if progress is not None:
                jax.block_until_ready(table)  # who is told may ask for the time
                progress(0)
        return table

    def _score_pieces(self, pieces: list[_Piece], table: Any) -> Iterable[Any]:
        """(pieces, scores) of each batch, one batch behind the device."""
        waiting = None
        for length, rows, batch in self._batches(pieces, lambda piece: len(piece.inputs)):
            tokens = np.zeros((rows, length), np.int32)
            targets = np.zeros((rows, length), np.int32)
            size = np.zeros(rows, np.int32)
            scored = np.zeros(rows, np.int32)
            states = np.zeros(rows, np.int32)
            for row, piece in enumerate(batch):
                size[row] = len(piece.inputs)
                tokens[row, : size[row]] = piece.inputs
                targets[row, : size[row]] = piece.targets
                scored[row], states[row] = piece.scored, piece.state
            self.programs.add(("score", length, rows))
            self.tokens_read += tokens.size
            result = _score_batch(
                self.variables,
                table,
                *put_batch(self.mesh, tokens, targets, size, scored, states),
                forward=self.forward,
            )
            if waiting is not None:
                yield waiting[0], _fetch(*waiting)
            waiting = (batch, result)
        if waiting is not None:
            yield waiting[0], _fetch(*waiting)


def _fetch(batch: list[_Piece], result: tuple[jax.Array, jax.Array]) -> list[Score]:
    sums_B, greedy_B = to_host(*result)
    check_finite(sums_B[: len(batch)])
    return [Score(float(sums_B[i]), bool(greedy_B[i])) for i in range(len(batch))]


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="table")
def _read_context_batch(
    variables: Any,
    table: dict[str, jax.Array],
    tokens_BT: jax.Array,
    held_BT: jax.Array,
    place_B: jax.Array,
    *,
    forward: Forward,
) -> dict[str, jax.Array]:
    """Writes the state after each row's tokens into its row of the table."""
    start = init_state(forward.config, tokens_BT.shape[0])
    _, state = forward.hidden(variables, tokens_BT, held_BT, start)
    assert state is not None  # a state went in
    return jax.tree.map(
        lambda rows, new: _replicated(rows.at[:, place_B].set(new.astype(rows.dtype))),
        table,
        state.layers,
    )


@functools.partial(jax.jit, static_argnames="forward")
def _score_batch(
    variables: Any,
    table: dict[str, jax.Array] | None,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    size_B: jax.Array,
    scored_B: jax.Array,
    state_B: jax.Array,
    *,
    forward: Forward,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the log-probabilities of each row's last scored_B targets, and whether all lead.

    Logits are made for C positions of every row at a time, from the row's last target
    backwards, until the batch's most scored tokens are done.
    """
    B = tokens_BT.shape[0]
    state = None
    if table is not None:
        layers = jax.tree.map(lambda rows: rows[:, state_B], table)
        state = State(jnp.zeros((B,), jnp.int32), layers)
    x_BTD, _ = forward.hidden(variables, tokens_BT, None, state)

    def block(k: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sums_B, greedy_B = carry
        back_C = k * HEAD_POSITIONS + jnp.arange(HEAD_POSITIONS)
        place_BC = jnp.maximum(size_B[:, None] - 1 - back_C, 0)
        counts_BC = back_C < scored_B[:, None]
        x_BCD = jnp.take_along_axis(x_BTD, place_BC[..., None], axis=1)
        target_BC = jnp.take_along_axis(targets_BT, place_BC, axis=1)
        logits_BCV = forward.logits(variables, x_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, target_BC[..., None], axis=-1)[..., 0]
        log_p_BC = chosen_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        leads_BC = jnp.argmax(logits_BCV, axis=-1) == target_BC
        sums_B += jnp.sum(jnp.where(counts_BC, log_p_BC, 0.0), axis=1)
        return sums_B, greedy_B & jnp.all(leads_BC | ~counts_BC, axis=1)

    blocks = -(-jnp.max(scored_B) // HEAD_POSITIONS)
    start = (jnp.zeros((B,), jnp.float32), jnp.ones((B,), bool))
    return jax.lax.fori_loop(0, blocks, block, start)


def _states_kept(config: ModelConfig) -> int:
    state = jax.eval_shape(lambda: init_state(config, 1).layers)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return min(_MOST_STATES, max(_FEWEST_STATES, _STATE_MEMORY // size))


def _replicated(x: jax.Array) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())
