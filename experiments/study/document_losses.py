"""Held-out losses of a sweep's finished runs, document by document: what intervals resample.

`python -m mmfree_jax.experiments.study.document_losses sweeps/study2 --data data/study/* --out
documents.npz` adds to the file the runs of the sweep's table that it lacks and whose checkpoints
are still there. A document is read in rows of the run's own training length, its first
32,768 tokens at most, so that a few novels are not all there is.

`--runs runs/a runs/b --step best` takes runs by their folders, in the place of a sweep.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfree_jax.config import MeshConfig, TrainConfig
from mmfree_jax.data.dataset import HELDOUT, TokenDataset, open_dataset
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.experiments.study.documents import DocumentLosses, merged, read_losses, write_losses
from mmfree_jax.experiments.sweep.table import read_results
from mmfree_jax.model.weights import Master
from mmfree_jax.parallel.sharding import make_mesh, place_batch
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.run_directory import load_config
from mmfree_jax.train.step import jit_eval_step

MOST_TOKENS = 32_768
ROWS = 64


@dataclass(frozen=True)
class Rows:
    """Documents in rows of T tokens, each row of one document.

    Attributes:
      tokens, targets: int32 [R, T]; a target is -1 behind the document's end.
      document: of each row, index into `names` [R].
      names: source/number of each document.
      sources: of each document.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document: np.ndarray
    names: tuple[str, ...]
    sources: tuple[str, ...]


def rows_of(datasets: Sequence[TokenDataset], length: int, most: int = MOST_TOKENS) -> Rows:
    """The documents of held-out splits in rows, each document from its first token on."""
    tokens, targets, document, names, sources = [], [], [], [], []
    for dataset in datasets:
        source = Path(str(dataset.path)).name
        for number in range(dataset.num_documents):
            text = dataset.document(number)[: most + 1]
            for start in range(0, len(text) - 1, length):
                piece = text[start : start + length + 1]
                row, target = np.zeros(length, np.int32), np.full(length, -1, np.int32)
                row[: len(piece) - 1], target[: len(piece) - 1] = piece[:-1], piece[1:]
                tokens.append(row)
                targets.append(target)
                document.append(len(names))
            names.append(f"{source}/{number}")
            sources.append(source)
    return Rows(np.stack(tokens), np.stack(targets), np.array(document), tuple(names),
                tuple(sources))  # fmt: skip


def document_sums(
    step: Callable[[Any, Any], Any], params: Any, rows: Rows, mesh: jax.sharding.Mesh
) -> np.ndarray:
    """Summed loss of each document (nats) [documents]."""
    sums = np.zeros(len(rows.names))
    for first in range(0, len(rows.tokens), ROWS):
        part = slice(first, first + ROWS)
        tokens, targets = rows.tokens[part], rows.targets[part]
        short = ROWS - len(tokens)  # all batches are of one shape
        batch = {
            "tokens": np.pad(tokens, ((0, short), (0, 0))),
            "targets": np.pad(targets, ((0, short), (0, 0)), constant_values=-1),
        }
        batch["segment_ids"] = (batch["targets"] >= 0).astype(np.int32)
        placed = place_batch(mesh, batch, tuple(range(ROWS)), ROWS)
        with jax.set_mesh(mesh):
            loss = np.asarray(step(params, placed).loss_BT, np.float64).sum(1)
        np.add.at(sums, rows.document[part], loss[: len(tokens)])
    return sums


def measure(folders: Sequence[Path], rows: Rows, step: Any = None) -> DocumentLosses:
    """The losses of those runs whose checkpoints are there, by the names of their folders.

    Args:
      folders: of the runs.
      rows: the documents.
      step: of the checkpoint, or "best"; None: the newest.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    programs: dict[Any, Callable[[Any, Any], Any]] = {}
    found: dict[str, np.ndarray] = {}
    for folder in folders:
        name = folder.name
        try:
            config: TrainConfig = load_config(folder)
            weights = open_model(folder, step=step).weights("master", mesh)
        except (CheckpointError, ConfigError) as e:
            print(f"{name}: left out, {e}", flush=True)
            continue
        assert isinstance(weights, Master)
        if config.model not in programs:
            programs[config.model] = jit_eval_step(config, mesh)
        found[name] = document_sums(programs[config.model], weights.params, rows, mesh)
        print(f"{name}: {found[name].sum() / (rows.targets >= 0).sum():.4f}", flush=True)
    tokens = np.bincount(rows.document, (rows.targets >= 0).sum(1), len(rows.names))
    sums = np.stack(list(found.values())) if found else np.zeros((0, len(rows.names)))
    return DocumentLosses(tuple(found), rows.names, rows.sources, tokens, sums)


def main() -> None:
    """Reads the arguments and adds to the file."""
    parser = argparse.ArgumentParser(description="Held-out losses by document of finished runs.")
    parser.add_argument("sweep", type=Path, nargs="?", help="folder of a sweep")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of runs, in its place")
    parser.add_argument("--step", choices=["best"], help="checkpoint (the newest)")
    parser.add_argument("--data", nargs="+", required=True, help="prepared folders")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--out", type=Path, required=True, help="file that is added to (.npz)")
    given = parser.parse_args()
    if (given.sweep is None) == (given.runs is None):
        parser.error("give either the folder of a sweep or --runs")
    there = read_losses(given.out) if given.out.exists() else None
    done = set(there.runs) if there else set()
    folders = given.runs or [given.sweep / "runs" / row["run"] for row in read_results(given.sweep)]
    folders = [folder for folder in folders if folder.name not in done]
    if not folders:
        print("no run is new")
        return
    rows = rows_of([open_dataset(path, HELDOUT) for path in given.data], given.length)
    new = measure(folders, rows, given.step)
    write_losses(given.out, merged(there, new) if there else new)


if __name__ == "__main__":
    main()
