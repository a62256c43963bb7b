"""Losses of many runs on the same held-out documents, and means of them under resampling.

Shapes: R runs, K documents, B resamples.
"""

import io
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfree_jax.errors import DataError
from mmfree_jax.files import write_bytes


@dataclass(frozen=True)
class DocumentLosses:
    """What runs make of held-out documents.

    Attributes:
      runs: names [R].
      documents: source/number [K].
      sources: of each document [K].
      tokens: predicted in each document [K].
      sums: loss of each run summed over each document (nats) [R, K].
    """

    runs: tuple[str, ...]
    documents: tuple[str, ...]
    sources: tuple[str, ...]
    tokens: np.ndarray
    sums: np.ndarray

    def of_sources(self, left_out: Collection[str]) -> "DocumentLosses":
        """Without the documents of some sources."""
        keep = np.array([source not in left_out for source in self.sources])

        def those(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name for name, kept in zip(names, keep, strict=True) if kept)

        return DocumentLosses(self.runs, those(self.documents), those(self.sources),
                              self.tokens[keep], self.sums[:, keep])  # fmt: skip

    def means(self) -> np.ndarray:
        """Mean loss of each run (nats a token) [R]."""
        return self.sums.sum(1) / self.tokens.sum()

    def by_source(self) -> dict[str, np.ndarray]:
        """Source -> mean loss of each run [R]."""
        source = np.array(self.sources)
        return {
            name: self.sums[:, source == name].sum(1) / self.tokens[source == name].sum()
            for name in dict.fromkeys(self.sources)
        }

    def resampled(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Mean losses [B, R] over documents drawn with replacement within each source.

        A draw has the same documents for every run, so that what runs share cancels in their
        differences.
        """
        source = np.array(self.sources)
        weights = np.zeros((count, len(self.documents)))
        for name in dict.fromkeys(self.sources):
            own = np.flatnonzero(source == name)
            weights[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), count)
        return (weights @ self.sums.T) / (weights @ self.tokens)[:, None]


def merged(first: DocumentLosses, second: DocumentLosses) -> DocumentLosses:
    """The runs of both, those of `first` as they are there.

    Raises:
      DataError: they are of other documents.
    """
    same = first.documents == second.documents and np.array_equal(first.tokens, second.tokens)
    if not same:
        raise DataError(
            f"losses by document: these {len(second.documents)} documents are not the "
            f"{len(first.documents)} there: give the same --data and --length"
        )
    new = [i for i, run in enumerate(second.runs) if run not in first.runs]
    return DocumentLosses(
        (*first.runs, *(second.runs[i] for i in new)), first.documents, first.sources,
        first.tokens, np.concatenate([first.sums, second.sums[new]]),
    )  # fmt: skip


def write_losses(path: Path, losses: DocumentLosses) -> None:
    """Writes a .npz file, whole."""
    stream = io.BytesIO()
    np.savez_compressed(
        stream, runs=losses.runs, documents=losses.documents, sources=losses.sources,
        tokens=losses.tokens.astype(np.int64), sums=losses.sums.astype(np.float32),
    )  # fmt: skip
    write_bytes(path, stream.getvalue())


def read_losses(path: Path) -> DocumentLosses:
    """What `write_losses` wrote.

    Raises:
      DataError: it cannot be read, or is another file.
    """
    try:
        with np.load(path) as found:
            runs, documents, sources = (
                tuple(map(str, found[name])) for name in ("runs", "documents", "sources")
            )
            sums = found["sums"].astype(np.float64)
            return DocumentLosses(runs, documents, sources, found["tokens"], sums)
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{path} holds no losses by document ({e}): make it again") from e
