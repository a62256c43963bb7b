"""A sweep that takes seconds, because its trainer only pretends."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quick_trainer import TRAINER

from mmfree_jax.config_io import from_dict
from mmfree_jax.data import writer
from mmfree_jax.experiments.sweep.config import SweepConfig


@pytest.fixture(scope="session")
def sweep_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of random bytes."""
    folder = tmp_path_factory.mktemp("data") / "bytes"
    identity = {"kind": "byte", "vocab_size": 256, "sha256": "0", "bos_id": None, "eos_id": None}
    rng = np.random.default_rng(0)
    documents = {s: [rng.integers(0, 256, 500).astype(np.uint8)] for s in ("train", "heldout")}
    writer.write_dataset(folder, documents, identity)
    return folder


@pytest.fixture
def make_sweep(tmp_path: Path, sweep_data: Path) -> Callable[..., SweepConfig]:
    """Makes a sweep of two sizes; see `quick_trainer.TRAINER` for its rates."""

    def build(rates: Sequence[float] = (2e-3, 4e-3, 8e-3), **values: Any) -> SweepConfig:
        base = {
            "out": str(tmp_path / "out"),
            "families": [{"base": "matmulfree", "learning_rates": list(rates)}],
            "sizes": ["rung-1M", "rung-3M"],
            "tokens": [1e4],
            "train": {"batch_size": 4, "data": {"paths": [str(sweep_data)], "seq_len": 64}},
        }
        return from_dict(SweepConfig, {**base, **values})

    return build


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[[Path], list[str]]:
    """The command of a run, by a trainer that only pretends."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    return lambda config: [sys.executable, "-S", str(script), str(config)]  # starts in no time
