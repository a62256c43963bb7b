"""Held-out loss by document: perplexity, bits per byte, and loss by position in the document.

Documents are read from their first token to their last, in windows between which an MLGRU
carries its state: a late position has seen everything before it, however long the model's
training rows were. Attention reads each window afresh.

Shapes: B rows, T tokens of a window.
"""

import contextlib
import functools
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmfree_jax.data.dataset import TokenDataset, check_compatible
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.batching import check_finite, put_batch, to_host
from mmfree_jax.evaluate.forward import FloatForward, Forward
from mmfree_jax.model import LanguageModel, State, init_state
from mmfree_jax.readable import bits_per_byte, perplexity

# First positions of the buckets: each four times as far as the one before.
POSITIONS = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
_HEAD_POSITIONS = 64
_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over tokens, with a 95 % interval from a bootstrap over documents.

    Attributes:
      mean: nats a token.
      low: lower end; None with fewer than two documents.
      high: upper end.
      tokens: predicted.
      documents: that have any of them.
    """

    mean: float
    low: float | None
    high: float | None
    tokens: int
    documents: int


@dataclass(frozen=True)
class HeldOut:
    """Loss on held-out documents.

    Attributes:
      loss: nats a token.
      bytes_per_token: text bytes for each predicted token, of the whole split.
      by_position: first and one past the last position in the document, and the loss there.
      context: tokens after which the state was dropped; None: never.
    """

    loss: Interval
    bytes_per_token: float
    by_position: tuple[tuple[int, int | None, Interval], ...]
    context: int | None

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return perplexity(self.loss.mean)

    def bits_per_byte(self, nats: float) -> float | None:
        """A loss in nats a token as bits a byte of text; None where no byte is predicted."""
        return bits_per_byte(nats, self.bytes_per_token)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""

        def interval(x: Interval) -> dict[str, Any]:
            bits = {
                name: None if nats is None else self.bits_per_byte(nats)
                for name, nats in (("mean", x.mean), ("low", x.low), ("high", x.high))
            }
            return {**vars(x), "perplexity": perplexity(x.mean), "bits_per_byte": bits}

        return {
            "loss": interval(self.loss),
            "bytes_per_token": self.bytes_per_token,
            "context": self.context,
            "by_position": [
                {"from": first, "to": end, **interval(x)} for first, end, x in self.by_position
            ],
        }


def evaluate_held_out(
    model: LanguageModel,
    params: dict[str, Any],
    dataset: TokenDataset,
    *,
    mesh: Mesh | None = None,
    batch_size: int = 8,
    window: int = 512,
    context: int | None = None,
    max_documents: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    forward: Forward | None = None,
) -> HeldOut:
    """Scores every token of the documents but each one's first.

    Args:
      model: the model.
      params: its parameters, as `load_pretrained` gives them.
      dataset: the held-out split of a prepared data set.
      mesh: where `params` lie; None: the default device.
      batch_size: most rows read at once, a multiple of the mesh's data x fsdp; fewer are read
        where the documents take no more windows so, off a CPU a power of two times that multiple.
      window: tokens of a row read at once; for attention also the longest context.
      context: drop the state after every so many tokens of a document, to see what a longer
        memory is worth; None: never.
      max_documents: most documents, spread evenly over the split; None: all.
      seed: of the bootstrap.
      progress: called with the number of tokens read since the last call.
      forward: how the model computes; None: as it was trained.

    Raises:
      DataError: the data set does not fit the model, or has nothing to predict.
      ConfigError: a setting that does not fit.
      CheckpointError: the model gives logits that are not finite.
    """
    config = model.config
    forward = forward or FloatForward(config)
    check_compatible(dataset, config.vocab_size)
    for name, value in (("batch_size", batch_size), ("window", window), ("context", context)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}: set a value above 0")
    rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % rows:
        raise ConfigError(f"batch_size is {batch_size}: set --batch-size to a multiple of {rows}")
    documents = _documents(dataset, max_documents)
    sizes = [max(0, len(dataset.document(d)) - 1) for d in documents]
    fewest = _fewest_rows(sizes, batch_size, rows, window)
    batch_size = _shared_rows(fewest, batch_size, rows) if _compiles_long() else fewest
    sums = np.zeros((len(documents), len(POSITIONS)))
    counts = np.zeros((len(documents), len(POSITIONS)), np.int64)
    setting = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with setting:
        variables = forward.variables(params)
        carries = config.recurrent
        layers = init_state(config, batch_size).layers if carries else None
        waiting: tuple[Any, Any] | None = None
        cut = context if carries else min(window, context or window)
        streams = _streams(sizes, batch_size)
        for batch in _batches(dataset, documents, streams, window, cut, whole=not carries):
            fresh_B = batch["fresh"] if carries else np.ones(batch_size, bool)
            arrays = put_batch(
                mesh, batch["tokens"], batch["targets"], batch["segment_ids"], fresh_B
            )
            nll_BT, layers = _window_losses(variables, layers, *arrays, forward=forward)
            if waiting is not None:
                _add(sums, counts, *waiting)
            waiting = (batch, nll_BT)
            if progress is not None:
                progress(int((batch["targets"] >= 0).sum()))
        if waiting is not None:
            _add(sums, counts, *waiting)
    if not counts.sum():
        raise DataError(f"data folder {dataset.path} ({dataset.split}) has nothing to predict")
    rng = np.random.default_rng(seed)
    by_position = []
    for k, first in enumerate(POSITIONS):
        if counts[:, k].any():
            end = POSITIONS[k + 1] if k + 1 < len(POSITIONS) else None
            by_position.append((first, end, _interval(sums[:, k], counts[:, k], rng)))
    return HeldOut(
        _interval(sums.sum(1), counts.sum(1), rng),
        dataset.bytes_per_token,
        tuple(by_position),
        context,
    )


def _documents(dataset: TokenDataset, most: int | None) -> list[int]:
    count = dataset.num_documents
    if most is None or most >= count:
        return list(range(count))
    if most < 1:
        raise ConfigError(f"max_documents is {most}: set a value above 0")
    return [int(i) for i in np.linspace(0, count - 1, most).round()]


_Streams = list[list[tuple[int, int]]]
"""Of each row, the documents that it reads one behind the other: (number, tokens to predict)."""


def _streams(sizes: Sequence[int], rows: int) -> _Streams:
    """Documents onto rows: the longest first, onto the shortest row, so that all end together."""
    streams: _Streams = [[] for _ in range(rows)]
    lengths = [(0, row) for row in range(rows)]
    for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        if sizes[k] > 0:
            length, row = heapq.heappop(lengths)
            streams[row].append((k, sizes[k]))
            heapq.heappush(lengths, (length + sizes[k], row))
    return streams


def _fewest_rows(sizes: Sequence[int], most: int, multiple: int, window: int) -> int:
    """Rows beyond which there are no fewer windows, as the longest document is read in one row.

    Where four addresses are read, 28 of 32 rows would be padding, and cost what text costs.
    """

    def windows(rows: int) -> int:
        lengths = (sum(size for _, size in stream) for stream in _streams(sizes, rows))
        return max(-(-length // window) for length in lengths)

    least = max(1, windows(most))
    first = -(-max(1, sum(sizes)) // (least * window * multiple)) * multiple
    return next(r for r in range(first, most + 1, multiple) if windows(r) <= least)


def _compiles_long() -> bool:
    """Whether a program costs more to compile than rows of padding cost to read."""
    return jax.default_backend() != "cpu"


def _shared_rows(fewest: int, most: int, multiple: int) -> int:
    """`fewest` or, within `most`, more, so that data sets of different sizes share a program.

    The fewest follow from the documents' lengths: the ten sources of the study, each document's
    first 32,768 tokens, would be nine programs, lowered and compiled one by one; so they are four.
    """
    return min(most, multiple << (-(-fewest // multiple) - 1).bit_length())


def _batches(
    dataset: TokenDataset,
    documents: Sequence[int],
    streams: _Streams,
    window: int,
    cut: int | None,
    *,
    whole: bool,
) -> Iterator[dict[str, np.ndarray]]:
    """Windows of streams of documents, a row each.

    `cut` is the longest stretch of context; with `whole`, none runs over a window's end.

    Each has tokens, targets (-1: none), segment_ids (0: padding), document (index into
    `documents`) and position, [rows, window], and fresh [rows]: the state before the window
    is not this row's first document's.
    """
    rows = len(streams)
    readers = [_pieces(dataset, documents, stream, cut) for stream in streams]
    left: list[Any] = [None] * rows  # a piece, and whether the window before holds its start
    while True:
        batch = {
            "tokens": np.zeros((rows, window), np.int32),
            "targets": np.full((rows, window), -1, np.int32),
            "segment_ids": np.zeros((rows, window), np.int32),
            "document": np.zeros((rows, window), np.int32),
            "position": np.zeros((rows, window), np.int32),
            "fresh": np.zeros(rows, bool),
        }
        for row in range(rows):
            at, segment = 0, 0
            while at < window:
                piece, begun = left[row] or (next(readers[row], None), False)
                left[row] = None
                if piece is None:
                    break
                k, tokens, start = piece
                n = min(window - at, len(tokens) - 1)
                if whole and at and n < len(tokens) - 1:
                    left[row] = piece, False
                    break
                segment += 1
                if at == 0:
                    batch["fresh"][row] = not begun
                place = (row, slice(at, at + n))
                batch["tokens"][place], batch["targets"][place] = tokens[:n], tokens[1 : n + 1]
                batch["segment_ids"][place], batch["document"][place] = segment, k
                batch["position"][place] = start + np.arange(n)
                if n < len(tokens) - 1:
                    left[row] = (k, tokens[n:], start + n), True
                at += n
        if not batch["segment_ids"].any():
            return
        yield batch


def _pieces(
    dataset: TokenDataset, documents: Sequence[int], stream: list[tuple[int, int]], cut: int | None
) -> Iterator[tuple[int, np.ndarray, int]]:
    """(document, tokens with one to predict beyond, first position) of each stretch of context."""
    for k, size in stream:
        tokens = dataset.document(documents[k])
        step = cut or size
        for start in range(0, size, step):
            yield k, tokens[start : start + step + 1], start


@functools.partial(jax.jit, static_argnames="forward", donate_argnames="layers")
def _window_losses(
    variables: Any,
    layers: dict[str, jax.Array] | None,
    tokens_BT: jax.Array,
    targets_BT: jax.Array,
    segment_ids_BT: jax.Array,
    fresh_B: jax.Array,
    *,
    forward: Forward,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """Negative log-probability of each target (0 where there is none), and the new state."""
    B, T = tokens_BT.shape
    state = None
    if layers is not None:
        kept: Any = jax.tree.map(
            lambda x, start: jnp.where(fresh_B.reshape(1, -1, *(1,) * (x.ndim - 2)), start, x),
            layers,
            init_state(forward.config, 1).layers,
        )
        state = State(jnp.zeros((B,), jnp.int32), kept)
    x_BTD, new_state = forward.hidden(variables, tokens_BT, segment_ids_BT, state)
    chunk = min(T, _HEAD_POSITIONS)
    blocks = -(-T // chunk)
    pad = blocks * chunk - T
    x_BTD = jnp.pad(x_BTD, ((0, 0), (0, pad), (0, 0)))
    padded_BT = jnp.pad(targets_BT, ((0, 0), (0, pad)), constant_values=-1)

    def block(k: jax.Array, nll_BT: jax.Array) -> jax.Array:
        x_BCD = jax.lax.dynamic_slice_in_dim(x_BTD, k * chunk, chunk, 1)
        target_BC = jax.lax.dynamic_slice_in_dim(padded_BT, k * chunk, chunk, 1)
        logits_BCV = forward.logits(variables, x_BCD)
        chosen_BC = jnp.take_along_axis(logits_BCV, jnp.maximum(target_BC, 0)[..., None], axis=-1)[
            ..., 0
        ]
        nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC
        nll_BC = jnp.where(target_BC >= 0, nll_BC, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(nll_BT, nll_BC, k * chunk, 1)

    start = jnp.zeros((B, blocks * chunk), jnp.float32)
    nll_BT = jax.lax.fori_loop(0, blocks, block, start)[:, :T]
    return nll_BT, None if new_state is None else new_state.layers


def _add(
    sums: np.ndarray, counts: np.ndarray, batch: dict[str, np.ndarray], nll_BT: jax.Array
) -> None:
    (values,) = to_host(nll_BT)
    held = batch["targets"] >= 0
    check_finite(values[held])
    document = batch["document"][held]
    # The target at position p is token p + 1; it has seen p + 1 tokens.
    bucket = np.searchsorted(POSITIONS, batch["position"][held], side="right") - 1
    np.add.at(sums, (document, bucket), values[held].astype(np.float64))
    np.add.at(counts, (document, bucket), 1)


def _interval(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> Interval:
    """Mean, and percentiles of the mean over documents drawn with replacement."""
    there = counts > 0
    sums, counts = sums[there], counts[there]
    mean, documents = float(sums.sum() / counts.sum()), len(sums)
    if documents < 2:
        return Interval(mean, None, None, int(counts.sum()), documents)
    draws = []
    for _ in range(0, _RESAMPLES, 100):
        chosen = rng.integers(0, documents, (100, documents))
        draws.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5])
    return Interval(mean, float(low), float(high), int(counts.sum()), documents)
